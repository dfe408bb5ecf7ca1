"""The codec of GPUs: each operation of reference.py with its Triton kernel."""

from __future__ import annotations

from onecard.kernels.triton.adamw import adamw_8bit_
from onecard.kernels.triton.blockwise import dequantize_into, quantize_blocks
from onecard.kernels.triton.cross_entropy import cross_entropy_

__all__ = ["adamw_8bit_", "cross_entropy_", "dequantize_into", "quantize_blocks"]
