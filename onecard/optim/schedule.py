"""The learning rate of each update: a pure function of its number, so that a checkpoint need not hold it.

The schedules are transformers' own functions of the update's number. In three of them, cosine, linear and constant, the
warm-up is ours: update n of W has the share (n + 1) / W of the rate, where transformers has n / W. Its first update
changes nothing. The warm-up of constant, which transformers' constant does not have, is ours too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil, cos, pi
from typing import Any

import torch
from transformers.optimization import get_scheduler

from onecard.config import OptimSettings
from onecard.errors import UserError, first_line


def learning_rate(step: int, num_steps: int, config: OptimSettings) -> float:
    """The rate of update `step` (0 first) of `num_steps`."""
    num_warmup = config.warmup_steps if config.warmup_steps is not None else ceil(config.warmup_ratio * num_steps)
    name = config.lr_scheduler_type
    if name not in ("cosine", "linear", "constant"):
        kwargs = tuple(sorted(config.lr_scheduler_kwargs.items()))
        return config.learning_rate * factor_of(name, config.learning_rate, num_warmup, num_steps, kwargs)(step)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}
    return config.learning_rate * factor[name]


@cache
def factor_of(
    name: str, rate: float, num_warmup: int, num_steps: int, kwargs: tuple[tuple[str, Any], ...]
) -> Callable[[int], float]:
    """Return transformers' factor of the rate as a function of the update's number.

    Raises:
        UserError: settings that the schedule refuses, or phases that do not fit in the run.
    """
    own = dict(kwargs)
    phases = num_warmup + own.get("num_decay_steps", 0) + own.get("num_stable_steps", 0)
    if name == "warmup_stable_decay" and phases > num_steps:
        found = f"{phases:,} updates of warm-up, stable rate and decay in a run of {num_steps:,}"
        do = "lower num_decay_steps, num_stable_steps or the warm-up, or train longer"
        raise UserError("a schedule's phases must fit in the run", found, do, "lr_scheduler_kwargs")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)  # only its rate is read
    try:
        return get_scheduler(name, optimizer, num_warmup, num_steps, own).lr_lambdas[0]  # type: ignore[union-attr]
    except ValueError as error:
        must = f"the settings of {name} must be those that transformers takes"
        raise UserError(must, first_line(error), "correct them", "lr_scheduler_kwargs") from None
