"""Recovery when an allocation fails in an update.

CUDA graphs are dropped, or else the states of paged_adamw are offloaded. Then the failed part runs again: the
gradients of the window from its start with the same random numbers, or AdamW from the parameter that it had reached.
That is the same update, bit for bit. If the allocation fails again, micro-batches are split at document ends into
smaller and smaller parts. It is an error only when nothing is left to move or to split.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from onecard.data.packing import split
from onecard.errors import UserError
from onecard.kernels.cpu import allocator
from onecard.memory.measure import is_out_of_memory
from onecard.train.run import Run

T = TypeVar("T")


def retry_on_oom(run: Run, act: Callable[[], T], window: list[dict[str, Any]] | None = None) -> T:
    """Return act(). If an allocation fails in it, free memory and call it again.

    Args:
        window: the micro-batches that may be split.

    Raises:
        UserError: it fails again, and nothing is left to move or to split.
    """
    again = False
    while True:
        try:
            return act()
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or ["MemoryError"])[0]
        if run.is_sharded and window:
            do = "--resume with a smaller --device-memory: with parallel fsdp, a process cannot repeat a step alone"
            raise UserError("a step must fit in memory", reason, do)
        free_memory(run, window or [], reason, again)  # here, where no error references the step's tensors
        again = True


def free_memory(run: Run, window: list[dict[str, Any]], reason: str, again: bool) -> None:
    """Drop or offload what is possible after a failed allocation. If it failed `again` and that frees nothing, split.

    Raises:
        UserError: neither is possible.
    """
    gc.collect()
    allocator.release()
    gave = run.graphs is not None and run.graphs.release()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    if gave or run.optimizer.page_out() or not again:
        return
    parts = [part for batch in window for part in split(batch, run.max_forward_tokens)]
    half = max((part["cu_seqlens"][-1] for part in parts), default=0) // 2
    if sum(len(split(batch, half)) for batch in window) > len(parts):
        run.max_forward_tokens = half
        return
    raise UserError(
        "a step must fit in memory",
        f"{reason}; the optimizer's states are not in the way and each document goes alone",
        "--resume with --gradient-checkpointing, a smaller --weights-budget or --device-memory; or start again with a "
        "lower max_seq_length or r, or --optim paged_adamw_8bit; `onecard plan` says what would fit",
    )
