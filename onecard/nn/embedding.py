"""16-bit embeddings and heads under float32 computation: cast where they are used, never stored twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLICE_ROWS = 4096


class CastingHead(nn.Linear):
    """A linear whose 16-bit weight is cast to x's dtype a slice of outputs at a time."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


def project(x: Tensor, W_NK: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in x's dtype; a W of another dtype is cast `SLICE_ROWS` rows at a time."""
    if W_NK.dtype == x.dtype:
        return nn.functional.linear(x, W_NK, None if bias is None else bias.to(x.dtype))
    y = torch.cat([x @ rows.to(x.dtype).T for rows in W_NK.split(SLICE_ROWS)], dim=-1)
    return y if bias is None else y + bias.to(x.dtype)


def project_back(g: Tensor, W_NK: Tensor) -> Tensor:
    """g W in g's dtype, the gradient of `project` with respect to x."""
    if W_NK.dtype == g.dtype:
        return g @ W_NK
    parts = zip(g.split(SLICE_ROWS, dim=-1), W_NK.split(SLICE_ROWS))
    return sum((part @ rows.to(g.dtype) for part, rows in parts), g.new_zeros(()))


def cast_output(dtype: torch.dtype):
    """A forward hook that casts an embedding's output."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.to(dtype)

    return hook
