"""The learning rate of each update: a pure function of its number, so that a checkpoint need not hold it."""

from __future__ import annotations

from math import ceil, cos, pi

from onecard.config import TrainConfig


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """The rate of update `step` (0 first) of `num_steps`: linear warm-up, then cosine or linear to 0, or constant."""
    num_warmup = ceil(config.warmup_ratio * num_steps)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}
    return config.learning_rate * factor[config.lr_scheduler_type]
