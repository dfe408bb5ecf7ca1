"""Triton kernels for GPUs (CUDA, ROCm), one file per group. Codes, scales and weights have the bits of quant/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, num_programs: int, first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor. Triton itself would use the thread's current device."""
    with torch.cuda.device_of(first):
        kernel[(num_programs,)](first, *arguments, **constants)
