"""Settings of the optimizer and of the learning rate, under transformers' names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from onecard.config.strict import Strict

Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "inverse_sqrt", "polynomial", "cosine_with_restarts",
]  # fmt: skip
MIN_LR = ("num_cycles", "min_lr", "min_lr_rate")
SCHEDULE_KWARGS: dict[str, tuple[str, ...]] = {  # what lr_scheduler_kwargs may hold
    "cosine_with_min_lr": MIN_LR,
    "cosine_warmup_with_min_lr": (*MIN_LR, "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
    "inverse_sqrt": ("timescale",),
    "polynomial": ("lr_end", "power"),
    "cosine_with_restarts": ("num_cycles",),
}  # fmt: skip
WORDS = {"warmup_type", "decay_type"}  # of the keys above, those whose value is a word
WHOLE = {"num_decay_steps", "num_stable_steps", "timescale"}  # those that count updates
WARMUP_RATIO = 0.03


Optim = Literal[
    "adamw", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "lion", "lion_32bit", "muon", "schedule_free_adamw", "sgd", "adafactor",
]  # fmt: skip
ADAMW = (
    "adamw", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit",
    "paged_adamw_8bit",
)  # fmt: skip


class OptimSettings(Strict):
    """The optimizer's settings, and the learning rate of each update."""

    learning_rate: float = Field(default=2e-4, gt=0, description="the largest of the schedule")
    lr_scheduler_type: Schedule = Field(
        default="cosine", description="course of the learning rate, by transformers' names"
    )
    lr_scheduler_kwargs: dict[str, int | float | str] = Field(
        default_factory=dict,
        description="the schedule's own settings, as JSON: '{\"min_lr_rate\": 0.1}' for cosine_with_min_lr",
    )
    warmup_ratio: float = Field(
        default=WARMUP_RATIO, ge=0, le=1, description="share of the updates in which the rate rises"
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="updates in which the rate rises; takes the place of warmup_ratio"
    )
    loraplus_lr_ratio: float | None = Field(
        default=None,
        gt=0,
        description="LoRA+: learning rate of lora_B over the others' (arXiv 2402.12354)",
    )
    neftune_noise_alpha: float | None = Field(
        default=None, gt=0, description="NEFTune: size of the noise on embeddings in training (arXiv 2310.05914)"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled from the gradient, as AdamW has it")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the mean of squared gradients")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="added to the root in the denominator")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="largest global gradient norm; above it, gradients are scaled"
    )

    @field_validator("lr_scheduler_kwargs")
    @classmethod
    def _numbers(cls, value: dict[str, int | float | str]) -> dict[str, int | float | str]:
        # A flag such as --lr-scheduler-kwargs.min-lr-rate 0.1 arrives as text.
        named = {key.replace("-", "_"): item for key, item in value.items()}
        for key, item in named.items():
            if key not in WORDS:
                try:
                    named[key] = number = int(item) if key in WHOLE else float(item)
                    right = float(item) == number >= 0
                except ValueError:
                    right = False
                if not right:
                    kind = "whole number" if key in WHOLE else "number"
                    raise ValueError(f"{key} must be a {kind} of at least 0, not {item!r}")
        return named

    @model_validator(mode="after")
    def _kwargs_of_the_schedule(self) -> OptimSettings:
        name, given = self.lr_scheduler_type, self.lr_scheduler_kwargs
        known, ends = SCHEDULE_KWARGS.get(name, ()), {"min_lr", "min_lr_rate"}
        for key in given:
            if key not in known:
                raise ValueError(f"lr_scheduler_kwargs of {name} are {', '.join(known) or 'none'}: it has no {key}")
        if ends <= set(known) and len(ends & set(given)) != 1:
            raise ValueError(f"lr_scheduler_kwargs of {name} must hold min_lr or min_lr_rate, one of them")
        if name == "warmup_stable_decay" and "num_decay_steps" not in given:
            raise ValueError(f"lr_scheduler_kwargs of {name} must hold num_decay_steps")
        return self

    @model_validator(mode="after")
    def _one_warmup(self) -> OptimSettings:
        if self.warmup_steps is not None and self.warmup_ratio != WARMUP_RATIO:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self
