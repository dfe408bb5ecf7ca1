"""Every setting, its default and its check. No other module has its own default for a setting.

The field names are those of transformers, peft and bitsandbytes, with the same meaning.
A YAML file and the command line's flags set the same fields; an unknown key is an error.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from onecard.documents import first_mistake
from onecard.errors import UserError, did_you_mean
from onecard.patterns import check_syntax

QUANT_TYPES = ("nf4", "fp4", "int4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
ROW_MULTIPLE = 64  # rows are filled to a multiple of it: products have few shapes, and each is prepared once
LOGITS_CHUNK_BYTES = 32 << 20  # bytes of logits that exist at a time, on a CPU
CACHE_PROBE = ([1, 2, 3, 4, 5, 6], [7, 8], [9])  # a prompt, its continuation, and a sampled token (infer/check.py)
FUSION_PROBE_TOKENS = 7  # that a loaded model reads to check its fused modules (hf/fusion.py)
LOSS_PROBE_TOKENS = 24  # at most, of each of two documents on which losses are compared (train/evaluate.py)
PREFILL_TOKENS = 256  # of a prompt in one pass: other requests wait for at most one pass
NUM_SAMPLES, SAMPLE_TOKENS = 3, 96  # prompts that are answered in the report, and tokens of an answer

QuantType = Literal["nf4", "fp4", "int4"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
DataFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"]
Optim = Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]
Logger = Literal["tensorboard", "wandb", "mlflow", "trackio"]


T = TypeVar("T", bound="Strict")


def logits_chunk_bytes(device: str) -> int:
    """Return the bytes of logits that exist at a time on a kind of device. A GPU reads the head once a chunk. That
    takes as long as its product with about 300 rows: a chunk has room for 512 rows of 128,000 logits in 16 bits."""
    return LOGITS_CHUNK_BYTES if device == "cpu" else 4 * LOGITS_CHUNK_BYTES


class Strict(BaseModel):
    """Base class of settings. A wrong value raises UserError, from Python, a file or the command line."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    if not TYPE_CHECKING:  # so that editors still complete the fields

        def __init__(self, /, **fields: Any):
            check_keys(type(self), fields)
            try:
                super().__init__(**fields)
            except ValidationError as error:
                must, found = first_mistake(error)
                if not error.errors()[0]["loc"]:
                    must, found = f"config: {must}", "a combination that contradicts itself"
                raise UserError(must, found, "correct the value", type(self).__name__) from None


def check_keys(kind: type[BaseModel], fields: dict[str, Any]) -> None:
    """Raise UserError, with a similar name, for a key that is not a field of `kind`."""
    for key in fields:
        if key not in kind.model_fields:
            raise UserError(
                "every key must be a field of the config",
                f'"{key}"{did_you_mean(key, kind.model_fields)}',
                "`onecard train --help` lists the fields",
                kind.__name__,
            )


class StoredConfig(Strict):
    """Storage of the frozen base (QLoRA, arXiv 2305.14314, section 3)."""

    quant_type: QuantType = Field(default="nf4", description="the 16 levels that weights are rounded to")
    blocksize: int = Field(default=64, description="weights that share a scale: 32, 64, 128, ... 4096")
    double_quant: bool = Field(default=True, description="store the scales in 8 bits")

    @field_validator("blocksize")
    @classmethod
    def _known_blocksize(cls, value: int) -> int:
        if value not in BLOCKSIZES:
            raise ValueError(f"must be one of {', '.join(map(str, BLOCKSIZES))}")
        return value


class QuantConfig(StoredConfig):
    """Storage of the frozen base, and the dtype of computation."""

    compute_dtype: ComputeDtype = Field(default="auto", description="dtype of the products; auto: what is fast there")


class LoraSettings(Strict):
    """LoRA, with the fields of peft's LoraConfig."""

    r: int = Field(default=16, ge=1, description="rank of the update")
    lora_alpha: float = Field(
        default=32, gt=0, description="scale: lora_alpha/r, or lora_alpha/sqrt(r) with use_rslora"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the inputs of LoRA that are set to 0")
    target_modules: list[str] | str = Field(
        default="all-linear", description='names of linears, a pattern, or "all-linear"'
    )
    target_parameters: list[str] | None = Field(
        default=None, description="stacked weights of experts, such as gate_up_proj and down_proj"
    )
    use_rslora: bool = Field(default=False, description="scale by lora_alpha/sqrt(r) (arXiv 2312.03732)")
    use_dora: bool = Field(default=False, description="learn magnitude and direction apart (arXiv 2402.09353)")
    modules_to_save: list[str] | None = Field(
        default=None, description="modules trained in full and saved with the adapter"
    )

    @field_validator("target_modules")
    @classmethod
    def _names_or_pattern(cls, value: list[str] | str) -> list[str] | str:
        # peft matches a list against the ends of names, and a string, as a pattern, against whole names.
        words = [word for part in ([value] if isinstance(value, str) else value) for word in part.split(",")]
        if words and all(re.fullmatch(r"[\w.]+", word) for word in words):
            return words
        pattern = value if isinstance(value, str) else "".join(value[:1])
        if not pattern or (isinstance(value, list) and len(value) > 1):
            raise ValueError('must be names like q_proj, one pattern, or "all-linear"')
        check_syntax([pattern])
        return pattern

    @model_validator(mode="after")
    def _plain_lora_on_experts(self) -> LoraSettings:
        if self.target_parameters and (self.lora_dropout > 0 or self.use_dora):
            raise ValueError("target_parameters take no lora_dropout and no use_dora, as in peft")
        return self


class RowConfig(Strict):
    """Rows of tokens."""

    max_seq_length: int = Field(default=1024, ge=8, description="tokens; longer examples are cut, and counted")
    packing: bool = Field(default=True, description="several examples a row; they never attend to each other")


class ReadConfig(Strict):
    """Reading of a data file."""

    format: DataFormat = Field(default="auto", description="format of the data file's rows; auto recognises it")
    on_bad_rows: Literal["error", "skip"] = Field(default="error", description="rows that cannot be read")
    on_long_rows: Literal["cut", "drop", "error"] = Field(default="cut", description="rows longer than max_seq_length")


class DataConfig(RowConfig, ReadConfig):
    """Data: rows to tokens and labels."""


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
        if self.calibrate and getattr(self, "quant_type", None) == "int4":
            raise ValueError("calibrate writes bitsandbytes' format, which has nf4 and fp4, not int4")
        return self


class QuantizeConfig(QuantConfig, BaseCalibration, ReadConfig):
    """A checkpoint with its linears in 4 bits."""

    data: str | None = Field(default=None, description="calibrate: data file, best that of the training")
    max_seq_length: int = Field(default=1024, ge=8, description="calibrate: tokens a row")
    device: str = Field(
        default="auto", description="calibrate: where a decoder layer is run: auto, cpu, cuda or cuda:N"
    )

    @model_validator(mode="after")
    def _calibrated_on_data(self) -> QuantizeConfig:
        if self.calibrate != (self.data is not None):
            raise ValueError("calibrate needs data, and data is for calibrate only")
        return self


class CalibrationConfig(Strict):
    """Calibration of GPTQ and AWQ on the user's data."""

    num_rows: int = Field(default=128, ge=1, description="gptq, awq: packed rows of examples that are run")
    max_seq_length: int = Field(default=1024, ge=8, description="gptq, awq: tokens a row")
    group_size: Literal[128, 64, 32] = Field(
        default=128, description="gptq, awq: weights that share a scale; less where a width is not a multiple of it"
    )
    sym: bool = Field(default=True, description="gptq: levels on both sides of zero alike, as most kernels need")
    desc_act: bool = Field(default=False, description="gptq: inputs of large activations first; slower to read")
    damp_percent: float = Field(
        default=0.01, gt=0, lt=1, description="gptq: share of the Hessian's mean that is added to it"
    )
    device: str = Field(
        default="auto", description="gptq, awq: where a decoder layer is run: auto, cpu, cuda or cuda:N"
    )


class GgufConfig(Strict):
    """Contents of a GGUF file."""

    outtype: Literal["bf16", "f16", "q8_0", "q4_0"] = Field(default="bf16", description="gguf: how matrices are stored")
    adapter_only: bool = Field(default=False, description="gguf: the adapter as a LoRA file of its own, in float32")

    @model_validator(mode="after")
    def _an_adapter_is_float32(self) -> GgufConfig:
        if self.adapter_only and "outtype" in self.model_fields_set:
            raise ValueError("adapter_only writes float32: leave outtype out")
        return self


class ExportConfig(StoredConfig, GgufConfig, CalibrationConfig):
    """A model, with or without an adapter, in another tool's format."""

    format: Literal["gguf", "gptq", "awq"] = Field(
        description="gguf: llama.cpp, Ollama, LM Studio; gptq, awq: vLLM and transformers"
    )
    model: str = Field(description="checkpoint folder, or a hub id where a network is")
    adapter: str | None = Field(default=None, description="folder of a trained adapter")
    output: str = Field(description="new folder; gguf: a name that ends in .gguf is a new file")
    base: Literal["dequantized", "original"] | None = Field(
        default=None,
        description="what the adapter is merged into: what training saw (default), or the original weights",
    )
    data: str | None = Field(
        default=None, description="gptq, awq: data file to calibrate on, best that of the training"
    )

    @model_validator(mode="after")
    def _calibrated_on_data(self) -> ExportConfig:
        if self.format != "gguf" and self.data is None:
            raise ValueError("gptq and awq are calibrated on your data: give data")
        return self


class SamplingConfig(Strict):
    """Sampling of the next token."""

    temperature: float | None = Field(
        default=0.0, ge=0, le=2, description="0 takes the likeliest token; none: as the checkpoint's generation config"
    )
    top_p: float | None = Field(default=None, gt=0, le=1, description="default: the checkpoint's generation config")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="default: another each time")
    stop: tuple[str, ...] = Field(default=(), description="texts that end an answer; they are not part of it")


class MemorySettings(Strict):
    """Device, batch size and memory."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    weights_budget: str | None = Field(
        default=None,
        description="memory for the base, such as 2GiB; the rest is paged; default: the plan decides",
    )
    per_device_train_batch_size: int = Field(default=1, ge=1, description="rows a micro-batch")
    gradient_accumulation_steps: int = Field(default=8, ge=1, description="micro-batches an update")
    optim: Optim = Field(
        default="adamw",
        description="8bit: states of 2 bytes a weight; paged: states are offloaded when memory is short",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="recompute activations: less memory, more time; default: the plan decides",
    )
    eval_data: str | None = Field(default=None, description="file for the validation loss")
    validation_split: float = Field(
        default=0.0, ge=0, lt=1, description="share of --data held out for the validation loss"
    )
    save_total_limit: int = Field(default=2, ge=1, description="checkpoints kept")

    @field_validator("weights_budget", "device_memory", check_fields=False)  # a subclass has the latter
    @classmethod
    def _a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value


class PlanConfig(QuantConfig, LoraSettings, RowConfig, MemorySettings):
    """Settings of `onecard plan`: those settings of train that determine its memory."""


class ServeConfig(Strict):
    """A server of OpenAI's API."""

    host: str = Field(
        default="127.0.0.1", description="address to listen on; any but this machine's own needs an api_key"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port")
    api_key: str | None = Field(default=None, pattern="^[!-~]+$", description="token that requests must carry")
    allowed_hosts: list[str] = Field(
        default_factory=list, description="names in the Host header, besides this machine's own, that a proxy sends"
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="tokens of prompt and answer; default: the model's"
    )
    max_num_seqs: int = Field(default=8, ge=1, description="requests answered at a time, a token each in turn")
    max_queued: int = Field(default=64, ge=1, description="requests that wait; more are refused")
    max_body_bytes: int = Field(default=1 << 20, ge=1024, description="bytes of the largest request")
    client_timeout_seconds: float = Field(default=60, gt=0, description="for a client that neither sends nor reads")

    @model_validator(mode="after")
    def _open_only_with_a_token(self) -> ServeConfig:
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(f"host {self.host} is reached by others: pass --api-key, or set ONECARD_API_KEY")
        return self


class TrainConfig(QuantConfig, BaseCalibration, LoraSettings, DataConfig, MemorySettings):
    """One training run."""

    model: str = Field(description="checkpoint folder, or a hub id where a network is")
    data: str = Field(description="JSONL, JSON, CSV or Parquet file")
    output: str = Field(description="folder for the adapter, checkpoints, metrics and report")
    device_memory: str | None = Field(
        default=None, description="memory for the whole run, such as 6GiB; default: most of what is free"
    )
    cuda_graphs: bool = Field(default=True, description="record and replay a CUDA GPU's work where memory allows")
    num_train_epochs: float = Field(default=1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="updates; overrides num_train_epochs")
    init_lora_weights: Literal["default", "loftq"] = Field(
        default="default", description="start of LoRA; loftq: corrects what calibrate's 4 bits leave (arXiv 2310.08659)"
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="of the start of LoRA, the order of rows and dropout")

    learning_rate: float = Field(default=2e-4, gt=0, description="the largest of the schedule")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="course of the learning rate after the warm-up"
    )
    warmup_ratio: float = Field(default=0.03, ge=0, le=1, description="share of the updates in which the rate rises")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled from the gradient, as AdamW has it")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the mean of squared gradients")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="added to the root in the denominator")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="largest global gradient norm; above it, gradients are scaled"
    )

    eval_steps: int | None = Field(
        default=None, ge=1, description="updates between validation losses; default: at the end"
    )
    save_steps: int | None = Field(default=None, ge=1, description="updates between checkpoints; default: ten a run")
    logging_steps: int = Field(default=1, ge=1, description="updates between rows of the metrics")
    loggers: list[Logger] = Field(default_factory=list, description="besides metrics.jsonl and metrics.csv")
    sample_prompts: list[str] | None = Field(default=None, description="answered before and after, for the report")

    @model_validator(mode="after")
    def _whole_modules_stay(self) -> TrainConfig:
        if self.modules_to_save and self.weights_budget is not None:
            raise ValueError("modules_to_save are trained where they are: leave weights_budget out")
        return self

    @model_validator(mode="after")
    def _a_start_for_a_calibrated_base(self) -> TrainConfig:
        if self.init_lora_weights == "loftq" and (not self.calibrate or self.use_dora):
            raise ValueError("init_lora_weights loftq is made with the base: pass calibrate, and no use_dora")
        return self

    @model_validator(mode="after")
    def _one_validation_source(self) -> TrainConfig:
        if self.eval_data is not None and self.validation_split > 0:
            raise ValueError("give eval_data or validation_split, not both")
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_config(kind: type[T], fields: dict[str, Any], source: str = "config") -> T:
    """Make a `kind` from `fields`. Raises UserError that names `source` for the first mistake."""
    try:
        return kind(**fields)
    except UserError as error:
        raise UserError(error.must, error.found, error.do, source) from None


def parse_bytes(text: str) -> int:
    """Convert "24GiB", "6 GB" or "1500MB" to bytes, in any letter case. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise UserError("a size must be a number and a unit", repr(text), "write it like 24GiB or 6GB", "size")
    number, letter, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(letter or " "))
