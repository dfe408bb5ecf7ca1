"""The memory of a dequantized weight, and its lifetime.

Normally it is a scratch buffer that the next call reuses. If a layer is recomputed and memory allows, the recomputation
dequantizes into a new tensor and saves it for the layer's backward (`weights_saved`).
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

# What a linear's forward saves of its dequantized weight: nothing, a tensor of the same shape without its values, or a
# new tensor.
SAVE_NOTHING, SAVE_SHAPE, SAVE_COPY = 0, 1, 2

_thread = threading.local()
_buffers: WeakSet[Tensor] = WeakSet()  # of all threads
_lock = threading.Lock()


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Dequantize the weight into a new tensor."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    backend(out.device).codec.dequantize_into(weight, out)
    return out


def dequantize_to_scratch(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Dequantize the weight into this thread's scratch buffer on the device. It is valid until the next call."""
    buffers = _thread.__dict__.setdefault("buffers", {})
    device, num_bytes = weight.codes.device, prod(weight.shape) * dtype.itemsize
    if device not in buffers or buffers[device].numel() < num_bytes:
        buffers.pop(device, None)
        buffers[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        with _lock:
            _buffers.add(buffers[device])
    W = buffers[device][:num_bytes].view(dtype).view(weight.shape)
    backend(device).codec.dequantize_into(weight, W)
    return W


def scratch_buffers() -> list[Tensor]:
    """Return all threads' scratch buffers. A captured CUDA graph uses their addresses, so its owner must keep them."""
    with _lock:
        return list(_buffers)


def shape_of(W_NK: Tensor) -> Tensor:
    """Return a tensor like W that holds one NaN: in a product it cannot pass for the weight."""
    return W_NK.new_full((1,), float("nan")).expand(W_NK.shape)


def saved_weights() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return contexts for torch.utils.checkpoint's context_fn in which a recomputation saves its dequantized weights.

    torch's checkpoint drops what the first forward saves, and compares its shape with what the recomputation saves. It
    keeps the latter until the backward.
    """
    return weights_saved(SAVE_SHAPE), weights_saved(SAVE_COPY)


@contextmanager
def weights_saved(how: int) -> Iterator[None]:
    """Set `saving()` for this thread to one of the SAVE_ constants."""
    before = saving()
    _thread.saving = how
    try:
        yield
    finally:
        _thread.saving = before


def saving() -> int:
    """Return how this thread's linears save dequantized weights (SAVE_...). A compiled model saves none."""
    return SAVE_NOTHING if torch.compiler.is_compiling() else getattr(_thread, "saving", SAVE_NOTHING)
