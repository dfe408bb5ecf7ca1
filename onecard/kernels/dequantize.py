"""The dequantized weight: where it lies, and how long.

It lies in a scratch buffer that the next call reuses. Where a layer is recomputed and memory allows, the one that the
recomputation makes is a tensor of its own, which is saved for the layer's backward (`weights_saved`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod
from weakref import WeakSet

import torch
from torch import Tensor

from onecard.kernels.backend import backend
from onecard.quant.state import PackedWeight

# How a linear's forward saves its dequantized weight: not at all, in the scratch buffer, or as a tensor of its own.
SAVE_NOTHING, SAVE_SCRATCH, SAVE_COPY = 0, 1, 2

_thread = threading.local()
_buffers: WeakSet[Tensor] = WeakSet()  # of all threads


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight in a tensor of its own."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    backend(out.device).codec.dequantize_into(weight, out)
    return out


def dequantize_to_scratch(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight in the buffer that this thread reuses for the device; valid until the next call."""
    buffers = _thread.__dict__.setdefault("buffers", {})
    device, num_bytes = weight.codes.device, prod(weight.shape) * dtype.itemsize
    if device not in buffers or buffers[device].numel() < num_bytes:
        buffers.pop(device, None)
        buffers[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        _buffers.add(buffers[device])
    W = buffers[device][:num_bytes].view(dtype).view(weight.shape)
    backend(device).codec.dequantize_into(weight, W)
    return W


def scratch_buffers() -> list[Tensor]:
    """The scratch buffers of all threads: a recorded CUDA graph holds their addresses, so its owner must keep them."""
    return list(_buffers)


def saved_weights() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts for torch.utils.checkpoint's context_fn: the linears of a recomputation save their dequantized weights.

    Checkpoint drops what the first forward saves, so there the weight may lie in the scratch buffer; it holds what the
    recomputation saves until the backward, so there the weight is a tensor of its own.
    """
    return weights_saved(SAVE_SCRATCH), weights_saved(SAVE_COPY)


@contextmanager
def weights_saved(how: int) -> Iterator[None]:
    """Sets `saving()` for this thread: one of the SAVE_ constants."""
    before = saving()
    _thread.saving = how
    try:
        yield
    finally:
        _thread.saving = before


def saving() -> int:
    """What linears save of their dequantized weights in this thread now; of a compiled model nothing."""
    return SAVE_NOTHING if torch.compiler.is_compiling() else getattr(_thread, "saving", SAVE_NOTHING)
