"""Settings of evaluation during a run: when, on which files, which checkpoint is the best, when to stop early.

The names and their meanings are those of transformers' TrainingArguments and EarlyStoppingCallback.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from onecard.config.data import Data, Source, parse_data
from onecard.config.strict import Strict

Interval = Literal["no", "steps", "epoch"]
SCORES = {"exact_match": ("exact_match",), "rouge": ("rouge1", "rouge2", "rougeL")}  # values of each metric
PAIR_REWARDS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
EVALUATED = {  # what the best can be measured by besides the loss, by loss or by the task of a head
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo"), PAIR_REWARDS),
    "kto": PAIR_REWARDS[1:],
    "classification": ("accuracy", "f1"),
    "reward": ("accuracy", "margin"),
}
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
NAMED = re.compile(r"(\w[\w-]*)=(.+)", re.DOTALL)


def parse_named(value: Any) -> Any:
    """Check eval data: NAME=FILE, a list of it, a mapping of names to data, or data. Raises ValueError."""
    if isinstance(value, dict) and "path" not in value:
        if not (value and all(isinstance(name, str) and re.fullmatch(r"\w[\w-]*", name) for name in value)):
            raise ValueError("must have names of letters, digits, - and _")
        return {name: parse_data(each) for name, each in value.items()}
    items = [value] if isinstance(value, str) else value
    matches = [NAMED.fullmatch(item) for item in items if isinstance(item, str)] if isinstance(items, list) else []
    pairs = [(match[1], match[2]) for match in matches if match]
    if not pairs:
        return parse_data(items[0] if isinstance(items, list) and len(items) == 1 else value)
    if len(pairs) < len(items):
        raise ValueError("either all eval files or none must have a name: NAME=FILE")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("each eval file needs a name of its own")
    return dict(pairs)


NamedData = Annotated[str | list[str | Source] | dict[str, Data], BeforeValidator(parse_named)]


class EvaluationData(Strict):
    """Data that is held out for evaluation."""

    eval_data: NamedData | None = Field(
        default=None,
        description="for the validation loss: the forms of data, or several with names: NAME=FILE, each with its own",
    )
    validation_split: float = Field(
        default=0.0, ge=0, lt=1, description="share of --data held out for the validation loss"
    )

    @model_validator(mode="after")
    def _one_validation_source(self) -> EvaluationData:
        if self.eval_data is not None and self.validation_split > 0:
            raise ValueError("give eval_data or validation_split, not both")
        return self

    @property
    def eval_sources(self) -> dict[str, Data]:
        """The eval data by name; that without a name is "". Empty without eval_data."""
        if isinstance(self.eval_data, dict):
            return self.eval_data
        return {} if self.eval_data is None else {"": self.eval_data}

    @property
    def eval_names(self) -> list[str]:
        """The names of the evaluation's data; "" for data without a name, also of validation_split."""
        return [""] if self.validation_split > 0 else list(self.eval_sources)


class EvaluationSettings(EvaluationData):
    """Evaluation, the best checkpoint and early stopping."""

    eval_strategy: Interval = Field(
        default="steps",
        description="when to evaluate: each eval_steps updates, at the end of each epoch, or (no) after the training",
    )
    eval_steps: int | None = Field(
        default=None, ge=1, description="updates between evaluations; default: only after the last"
    )
    load_best_model_at_end: bool = Field(
        default=False, description="end with the adapter of the best evaluation; its checkpoint is always kept"
    )
    metric_for_best_model: str | None = Field(
        default=None, description="what best is measured by: eval_loss (default), eval_NAME_loss, or a generated metric"
    )
    greater_is_better: bool | None = Field(
        default=None, description="whether the best is the largest; default: unless the metric's name ends in loss"
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="stop after so many evaluations in a row that do not improve the best"
    )
    early_stopping_threshold: float = Field(
        default=0.0, ge=0, description="an improvement must be larger than this for early_stopping_patience"
    )

    metric: list[str] = Field(
        default_factory=list,
        description="on generated answers of the eval data: exact_match, rouge, or your function as module:function",
    )
    metric_max_rows: int | None = Field(default=100, ge=1, description="metric: rows of an eval file; none: all")
    metric_max_new_tokens: int = Field(default=256, ge=1, description="metric: tokens of an answer")
    per_device_eval_batch_size: int = Field(default=8, ge=1, description="metric: answers generated at a time")

    @field_validator("metric", mode="before")
    @classmethod
    def _a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known_metrics(self) -> EvaluationSettings:
        for metric in self.metric:
            if metric not in SCORES and not OWN.fullmatch(metric):
                raise ValueError(f"metric must be {', '.join(SCORES)} or module:function")
        if self.metric and not self.eval_names:
            raise ValueError("metric needs eval_data or validation_split")
        if len(set(self.metric_names)) < len(self.metric_names):
            raise ValueError("each metric must have a name of its own")
        return self

    @model_validator(mode="after")
    def _evaluations_at_one_interval(self) -> EvaluationSettings:
        if self.eval_steps is not None and self.eval_strategy != "steps":
            raise ValueError(f"eval_steps is for eval_strategy steps, not {self.eval_strategy}")
        if self.eval_strategy == "epoch" and not self.eval_names:
            raise ValueError("eval_strategy epoch needs eval_data or validation_split")
        return self

    @model_validator(mode="after")
    def _something_to_compare(self) -> EvaluationSettings:
        settings = ("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience")
        asked = next((name for name in settings if getattr(self, name)), None)
        if asked is None:
            if self.greater_is_better is not None or self.early_stopping_threshold:
                raise ValueError(
                    "greater_is_better and early_stopping_threshold need load_best_model_at_end or "
                    "early_stopping_patience"
                )
            return self
        if not self.eval_names:
            raise ValueError(f"{asked} needs eval_data or validation_split")
        if self.eval_strategy == "no" or (self.eval_strategy == "steps" and self.eval_steps is None):
            raise ValueError(f"{asked} needs several evaluations: give eval_steps, or eval_strategy epoch")
        if self.best_metric not in self.eval_metrics:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(self.eval_metrics)}")
        return self

    @property
    def eval_metrics(self) -> list[str]:
        """The names of what the best can be measured by, as in the metrics."""
        more = EVALUATED.get(getattr(self, "objective", "sft"), ())
        return [eval_key(name, metric) for name in self.eval_names for metric in ("loss", *self.metric_names, *more)]

    @property
    def eval_losses(self) -> list[str]:
        """The names of the losses of the eval files."""
        return [eval_key(name, "loss") for name in self.eval_names]

    @property
    def metric_names(self) -> list[str]:
        """The names of the values of `metric`: rouge has several, a function has its own name."""
        return [name for metric in self.metric for name in SCORES.get(metric, (metric.rpartition(":")[2],))]

    @property
    def best_metric(self) -> str | None:
        """The name of the metric that the best is measured by; None if no best is sought."""
        if not (self.load_best_model_at_end or self.metric_for_best_model or self.early_stopping_patience):
            return None
        metric = self.metric_for_best_model or "loss"
        return metric if metric.startswith("eval_") else f"eval_{metric}"

    @property
    def best_is_greatest(self) -> bool:
        """Whether the best is the largest value."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not (self.best_metric or "").endswith("loss")


def eval_key(name: str, metric: str) -> str:
    """Return the name of a metric on an eval file: eval_loss, or eval_NAME_loss for a file with a name."""
    return f"eval_{name}_{metric}" if name else f"eval_{metric}"
