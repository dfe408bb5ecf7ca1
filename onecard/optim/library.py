"""Optimizers of torch, transformers and schedulefree behind the few calls that a run makes of AdamW.

Each of them updates all parameters in one step, and computes in the parameters' own dtype. A step that runs out of
memory may have updated some of them, so it is not repeated.

Schedule-free AdamW (arXiv 2405.15682) trains at y, between the steps' own z and their average x. x is what is evaluated
and saved. A resumed run needs y to the bit, which x and z give only to rounding: a checkpoint has x as the adapter, and
y among the states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

OF_GROUP = ("k", "weight_sum", "lr_max")  # schedulefree keeps these by group
NUMBER = "number:"  # prefix of a state that is a plain number
TRAINED = "trained"  # y of schedule-free


class LibraryOptimizer:
    """One or more optimizers, each over its own parameters, as one."""

    paged = None

    def __init__(self, inner: Sequence[Any]):
        self.inner = list(inner)
        self.owner = {p: (each, group) for each in inner for group in each.param_groups for p in group["params"]}
        self.averages = [each for each in inner if hasattr(each, "train")]  # schedulefree's
        for each in self.averages:
            each.train()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for each in self.inner for group in each.param_groups]

    def step(self) -> None:
        for each in self.inner:
            each.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Set the parameters to their average, and back to the same bits. Without an average, they stay."""
        groups = [group for each in self.averages for group in each.param_groups]
        before = [(p, p.detach().clone()) for group in groups for p in group["params"]]
        self.finish()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, values in before:
                    p.copy_(values)
            for group in groups:
                group["train_mode"] = True

    def finish(self) -> None:
        """Set the parameters to their average, for good."""
        for each in self.averages:
            each.eval()

    def state_tensors(self, p: torch.nn.Parameter) -> dict[str, Tensor]:
        """Return all that the next update of a parameter depends on, in host memory."""
        each, group = self.owner[p]
        found = dict(each.state.get(p, {}))
        if each in self.averages:
            found |= {key: group[key] for key in OF_GROUP} | {TRAINED: p.detach().clone()}
        numbers = {k: v for k, v in found.items() if isinstance(v, (int, float))}
        tensors = {k: v.cpu() for k, v in found.items() if isinstance(v, Tensor)}
        return tensors | {NUMBER + key: torch.tensor(value, dtype=dtype_of(value)) for key, value in numbers.items()}

    def load_state(self, p: torch.nn.Parameter, stored: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        each, group = self.owner[p]
        found: dict[str, Any] = {}
        for key, tensor in stored.items():
            number = key.startswith(NUMBER)
            found[key.removeprefix(NUMBER)] = tensor.item() if number else tensor.to(p.device)
        if each in self.averages:
            group.update({key: found.pop(key) for key in OF_GROUP})
            p.data.copy_(found.pop(TRAINED))
        each.state[p] = found

    def page_out(self) -> bool:
        return False


def dtype_of(number: float) -> torch.dtype:
    """Return the dtype that holds a Python number exactly."""
    return torch.int64 if isinstance(number, int) else torch.float64
