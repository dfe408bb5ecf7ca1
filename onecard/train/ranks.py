"""The processes of a run: one, or those that torchrun starts, which are data parallel.

Each has the whole model and reads the same data in the same order. It computes its share of each window's micro-batches
with the window's own divisor, and the gradients are summed. So an update does not depend on the number of processes, up
to the order of additions. The first process alone writes and speaks.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from onecard.config import TrainConfig
from onecard.errors import UserError

PATIENCE = datetime.timedelta(days=1)  # for one that is at work; one that has ended is noticed at once
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The number of this process among the `count` of the run."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def share(self, items: list[T]) -> list[T]:
        """Return this process's part of the items."""
        return items[self.number :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, the same bits in each."""
        return values if self.count == 1 else all_reduced(values.clone())

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients in float32, in one exchange. A parameter without one in any process keeps none."""
        if self.count == 1:
            return
        params = list(parameters)
        flat = [torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.flatten().float() for p in params]
        there = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
        total = torch.cat([*flat, there])
        del flat
        for p in params:
            p.grad = None
        total = all_reduced(total)
        *parts, there = total.split([*(p.numel() for p in params), len(params)])
        for p, part, count in zip(params, parts, there.tolist()):
            p.grad = part.view_as(p).to(p.dtype) if count else None

    def any(self, yes: bool) -> bool:
        """Whether it holds in any process."""
        return bool(self.sum(torch.tensor(int(yes))))

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process, in their order. It must be JSON."""
        if self.count == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.number] = len(own)
        sizes = self.sum(sizes)
        rows = torch.zeros(self.count, int(sizes.max()), dtype=torch.uint8)
        rows[self.number, : len(own)] = own
        rows = self.sum(rows)
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes.tolist())]

    def wait(self) -> None:
        """Wait until all are here."""
        self.sum(torch.zeros(()))

    @contextmanager
    def first_alone(self, base: Any = None) -> Iterator[None]:
        """Let the first process go through the block before the others, which find what it has written.

        Args:
            base: transformers' model, if the first process computes with it; the others make no forward.
        """
        with self.in_step(base):
            if self.is_first:
                yield
        self.wait()
        if not self.is_first:
            yield

    @contextmanager
    def in_step(self, base: Any) -> Iterator[None]:
        """Let each process make forwards without gradients in the block, as many as it needs.

        If transformers' model `base` is sharded, one that is done gathers layers for the others until all are done.
        """
        sharded = getattr(base, "sharded_base", None)
        if sharded is None:
            yield
            return
        sharded.before_forward = partial(self.any, True)
        try:
            yield
        finally:
            sharded.before_forward = None
        while self.any(False):
            sharded.gather_once()


def all_reduced(values: Tensor) -> Tensor:
    """Add the values of all processes in place."""
    with together():
        dist.all_reduce(values)
    return values


@contextmanager
def together(whole_run: bool = False) -> Iterator[None]:
    """Turn the end of another process into a UserError. `whole_run`: the block has other errors, too."""
    try:
        yield
    except RuntimeError as error:
        if whole_run and not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        must, found = "all processes of a run must go on", f"another one has ended ({str(error).splitlines()[0][:120]})"
        raise UserError(must, found, "see its message; then run the same command with --resume", "torchrun") from None


def join(device: str) -> Ranks:
    """Return the processes that torchrun has started, connected; one process without torchrun.

    Raises:
        UserError: more processes than GPUs; a device that all of them would use.
    """
    number, count = int(os.environ.get("RANK", 0)), num_processes()
    if count == 1:
        return Ranks()
    local = int(os.environ["LOCAL_RANK"])
    if device not in ("auto", "cpu", "cuda"):
        do = "give auto, cpu or cuda, and choose the GPUs with CUDA_VISIBLE_DEVICES"
        raise UserError("each process must have a device of its own", device, do, "device")
    if device != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            found = f"{num_beside()} processes for {torch.cuda.device_count()} GPUs"
            raise UserError("each process must have a GPU of its own", found, "start fewer processes", "torchrun")
        torch.cuda.set_device(local)
    with together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return Ranks(number, count)


def num_processes() -> int:
    """Return the number of the run's processes on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_sharded(config: TrainConfig) -> bool:
    """Whether the base is sharded over the processes."""
    return config.parallel == "fsdp" and num_processes() > 1


def num_beside() -> int:
    """Return the number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def leave(ranks: Ranks) -> None:
    """Disconnect at the end of a run."""
    if ranks.count > 1:
        dist.destroy_process_group()
