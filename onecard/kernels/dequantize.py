"""The memory of a dequantized weight, and its lifetime.

Normally it is a scratch buffer that the next weight overwrites: one for each device and stream. If a layer is
recomputed and memory allows, the recomputation dequantizes into a new tensor and saves it for the layer's backward
(`weights_saved`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod

import torch
from torch import Tensor

from onecard.kernels.backend import backend
from onecard.quant.scales import per_block
from onecard.quant.state import PackedWeight

# What a linear's forward saves of its dequantized weight: nothing, a tensor of the same shape without its values, or a
# new tensor.
SAVE_NOTHING, SAVE_SHAPE, SAVE_COPY = 0, 1, 2

_thread = threading.local()
_scratch: dict[tuple[torch.device, int], Tensor] = {}  # buffers that nobody uses, by device and stream
_lock = threading.Lock()


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Dequantize the weight into a new tensor."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    backend(out.device).codec.dequantize_into(weight, out)
    return out


def dequantize_part(weight: PackedWeight, absmax: Tensor, first: int, count: int) -> Tensor:
    """Dequantize `count` weights from index `first` on to float32.

    Args:
        absmax: the weight's float32 scales (`state_absmax`).
    """
    skip, size, each = first % weight.blocksize, weight.blocksize, per_block(weight.quant_type)
    out = torch.empty(skip + count, device=weight.codes.device)
    codes = weight.codes.view(-1)[(first - skip) // 2 : (first + count + 1) // 2]
    absmax = absmax[first // size * each : -(-(first + count) // size) * each]
    part = PackedWeight(codes, absmax, None, None, weight.quant_type, size, list(out.shape))
    backend(out.device).codec.dequantize_into(part, out)
    return out[skip:]


@contextmanager
def dequantize_to_scratch(weight: PackedWeight, dtype: torch.dtype) -> Iterator[Tensor]:
    """Dequantize the weight into a scratch buffer, which is valid in the body.

    A stream's work runs in the order of its launches. So the next body may overwrite the buffer, even before the device
    has computed this one. A thread that comes while another is in its body gets a buffer of its own, and the larger one
    is kept.
    """
    device, num_bytes = weight.codes.device, prod(weight.shape) * dtype.itemsize
    key = (device, stream_of(device))
    with _lock:
        buffer = _scratch.pop(key, None)
    if buffer is None or buffer.numel() < num_bytes:
        del buffer  # before the larger one is allocated
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    try:
        W = buffer[:num_bytes].view(dtype).view(weight.shape)
        backend(device).codec.dequantize_into(weight, W)
        yield W
    finally:
        with _lock:
            if key not in _scratch or _scratch[key].numel() < buffer.numel():
                _scratch[key] = buffer


def stream_of(device: torch.device) -> int:
    """Return the current stream's handle; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def scratch_buffers() -> list[Tensor]:
    """Return all scratch buffers. A captured CUDA graph uses the address of one, so its owner must keep them."""
    with _lock:
        return list(_scratch.values())


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
