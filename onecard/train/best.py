"""The best evaluation of a run, and early stopping, by the rules of transformers' Trainer and EarlyStoppingCallback.

The best is strictly better than all before it. Early stopping counts the evaluations in a row that do not improve the
best by more than the threshold. An improvement by less becomes the best, and still counts as none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field

from onecard.config import TrainConfig
from onecard.documents import Own


class BestPosition(Own):
    """The part of `Best` that a checkpoint holds."""

    value: float | None = None
    step: int | None = Field(default=None, ge=1)
    num_without_improvement: int | None = Field(default=None, ge=0)  # None: no evaluation so far


@dataclass
class Best:
    """The best evaluation so far.

    Attributes:
        metric: its name in the metrics.
        patience: evaluations without an improvement after which training stops; None: it does not.
        threshold: what an improvement must exceed.
        position: its value and step, and the number of evaluations since the last improvement.
    """

    metric: str
    is_greatest: bool
    patience: int | None
    threshold: float
    position: BestPosition

    def update(self, step: int, value: float) -> bool:
        """Count an evaluation. Return whether it is the best. NaN is never better."""
        before = -math.inf if self.is_greatest else math.inf
        if self.position.value is not None:
            before = self.position.value
        is_best = value > before if self.is_greatest else value < before
        count = self.position.num_without_improvement
        improved = count is None or (is_best and abs(value - before) > self.threshold)
        kept = {"value": value, "step": step} if is_best else {}
        counted = {"num_without_improvement": 0 if improved else (count or 0) + 1}
        self.position = self.position.model_copy(update={**kept, **counted})
        return is_best

    @property
    def is_over(self) -> bool:
        """Whether early stopping ends the run."""
        return self.patience is not None and (self.position.num_without_improvement or 0) >= self.patience

    def facts(self) -> dict[str, str]:
        """Return the lines for the report."""
        if self.position.value is None:
            return {}
        return {f"best {self.metric}": f"{self.position.value:.4f} at step {self.position.step:,}"}


def best_of(config: TrainConfig) -> Best | None:
    """Return the tracker that the settings ask for, at its start; None if they ask for none."""
    if config.best_metric is None:
        return None
    how = (config.best_is_greatest, config.early_stopping_patience, config.early_stopping_threshold)
    return Best(config.best_metric, *how, BestPosition())
