"""Settings of a model in another tool's format."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from onecard.config.data import Data, ReadConfig
from onecard.config.quant import StoredConfig
from onecard.config.strict import Strict

Folder = Literal["gptq", "awq", "w4a16", "fp8", "nvfp4", "mlx"]
CALIBRATED = ("gptq", "w4a16")  # which may have data; awq needs it
NEAREST = ("fp8", "nvfp4", "mlx")


class CalibrationConfig(ReadConfig):
    """Calibration of GPTQ, AWQ and W4A16 on the user's data."""

    num_rows: int = Field(default=128, ge=1, description="with data: packed rows of examples that are run")
    max_seq_length: int = Field(default=1024, ge=8, description="with data: tokens a row")
    group_size: Literal[128, 64, 32] = Field(
        default=128,
        description="gptq, awq, w4a16: weights that share a scale: 128, 64 or 32; less if it divides no width",
    )
    sym: bool = Field(default=True, description="gptq: levels on both sides of zero alike, as most kernels need")
    desc_act: bool = Field(default=False, description="gptq: inputs of large activations first; slower to read")
    damp_percent: float = Field(
        default=0.01, gt=0, lt=1, description="gptq, w4a16: share of the Hessian's mean that is added to it"
    )
    device: str = Field(
        default="auto", description="with data or verify: where the model is run: auto, cpu, cuda or cuda:N"
    )


Outtype = Literal[
    "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0",
    "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "q3_k_m",
]  # fmt: skip

WITHOUT_IMPORTANCE = ("bf16", "f16", "q8_0")  # nothing in them depends on it


class GgufConfig(Strict):
    """Contents of a GGUF file."""

    outtype: Outtype = Field(default="bf16", description="gguf: how matrices are stored, by llama.cpp's names")
    adapter_only: bool = Field(default=False, description="gguf: the adapter as a LoRA file of its own, in float32")

    @model_validator(mode="after")
    def _an_adapter_is_float32(self) -> GgufConfig:
        if self.adapter_only and "outtype" in self.model_fields_set:
            raise ValueError("adapter_only writes float32: leave outtype out")
        return self


class ExportConfig(StoredConfig, GgufConfig, CalibrationConfig):
    """A model, with or without an adapter, in another tool's format."""

    format: Literal["gguf"] | Folder = Field(
        description="gguf: llama.cpp, Ollama, LM Studio; gptq, awq, and w4a16, fp8, nvfp4 of compressed-tensors: vLLM "
        "and transformers; mlx: mlx-lm in 4 bits"
    )
    model: str = Field(min_length=1, description="checkpoint folder, or a hub id where a network is")
    adapter: str | None = Field(default=None, description="folder of a trained adapter")
    output: str = Field(min_length=1, description="new folder; gguf: a name that ends in .gguf is a new file")
    base: Literal["dequantized", "original"] | None = Field(
        default=None,
        description="what the adapter is merged into: what training saw (default), or the original weights",
    )
    data: Data | None = Field(
        default=None,
        description="data as of train to calibrate on, best that of the training; gguf: for an importance matrix",
    )
    imatrix: str | None = Field(
        default=None, description="gguf: file of an importance matrix in llama.cpp's format; with data it is written"
    )

    verify: Data | None = Field(
        default=None,
        description="data as of train, on whose first rows, 32 and some 8,000 tokens at most, the written file is "
        "compared with the live adapter, or without one with the model",
    )

    @model_validator(mode="after")
    def _calibrated_on_data(self) -> ExportConfig:
        if self.format == "awq" and self.data is None:
            raise ValueError("awq is calibrated on your data: give data")
        if self.format in NEAREST and self.data is not None:
            raise ValueError("fp8, nvfp4 and mlx take the nearest codes: leave data out")
        if self.format == "w4a16" and (self.desc_act or not self.sym):
            raise ValueError("w4a16 is symmetric, with inputs in order: leave sym and desc_act out, or choose gptq")
        if self.format != "gguf" and self.imatrix is not None:
            raise ValueError("imatrix is for gguf: leave it out")
        given = self.data is not None or self.imatrix is not None
        if self.format == "gguf" and given and (self.adapter_only or self.outtype in WITHOUT_IMPORTANCE):
            raise ValueError("data and imatrix are for an outtype of 3 to 6 bits, such as q4_k_m: choose one")
        if self.adapter_only and self.verify is not None:
            raise ValueError("verify reads a whole model: leave adapter_only out, or verify the merged file")
        return self
