"""One update: micro-batches, gradients, clipping, AdamW.

With N supervised tokens in the window:

    for each micro-batch: backward(loss / N)       loss.py
    stop on NaN or Inf, clip, AdamW on the float32 master weights, schedule

Another objective divides by the window's examples instead of N (preference.py, head.py).
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from onecard.data.packing import split
from onecard.errors import UserError
from onecard.memory.measure import is_out_of_memory, peak_memory_bytes
from onecard.optim.adamw import AdamW
from onecard.optim.schedule import learning_rate
from onecard.train.loss import IGNORE, head_loss, packed_loss, to_device
from onecard.train.ranks import Ranks
from onecard.train.recovery import retry_on_oom
from onecard.train.run import Objective, Run, random_state, restore_random

MOST_VALUES = 8  # of a micro-batch: its loss and the parts of an objective's metrics


def optimizer_step(run: Run) -> dict[str, Any]:
    """Make one update over one accumulation window. Return its row of metrics."""
    start, epoch = time.perf_counter(), run.loader.epochs
    window, num_tokens = retry_on_oom(run, lambda: next_window(run))
    rate = learning_rate(run.step, run.num_steps, run.config)
    loss, norm, more = gradients(run, window, num_tokens)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
    update(run)
    run.owners.spread()
    run.drop_gradients()
    run.step += 1
    seconds = time.perf_counter() - start
    return {
        "step": run.step,
        "epoch": epoch,
        "loss": loss,
        **more,
        "learning_rate": rate,
        "grad_norm": norm,
        "num_supervised_tokens": num_tokens,
        "supervised_tokens_per_second": num_tokens / seconds,
        "memory_bytes": peak_memory_bytes(run.device),
        "seconds": seconds,
        **run.take_statistics(),
    }


def update(run: Run) -> None:
    """Step the optimizer. AdamW continues after a failed allocation. The others may have updated some parameters."""
    if isinstance(run.optimizer, AdamW):
        return retry_on_oom(run, run.optimizer.step)
    try:
        run.optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = f"not at step {run.step + 1} with optim {run.config.optim}, which cannot go on within a step"
        do = "--resume with a smaller --device-memory, or start again with --optim paged_adamw_8bit"
        raise UserError("a step must fit in memory", found, do) from None


def next_window(run: Run) -> tuple[list[dict[str, Any]], int]:
    """Return the next window's micro-batches and their number of supervised tokens. A failure restores the loader."""
    before = run.loader.state_dict()
    try:
        size = run.config.gradient_accumulation_steps
        window = [run.loader.next_batch() for _ in range(min(size, run.num_batches - run.loader.num_batches_done))]
        return window, sum(int((batch["labels"] != IGNORE).sum()) for batch in window)
    except BaseException:
        run.loader.load_state_dict(before)
        raise


def gradients(run: Run, window: list[dict[str, Any]], num_tokens: int) -> tuple[float, float, dict[str, float]]:
    """Fill .grad with clipped gradients. Return the window's loss, the gradient norm, and an objective's metrics.

    In float16 the loss is scaled against underflow. An overflow halves the scale and repeats the window with the same
    random numbers. The scale doubles after many updates without an overflow.
    """
    generators, own = random_state(run.device), run.ranks.share(window)
    divisor: Any = num_tokens
    if (objective := run.objective) is not None:
        divisor = retry_on_oom(run, lambda: objective.totals(window), window)
    while True:
        if run.ranks.count == 1:
            total, norm, more = retry_on_oom(
                run, lambda: clipped(run, own_gradients(run, own, divisor, generators), divisor), own
            )
        else:  # a process cannot repeat the exchange alone
            gather_for_others(run, window, own, divisor)
            values = retry_on_oom(run, lambda: own_gradients(run, own, divisor, generators), own)
            total, norm, more = clipped(run, values, divisor)
        if math.isfinite(total) and math.isfinite(norm):
            run.scale_loss(overflowed=False)
            return total, norm, more
        if run.loss_scale <= 1.0 or not math.isfinite(total):
            raise not_finite(run, total, norm)
        run.scale_loss(overflowed=True)


def gather_for_others(run: Run, window: list[dict[str, Any]], own: list[dict[str, Any]], divisor: Any) -> None:
    """With a sharded base, make as many passes as another process has more of than this one. Their gradients are
    dropped."""
    if not run.is_sharded:
        return

    def parts(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [part for batch in batches for part in split(batch, run.max_forward_tokens)]

    shares = [len(parts(Ranks(number, run.ranks.count).share(window))) for number in range(run.ranks.count)]
    for _ in range(max(shares) - len(parts(own))):
        micro_batch(run, parts(window[:1])[0], divisor)


def own_gradients(run: Run, own: list[dict[str, Any]], divisor: Any, generators: dict[str, Tensor]) -> Tensor:
    """Fill .grad with the gradients of this process's micro-batches. Return the sum of what `micro_batch` returns.

    Args:
        generators: the random states at the window's start.
    """
    run.drop_gradients()
    if run.graphs is not None:
        run.graphs.attach_gradients()
    restore_random(generators, run.device)
    parts = [part for batch in own for part in split(batch, run.max_forward_tokens)]
    if not parts:  # the last window may have fewer micro-batches than there are processes
        return torch.zeros(1, device=run.device)
    return torch.stack([micro_batch(run, part, divisor) for part in parts], 1).sum(1)


def clipped(run: Run, values: Tensor, divisor: Any) -> tuple[float, float, dict[str, float]]:
    """Sum gradients and values over the processes, and clip. Return the same as `gradients`."""
    if run.ranks.count > 1:
        run.ranks.sum_gradients(run.trainable.values())
        all_values = torch.zeros(MOST_VALUES, dtype=torch.float64, device=run.device)
        all_values[: len(values)] = values
        values = run.ranks.sum(all_values)
    for parameter in run.trainable.values():
        if parameter.grad is not None and run.loss_scale != 1.0:
            parameter.grad /= run.loss_scale
    norm = torch.nn.utils.clip_grad_norm_(run.trainable.values(), run.config.max_grad_norm)
    # The update's only device sync. Only AdamW follows, in one or two launches.
    total, found, *more = torch.cat([values[:1], norm[None].to(values.dtype), values[1:]]).tolist()
    return total, found, {} if run.objective is None else run.objective.metrics(more, divisor)


def micro_batch(run: Run, batch: dict[str, Any], divisor: Any) -> Tensor:
    """Accumulate one micro-batch's gradients. Return its loss, and the parts of an objective's metrics."""
    if run.objective is not None:
        return objective_batch(run, run.objective, batch, divisor)
    batch = to_device(batch, run.device)
    if run.noise is not None:
        run.noise.cu_seqlens = batch["cu_seqlens"] if run.loss is packed_loss else None
    if run.graphs is not None:
        loss = head_loss(run.base, run.graphs(batch), batch, divisor)
    else:
        with run.saved_as_pages():
            loss = run.loss(run.base, batch, divisor)
    (loss * run.loss_scale).backward()
    return loss.detach()[None]


def objective_batch(run: Run, objective: Objective, batch: dict[str, Any], totals: Any) -> Tensor:
    """Same as `micro_batch`, for another objective than tokens."""
    batch = objective.to_device(batch)
    with nullcontext() if run.graphs is not None else run.saved_as_pages():
        loss, metrics = objective.loss(batch, totals, run.graphs(batch) if run.graphs is not None else None)
    (loss * run.loss_scale).backward()
    return torch.cat([loss.detach()[None], metrics])


def not_finite(run: Run, loss: float, norm: float) -> UserError:
    found = f"loss {loss}, gradient norm {norm} at step {run.step + 1}; the update was not made"
    return UserError(
        "loss and gradients must be finite",
        found,
        "start again with a lower learning_rate, a larger warmup_ratio, or compute_dtype bfloat16 or float32",
    )
