"""The backend for GPUs: each operation of reference.py on its kernel."""

from __future__ import annotations

from onecard.kernels.reference import can_fuse
from onecard.kernels.triton.adamw import adamw_8bit_
from onecard.kernels.triton.blockwise import dequantize_into, quantize_blocks
from onecard.kernels.triton.cross_entropy import cross_entropy_
from onecard.kernels.triton.product import can_multiply, multiply

__all__ = [
    "adamw_8bit_", "can_fuse", "can_multiply", "cross_entropy_", "dequantize_into", "multiply", "quantize_blocks",
]  # fmt: skip
