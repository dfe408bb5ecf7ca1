"""Triton kernels for GPUs (CUDA, ROCm), one file a kernel; the same bits as quant/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, num_programs: int, first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor: Triton itself takes the thread's current one."""
    with torch.cuda.device_of(first):
        kernel[(num_programs,)](first, *arguments, **constants)
