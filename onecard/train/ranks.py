"""The processes of a run: one, or those that torchrun starts, which are data parallel.

Each has the whole model and reads the same data in the same order. It computes its share of each window's micro-batches
with the window's own divisor, and the gradients are summed. So an update does not depend on the number of processes, up
to the order of additions. The first process alone writes and speaks.

A process waits for the others at an exchange: `EXCHANGE`, `WORK` or `ALONE`. If another ends, it notices at once. A
process that ends or fails writes why to torch.distributed's store, so that the others can name the missing one.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from onecard.config import TrainConfig
from onecard.errors import UserError, first_line
from onecard.paging.sharded import is_of_exchange
from onecard.torchrun import num_beside, num_processes, number_beside, process_number

MEETING = datetime.timedelta(minutes=10)  # torchrun starts all at the same time; each imports its libraries before
EXCHANGE = datetime.timedelta(minutes=30)  # a layer to gather, a sum: all reach it within a micro-batch of each other
WORK = datetime.timedelta(hours=3)  # each has its own part before it: an update's micro-batches, rows of an evaluation
ALONE = datetime.timedelta(days=1)  # the first one reads the data, calibrates, or computes the references
LEAVING = datetime.timedelta(seconds=15)  # the end of a run: all are through their last exchange
SECONDS_TO_ANSWER = 3.0  # after a failed exchange: those that also failed in it write so
T = TypeVar("T")


class Lost(UserError):
    """Another process has ended, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """The number of this process among the `count` of the run.

    Attributes:
        works: the group of torch.distributed in which a process waits longer than `EXCHANGE`.
        store: torch.distributed's, in which each process writes why it ended.
    """

    number: int = 0
    count: int = 1
    works: Any = None
    store: Any = None

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def share(self, items: list[T]) -> list[T]:
        """Return this process's part of the items."""
        return items[self.number :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, the same bits in each."""
        return values if self.count == 1 else self.all_reduced(values.clone())

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients in float32, in one exchange. A parameter without one in any process keeps none."""
        if self.count == 1:
            return
        self.wait(WORK)
        params = list(parameters)
        flat = [torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.flatten().float() for p in params]
        there = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
        total = torch.cat([*flat, there])
        del flat
        for p in params:
            p.grad = None
        total = self.all_reduced(total)
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

    def wait(self, patience: datetime.timedelta = EXCHANGE) -> None:
        """Wait until all are here. Raises Lost if one has ended, or is not here in that time."""
        if self.count > 1:
            with self.together():
                work: Any = dist.all_reduce(torch.zeros(()), group=self.works, async_op=True)
                work.wait(patience)

    def all_reduced(self, values: Tensor) -> Tensor:
        """Add the values of all processes in place."""
        with self.together():
            dist.all_reduce(values)
        return values

    def broadcast(self, values: Tensor, number: int) -> None:
        """Replace the values of all processes by those of process `number`."""
        with self.together():
            dist.broadcast(values, number)

    def send(self, values: Tensor) -> None:
        """Send a tensor in host memory to the first process."""
        with self.together():
            dist.send(values, 0)

    def receive(self, out: Tensor, number: int) -> Tensor:
        """Fill and return `out` with what process `number` sends to this one, the first."""
        with self.together():
            dist.recv(out, number)
        return out

    @contextmanager
    def together(self, whole_run: bool = False) -> Iterator[None]:
        """Turn the end or silence of another process into Lost. `whole_run`: the block has other errors, too, which are
        written for the others."""
        try:
            yield
        except BaseException as error:
            if self.count == 1 or isinstance(error, Lost):
                raise
            if is_of_exchange(error) if whole_run else isinstance(error, RuntimeError):
                raise self.lost(error) from None
            self.write_end(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            raise

    def write_end(self, why: str) -> None:
        """Write for the others why this process ends; empty: an exchange failed."""
        with suppress(RuntimeError):  # the store may have ended, too
            self.store.set(f"end {self.number}", why.replace("\n", " ")[:1000])

    def lost(self, error: BaseException) -> Lost:
        """Return the error for a failed exchange. It names the processes that are missing, and why they ended."""
        self.write_end("")
        others, end = [n for n in range(self.count) if n != self.number], time.monotonic() + SECONDS_TO_ANSWER
        try:
            while not self.store.check([f"end {n}" for n in others]) and time.monotonic() < end:
                time.sleep(0.1)
            ends = {n: self.store.get(f"end {n}").decode() for n in others if self.store.check([f"end {n}"])}
        except RuntimeError:
            ends = {n: "" for n in others if n > 0}  # the first process or its torchrun had the store
        how = "does not answer" if "timed out" in str(error).lower() else "has ended"
        found = [f"process {n} has ended: {ends[n]}" for n in others if ends.get(n)]
        found += [f"process {n} {how}" for n in others if n not in ends]
        found = found or [f"all are there, but an exchange failed: {first_line(error)}"]
        do = "see its message; then run the same command with --resume"
        return Lost("all processes of a run must go on", "; ".join(found), do, "torchrun")

    @contextmanager
    def first_alone(self, base: Any = None) -> Iterator[None]:
        """Let the first process go through the block before the others, which find what it has written.

        Args:
            base: transformers' model, if the first process computes with it; the others make no forward.
        """
        with self.in_step(base):
            if self.is_first:
                yield
        self.wait(ALONE)
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


def join(device: str) -> Ranks:
    """Return the processes that torchrun has started, connected; one process without torchrun.

    Raises:
        UserError: more processes than GPUs; a device that all of them would use; not all are there in `MEETING`.
    """
    number, count = process_number(), num_processes()
    if count == 1:
        return Ranks()
    local = number_beside()
    if device not in ("auto", "cpu", "cuda"):
        do = "give auto, cpu or cuda, and choose the GPUs with CUDA_VISIBLE_DEVICES"
        raise UserError("each process must have a device of its own", device, do, "device")
    if device != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            found = f"{num_beside()} processes for {torch.cuda.device_count()} GPUs"
            raise UserError("each process must have a GPU of its own", found, "start fewer processes", "torchrun")
        torch.cuda.set_device(local)
    try:
        store, *_ = next(iter(rendezvous("env://", timeout=MEETING)))
        store.set_timeout(EXCHANGE)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=EXCHANGE)
        works = dist.new_group(backend="gloo", timeout=ALONE)
    except (RuntimeError, ValueError) as error:
        do = "start all of them with torchrun, and see their messages"
        raise UserError("all processes of a run must meet", first_line(error), do, "torchrun") from None
    return Ranks(number, count, works, PrefixStore("onecard", store))


def is_sharded(config: TrainConfig) -> bool:
    """Whether the base is sharded over the processes."""
    return config.parallel == "fsdp" and num_processes() > 1


def leave(ranks: Ranks) -> None:
    """Disconnect at the end of a run. In gloo's exchanges, one process may be through before another: it waits for it,
    as the other's exchange would fail."""
    if ranks.count > 1:
        with suppress(RuntimeError):  # one was killed in the end, or the others have left, with the store
            ranks.store.set(f"through {ranks.number}", "")
            ranks.store.wait([f"through {number}" for number in range(ranks.count)], LEAVING)
        dist.destroy_process_group()
