"""Linear4bit: an nn.Linear whose weight is 4-bit codes with a QuantState."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onecard.kernels import ops
from onecard.quant.state import QuantState


class Linear4bit(nn.Linear):
    """y = x W^T + bias with a frozen W stored in 4 bits.

    It is an nn.Linear, so that peft and transformers find it among the linears. `weight` holds the packed codes,
    uint8 (ceil(numel/2), 1), and `quant_state` their scales. x is cast to `compute_dtype` and y back to x's dtype;
    with compute_dtype None the product is in x's dtype. If the weight is paged, `weight` is empty and `fetch` pages
    in its codes and scales.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, compute_dtype: torch.dtype | None, device=None):
        super().__init__(in_features, out_features, bias=bias, device="meta")
        self.weight = nn.Parameter(torch.empty(0, 1, dtype=torch.uint8, device=device), requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False)
        self.compute_dtype = compute_dtype
        self.quant_state: QuantState | None = None
        self.fetch: Callable[[], tuple[Tensor, QuantState]] | None = None

    def set_weight(self, packed: Tensor, state: QuantState) -> None:
        """Set the quantized weight, of shape (out_features, in_features)."""
        assert tuple(state.shape) == (self.out_features, self.in_features), (state.shape, self)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.quant_state = state

    def forward(self, x: Tensor) -> Tensor:
        y = ops.qlora_linear(x.to(self.compute_dtype or x.dtype), *self.stored(), self.bias)
        return y.to(x.dtype)

    def stored(self) -> tuple[Tensor, QuantState]:
        """Return the codes and scales for a product. `fetch` pages a paged weight in."""
        return (self.weight, self.loaded_state) if self.fetch is None else self.fetch()

    @property
    def loaded_state(self) -> QuantState:
        """The QuantState. The weight must be set."""
        assert self.quant_state is not None, "a Linear4bit computes after set_weight"
        return self.quant_state

    def dequantize(self) -> Tensor:
        """Dequantize the weight, (out_features, in_features), to the compute dtype."""
        return ops.dequantize_4bit(*self.stored(), self.compute_dtype)

    @property
    def W_q(self) -> Tensor:
        """The packed codes. peft treats a layer with this attribute as quantized and calls dequantize()."""
        return self.weight

    def _apply(self, fn: Callable, recurse: bool = True) -> Linear4bit:
        # .to(dtype) and .half() must not change the scales; .to(device) must move them.
        super()._apply(fn, recurse)
        if self.quant_state is not None and self.quant_state.absmax.device != self.weight.device:
            self.quant_state = self.quant_state.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        kind = self.quant_state.quant_type if self.quant_state else "no weight yet"
        return f"{super().extra_repr()}, {kind}, compute_dtype={self.compute_dtype}"
