"""The backend that always works: quant/ itself, on any device that torch has."""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.quant.blockwise import dequantize_blocks, quantize_blocks
from onecard.quant.nested import dequantize_absmax

__all__ = ["can_multiply", "cross_entropy_", "dequantize_into", "multiply", "quantize_blocks"]


def can_multiply(x_MK: Tensor, blocksize: int) -> bool:
    """Never: here a product is dequantize_into and a matrix product of torch."""
    return False


def multiply(x_MK: Tensor, *weight) -> Tensor:
    raise NotImplementedError("can_multiply says no")


def dequantize_into(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out: Tensor,
) -> None:
    """Fill `out` (contiguous, any float dtype) with the weight that the codes and scales stand for."""
    if nested_absmax is not None and nested_offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
    dequantize_blocks(packed, absmax, quant_type, blocksize, out)


def cross_entropy_(z_PV: Tensor, target_P: Tensor) -> Tensor:
    """The losses logsumexp(z) - z[target], float32 (P,); z becomes its gradient softmax(z) - onehot(target)."""
    z = z_PV.float()
    logsumexp = z.logsumexp(-1)
    row = torch.arange(len(target_P), device=z.device)
    losses_P = logsumexp - z[row, target_P]
    dz = torch.exp(z - logsumexp[:, None])
    dz[row, target_P] -= 1
    z_PV.copy_(dz)
    return losses_P
