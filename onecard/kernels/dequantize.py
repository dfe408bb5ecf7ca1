"""The dequantized weight: which backend makes it, where it lies, and how long.

It lies in a scratch buffer that the next call reuses; where a layer is recomputed and memory allows, the one that the
recompute makes is a tensor of its own, which stays for the layer's backward (`saved_weights`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib import import_module
from math import prod
from types import ModuleType
from weakref import WeakSet

import torch
from torch import Tensor

from onecard.kernels import reference
from onecard.kernels.cpu import native

_scratch = threading.local()
_buffers: WeakSet[Tensor] = WeakSet()  # of all threads
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, int]  # packed, absmax, nested, offset, type, blocksize


def backend(device: torch.device):
    """The module that computes for tensors on `device`."""
    return BACKENDS.get(device.type, _reference)()


def _native() -> ModuleType:
    return native if native.library() is not None else reference


def _reference() -> ModuleType:
    return reference


@cache
def _triton() -> ModuleType:
    try:
        return import_module("onecard.kernels.triton.backend")
    except ImportError:  # a torch without Triton
        return reference


BACKENDS: dict[str, Callable[[], ModuleType]] = {"cpu": _native, "cuda": _triton}


def dequantize_to_scratch(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight in the buffer that this thread reuses for the device; valid until the next call."""
    buffers = _scratch.__dict__.setdefault("buffers", {})
    key, num_bytes = packed.device, prod(shape) * dtype.itemsize
    if key not in buffers or buffers[key].numel() < num_bytes:
        buffers.pop(key, None)
        buffers[key] = torch.empty(num_bytes, dtype=torch.uint8, device=packed.device)
        _buffers.add(buffers[key])
    W = buffers[key][:num_bytes].view(dtype).view(shape)
    dequantize = backend(packed.device).dequantize_into
    dequantize(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, W)
    return W


def scratch_buffers() -> list[Tensor]:
    """What any thread's next product writes to: whoever has recorded the addresses must hold these."""
    return list(_buffers)


def saved_weights() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts for torch.utils.checkpoint's context_fn: W goes among what qlora_linear saves.

    Of the first forward checkpoint drops all that, so W may lie in the scratch buffer; of the recompute it holds it
    until the backward, so W is a tensor of its own.
    """
    return weights_saved(in_scratch=True), weights_saved(in_scratch=False)


@contextmanager
def weights_saved(in_scratch: bool | None) -> Iterator[None]:
    """Here `forward_weight` keeps W for `pop_saved_weight`: in the scratch buffer or not. With None it keeps none."""
    before = getattr(_scratch, "saves", None)
    _scratch.saves = in_scratch
    try:
        yield
    finally:
        _scratch.saves = before


def forward_weight(weight: Parts, shape: list[int], dtype: torch.dtype) -> Tensor:
    """W for a product of the forward: in the scratch buffer, or in `saved_weights` as that wants it."""
    saves = getattr(_scratch, "saves", None)
    W = dequantize_anew(*weight, shape, dtype) if saves is False else dequantize_to_scratch(*weight, shape, dtype)
    _scratch.made = None if saves is None else W
    return W


def pop_saved_weight() -> Tensor | None:
    """The weight that the last `forward_weight` made in `saved_weights`, once; else None."""
    W, _scratch.made = getattr(_scratch, "made", None), None
    return W


def dequantize_anew(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight in a tensor of its own."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    dequantize = backend(packed.device).dequantize_into
    dequantize(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out)
    return out
