"""Settings of the task and its loss: supervised fine-tuning, one of the losses on preferences, or a classification
head, with the names of trl."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from onecard.config.strict import Strict

Task = Literal["causal_lm", "classification", "reward"]
Loss = Literal["sft", "dpo", "ipo", "orpo", "kto", "simpo"]
LossType = Literal[
    "sigmoid", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "apo_zero", "apo_down", "sigmoid_norm"
]
PAIRED = ("dpo", "ipo", "orpo", "simpo")  # losses over a chosen and a rejected answer
REFERENCED = ("dpo", "ipo", "kto")  # losses that compare with the base without its adapter
READ_BY = {  # the losses that read a setting
    "loss_type": ("dpo",),
    "beta": (*PAIRED, "kto"),
    "label_smoothing": ("dpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "precompute_reference": REFERENCED,
}


class LossSettings(Strict):
    """The task and its loss."""

    task: Task = Field(
        default="causal_lm",
        description="causal_lm writes text; classification learns labels, reward scores, with a head in place of the "
        "vocabulary's",
    )
    loss: Loss = Field(
        default="sft", description="sft learns answers; dpo, ipo, orpo and simpo pairs of answers; kto judged answers"
    )

    @property
    def has_head(self) -> bool:
        """Whether the model has a classification head."""
        return self.task != "causal_lm"

    @property
    def objective(self) -> str:
        """The task of a head, or else the loss."""
        return self.task if self.has_head else self.loss

    @property
    def is_paired(self) -> bool:
        return self.objective in (*PAIRED, "reward")

    @property
    def has_reference(self) -> bool:
        return self.loss in REFERENCED

    @property
    def documents_per_example(self) -> int:
        """Documents that an example of the data becomes: the chosen and the rejected answer, or one."""
        return 2 if self.is_paired else 1


class PreferenceSettings(LossSettings):
    """The loss and its settings, with the names and meanings of trl's trainers."""

    loss_type: LossType = Field(default="sigmoid", description="dpo: the function of the two log-ratios")
    beta: float = Field(
        default=0.1, gt=0, description="strength of the reference, or of the preference where there is none"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="dpo with robust or exo_pair, simpo: share of wrong preferences"
    )
    simpo_gamma: float = Field(default=0.5, ge=0, description="simpo: margin of the rewards that is aimed at")
    cpo_alpha: float = Field(default=0.0, ge=0, description="simpo: weight of the chosen answers' own loss")
    desirable_weight: float = Field(default=1.0, gt=0, description="kto: weight of answers whose label is true")
    undesirable_weight: float = Field(default=1.0, gt=0, description="kto: weight of answers whose label is false")
    center_rewards_coefficient: float | None = Field(
        default=None, gt=0, description="task reward: weight of the squared sum of a pair's rewards (arXiv 2312.09244)"
    )
    precompute_reference: bool | None = Field(
        default=None,
        description="dpo, ipo, kto: compute the reference once, before the training; default: if the disk has room",
    )

    @model_validator(mode="after")
    def _settings_of_the_loss(self) -> PreferenceSettings:
        fields = PreferenceSettings.model_fields
        for name, losses in READ_BY.items():
            if getattr(self, name) != fields[name].default and self.loss not in losses:
                raise ValueError(f"{name} is for loss {', '.join(losses)}, not for {self.loss}")
        smooth = self.loss_type in ("robust", "exo_pair")
        if self.loss == "dpo" and self.label_smoothing and not smooth:
            raise ValueError("label_smoothing is for dpo with loss_type robust or exo_pair, as in trl")
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0, such as 0.001")
        if self.center_rewards_coefficient is not None and self.task != "reward":
            raise ValueError(f"center_rewards_coefficient is for task reward, not for {self.task}")
        return self
