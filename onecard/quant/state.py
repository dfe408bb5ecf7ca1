"""QuantState: everything beside the packed codes that a 4-bit weight needs, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor


@dataclass
class QuantState:
    """One weight's scales and what its codes mean.

    Attributes:
        absmax: a scale a block: float32 (num_blocks,), or its 8-bit codes, uint8 (num_blocks,), if nested.
        shape: shape of the weight.
        dtype: dtype that the weight had and that dequantize_4bit gives back.
        blocksize: weights a scale.
        quant_type: "nf4", "fp4" or "int4".
        nested_absmax: float32 (ceil(num_blocks/256),), the scales of the scales; None if not nested.
        nested_offset: float32 (), the mean of absmax, taken off before its quantization; None if not nested.
    """

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        """Whether the scales are themselves quantized (double quantization)."""
        return self.nested_absmax is not None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the scales; the codes take (numel + 1) // 2 beside them."""
        tensors = (self.absmax, self.nested_absmax, self.nested_offset)
        return sum(t.nbytes for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> QuantState:
        """The same state on another device; dtypes never change."""
        return replace(
            self,
            absmax=self.absmax.to(device),
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.to(device),
            nested_offset=None if self.nested_offset is None else self.nested_offset.to(device),
        )
