"""Settings of a training run and of its plan."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from onecard.config.constants import HEAD
from onecard.config.data import FORMATS_OF, Data, DataConfig, RowConfig
from onecard.config.evaluation import EvaluationData, EvaluationSettings, Interval
from onecard.config.hub import HubSettings
from onecard.config.lora import LoraSettings
from onecard.config.optim import ADAMW, Optim, OptimSettings
from onecard.config.preference import LossSettings, PreferenceSettings
from onecard.config.quant import BaseCalibration, LoadConfig
from onecard.config.strict import Strict, parse_bytes

HEADS = ("classification", "reward")
Logger = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class MemorySettings(Strict):
    """Device, batch size and memory."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    weights_budget: str | None = Field(
        default=None,
        description="memory for the base, such as 2GiB; the rest is paged; default: the plan decides",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="with several processes: each has the whole base (ddp), or a part, and gathers a layer at a time "
        "(fsdp)",
    )
    per_device_train_batch_size: int = Field(default=1, ge=1, description="rows a micro-batch")
    gradient_accumulation_steps: int = Field(default=8, ge=1, description="micro-batches an update")
    optim: Optim = Field(
        default="adamw",
        description="8bit: states of 2 bytes a weight; paged: states are offloaded when memory is short; "
        "adamw_torch and adamw_torch_fused are adamw, adamw_bnb_8bit is adamw_8bit",
    )
    shard_optimizer: bool = Field(
        default=False,
        description="with several processes: each has the optimizer's states of its part of the LoRA weights, updates "
        "these and sends them to the others",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="recompute activations: less memory, more time; default: the plan decides",
    )
    save_total_limit: int = Field(default=2, ge=1, description="checkpoints kept")

    @field_validator("weights_budget", "device_memory", check_fields=False)  # a subclass has the latter
    @classmethod
    def _a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value


class PlanConfig(LoadConfig, LoraSettings, RowConfig, MemorySettings, EvaluationData, LossSettings):
    """Settings of `onecard plan`: those settings of train that determine its memory."""


class TrainConfig(
    LoadConfig,
    BaseCalibration,
    LoraSettings,
    DataConfig,
    MemorySettings,
    OptimSettings,
    PreferenceSettings,
    EvaluationSettings,
    HubSettings,
):
    """One training run."""

    model: str = Field(min_length=1, description="checkpoint folder, GGUF file, or a hub id where a network is")
    data: Data = Field(description="files, folders, patterns or hub ids; PATH:0.3 is a weight in a mixture")
    output: str = Field(
        default="run", min_length=1, description="folder for the adapter, checkpoints, metrics and report"
    )
    adapter: str | None = Field(
        default=None, description="folder of a trained adapter to go on from, with a new optimizer"
    )
    tokenizer: str | None = Field(
        default=None, description="folder of the tokenizer, which the adapter keeps; default: the model's"
    )
    device_memory: str | None = Field(
        default=None, description="memory for the whole run, such as 6GiB; default: most of what is free"
    )
    cuda_graphs: bool = Field(default=True, description="record and replay a CUDA GPU's work where memory allows")
    deterministic: bool = Field(
        default=False,
        description="the same bits from the same command on a GPU, too: torch's deterministic algorithms, which may be "
        "slower; an operation without one is an error",
    )
    num_train_epochs: float = Field(default=1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="updates; overrides num_train_epochs")

    save_strategy: Interval = Field(
        default="steps",
        description="when to write a checkpoint: each save_steps updates, at the end of each epoch, or (no) only after "
        "a signal",
    )
    save_steps: int | None = Field(default=None, ge=1, description="updates between checkpoints; default: ten a run")
    logging_steps: int = Field(default=1, ge=1, description="updates between rows of the metrics")
    loggers: list[Logger] = Field(default_factory=list, description="besides metrics.jsonl and metrics.csv")
    sample_prompts: list[str] | None = Field(default=None, description="answered before and after, for the report")
    streaming: bool = Field(
        default=False, description="read and tokenize a buffer of rows at a time, and store nothing; needs max_steps"
    )
    buffer_size: int = Field(default=16384, ge=1, description="streaming: rows that are shuffled and packed together")

    @model_validator(mode="before")
    @classmethod
    def _a_head_learns_in_full(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("task") not in HEADS:
            return fields
        saved = fields.get("modules_to_save") or []
        return {**fields, "modules_to_save": [*saved, *([HEAD] if HEAD not in saved else [])]}

    @model_validator(mode="after")
    def _whole_modules_stay(self) -> TrainConfig:
        if self.has_head and self.weights_budget is not None:
            raise ValueError(f"task {self.task} trains its head in full, which a paged base does not have: leave "
                             "weights_budget out")  # fmt: skip
        if self.modules_to_save and self.weights_budget is not None:
            raise ValueError("modules_to_save are trained where they are: leave weights_budget out")
        return self

    @model_validator(mode="after")
    def _a_sharded_base(self) -> TrainConfig:
        if self.parallel == "ddp":
            return self
        if self.has_head:
            raise ValueError(f"task {self.task} trains its head in full, which parallel fsdp does not: give ddp")
        for name in ("weights_budget", "modules_to_save", "calibrate"):
            if getattr(self, name):
                raise ValueError(f"parallel fsdp does not take {name}: leave it out, or give ddp")
        return self

    @model_validator(mode="after")
    def _an_optimizer_that_fits(self) -> TrainConfig:
        if self.modules_to_save and self.optim not in (*ADAMW, "muon"):
            raise ValueError(f"modules_to_save need the float32 masters of AdamW, which optim {self.optim} has not")
        if self.neftune_noise_alpha is not None and self.loss != "sft":
            raise ValueError(f"neftune_noise_alpha is for sft: with {self.loss} the noise would move the reference too")
        if self.optim == "muon" and self.target_parameters:
            raise ValueError("optim muon takes matrices, and target_parameters have the experts' matrices in stacks")
        if self.optim == "schedule_free_adamw" and self.shard_optimizer:
            raise ValueError("optim schedule_free_adamw keeps an average of all weights: leave shard_optimizer out")
        if self.optim == "schedule_free_adamw":
            if self.lr_scheduler_type not in ("constant", "constant_with_warmup"):
                raise ValueError(
                    "optim schedule_free_adamw averages instead of a decay: it needs lr_scheduler_type constant"
                )
            if self.adam_beta1 == 0:
                raise ValueError("optim schedule_free_adamw needs an adam_beta1 above 0")
        return self

    @model_validator(mode="after")
    def _a_start_for_a_calibrated_base(self) -> TrainConfig:
        if self.adds_tokens and self.calibrate:
            raise ValueError("calibrate runs the base without new tokens: leave add_tokens out, or quantize first")
        if self.init_lora_weights == "loftq" and self.use_dora:
            raise ValueError("init_lora_weights loftq takes no use_dora: a magnitude is that of the base")
        if self.init_lora_weights == "loftq" and self.has_reference:
            raise ValueError(f"init_lora_weights loftq changes what the model computes: loss {self.loss} would not "
                             "start at its reference")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _what_training_for_a_file_takes(self) -> TrainConfig:
        if self.train_for is None:
            return self
        if self.has_head or self.has_reference or self.metric:
            found = f"task {self.task}" if self.has_head else f"loss {self.loss}" if self.has_reference else "metric"
            raise ValueError(f"train_for rounds the weights of each forward: it does not go with {found}")
        if self.parallel == "fsdp":
            raise ValueError("train_for needs each linear's whole weight: leave parallel fsdp out")
        return self

    @model_validator(mode="after")
    def _what_a_preference_takes(self) -> TrainConfig:
        if self.format not in ("auto", *FORMATS_OF[self.objective]):
            what = f"task {self.task}" if self.has_head else f"loss {self.loss}"
            raise ValueError(f"{what} reads rows of format {' or '.join(FORMATS_OF[self.objective])}")
        if self.loss == "sft":
            return self
        if self.calibrate:
            raise ValueError(f"calibrate is for loss sft: run `onecard quantize` first, then train with {self.loss}")
        if self.adapter is not None and self.precompute_reference is False:
            raise ValueError("adapter is the reference, which the training changes: leave precompute_reference out")
        if self.train_on == "all":
            raise ValueError(f"loss {self.loss} scores answers: leave train_on out, or give last")
        if self.lora_dropout > 0:
            raise ValueError(f"loss {self.loss} compares log-probabilities without dropout: leave lora_dropout out")
        if self.metric:
            raise ValueError(f"metric compares answers with the rows' own: it is for loss sft, not {self.loss}")
        return self

    @model_validator(mode="after")
    def _what_a_head_takes(self) -> TrainConfig:
        if not self.has_head:
            return self
        if self.loss != "sft":
            raise ValueError(f"loss {self.loss} is for task causal_lm: leave loss out with task {self.task}")
        if self.calibrate:
            raise ValueError(f"calibrate is for task causal_lm: run `onecard quantize` first, then train {self.task}")
        if self.metric or self.sample_prompts:
            raise ValueError(f"task {self.task} writes no answers: leave metric and sample_prompts out")
        if self.train_on != "completion" or self.text_is_templated:
            raise ValueError(f"task {self.task} reads whole rows: leave train_on and text_is_templated out")
        if self.on_long_rows == "split":
            raise ValueError(f"task {self.task} needs rows as a whole: on_long_rows is cut, drop or error")
        if self.neftune_noise_alpha is not None:
            raise ValueError(f"neftune_noise_alpha is for task causal_lm, not {self.task}")
        return self

    @model_validator(mode="after")
    def _an_adapter_of_the_same_base(self) -> TrainConfig:
        if self.adapter is not None and self.calibrate:
            raise ValueError("adapter was trained on a base as it is: leave calibrate out")
        if self.adapter is not None and self.init_lora_weights != "default":
            raise ValueError("adapter is the start of LoRA: leave init_lora_weights out")
        return self

    @model_validator(mode="after")
    def _what_a_stream_takes(self) -> TrainConfig:
        if not self.streaming:
            return self
        if self.max_steps is None:
            raise ValueError("streaming needs max_steps: the length of the data is not known before its end")
        if isinstance(self.data, list) and len(self.data) > 1:
            raise ValueError("streaming reads one source: give a folder or a pattern for several files")
        if self.objective != "sft":
            raise ValueError(f"streaming is for loss sft: leave it out with {self.objective}")
        if "epoch" in (self.eval_strategy, self.save_strategy):
            raise ValueError("streaming does not know the end of an epoch: give eval_strategy and save_strategy steps")
        return self

    @model_validator(mode="after")
    def _checkpoints_at_one_interval(self) -> TrainConfig:
        if self.save_steps is not None and self.save_strategy != "steps":
            raise ValueError(f"save_steps is for save_strategy steps, not {self.save_strategy}")
        if self.save_strategy == "no" and self.load_best_model_at_end:
            raise ValueError("load_best_model_at_end needs checkpoints: leave save_strategy no out")
        return self
