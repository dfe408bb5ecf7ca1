"""Settings of the frozen 4-bit base."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from onecard.config.data import Data, FormatConfig
from onecard.config.strict import Strict

QUANT_TYPES = ("nf4", "fp4", "int4", "mxfp4")
BNB_TYPES = ("nf4", "fp4")  # those of bitsandbytes' format
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

MXFP4_STORAGE = {"blocksize": 32, "double_quant": False}  # the only one of quant_type mxfp4

QuantType = Literal["nf4", "fp4", "int4", "mxfp4"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


class StoredConfig(Strict):
    """Storage of the frozen base (QLoRA, arXiv 2305.14314, section 3)."""

    quant_type: QuantType = Field(default="nf4", description="the 16 levels that weights are rounded to")
    blocksize: int = Field(default=64, description="weights that share a scale: 32, 64, 128, ... 4096; mxfp4: 32")
    double_quant: bool = Field(default=True, description="store the scales in 8 bits; mxfp4 has its own such scales")

    @model_validator(mode="before")
    @classmethod
    def _as_mxfp4_is(cls, fields: Any) -> Any:
        is_mxfp4 = isinstance(fields, dict) and fields.get("quant_type") == "mxfp4"
        return {**MXFP4_STORAGE, **fields} if is_mxfp4 else fields

    @model_validator(mode="after")
    def _only_as_mxfp4_is(self) -> StoredConfig:
        if self.quant_type == "mxfp4" and any(getattr(self, key) != value for key, value in MXFP4_STORAGE.items()):
            raise ValueError("mxfp4 has blocks of 32 and scales of 8 bits: leave out blocksize and double_quant")
        return self

    @field_validator("blocksize")
    @classmethod
    def _known_blocksize(cls, value: int) -> int:
        if value not in BLOCKSIZES:
            raise ValueError(f"must be one of {', '.join(map(str, BLOCKSIZES))}")
        return value


class QuantConfig(StoredConfig):
    """Storage of the frozen base, and the dtype of computation."""

    compute_dtype: ComputeDtype = Field(default="auto", description="dtype of the products; auto: what is fast there")


class LoadConfig(QuantConfig):
    """What of a checkpoint is loaded, and how."""

    text_only: bool = Field(
        default=False, description="leave a multimodal model's parts for images and sound out of memory"
    )


class BaseCalibration(Strict):
    """Calibration of the 4-bit base on the user's data."""

    calibrate: bool = Field(
        default=False, description="choose the 4-bit codes for the outputs of the linears on the data"
    )
    calibration_tokens: int | None = Field(
        default=None,
        ge=1,
        description="calibrate: tokens of the data; default: the model's widest input, at least 4096",
    )

    @model_validator(mode="after")
    def _a_format_of_bitsandbytes(self) -> BaseCalibration:
        quant_type = getattr(self, "quant_type", "nf4")
        if self.calibrate and quant_type not in BNB_TYPES:
            raise ValueError(f"calibrate writes bitsandbytes' format, which has nf4 and fp4, not {quant_type}")
        return self


class QuantizeConfig(QuantConfig, BaseCalibration, FormatConfig):
    """A checkpoint with its linears in 4 bits."""

    data: Data | None = Field(default=None, description="calibrate: data as of train, best that of the training")
    max_seq_length: int = Field(default=1024, ge=8, description="calibrate: tokens a row")
    device: str = Field(
        default="auto", description="calibrate and verify: where the model is run: auto, cpu, cuda or cuda:N"
    )
    verify: Data | None = Field(
        default=None,
        description="data as of train, on whose first rows, 32 and some 8,000 tokens at most, the 4-bit checkpoint is "
        "compared with the model",
    )

    @model_validator(mode="after")
    def _calibrated_on_data(self) -> QuantizeConfig:
        if self.calibrate != (self.data is not None):
            raise ValueError("calibrate needs data, and data is for calibrate only")
        return self
