"""16-bit embeddings and heads in a model that computes in float32: cast at each use, never stored twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onecard.kernels import elementwise

SLICE_ROWS = 4096


class Head(nn.Linear):
    """The output head. It casts a narrower weight to x's dtype, one slice of outputs at a time. For few rows of x
    (decoding) it uses a product that reads the weight once."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not learning and elementwise.has_dense_product(x, self.weight):
            y = elementwise.dense_product(x, self.weight)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        return project(x, self.weight, self.bias)


def project(x: Tensor, W_NK: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias in x's dtype. A W of another dtype is cast, `SLICE_ROWS` rows at a time."""
    if elementwise.has_tiles(x, W_NK):
        return elementwise.tiled_product(x, W_NK, bias)
    if W_NK.dtype == x.dtype:
        return nn.functional.linear(x, W_NK, None if bias is None else bias.to(x.dtype))
    y = torch.cat([x @ part.to(x.dtype).T for part in W_NK.split(SLICE_ROWS)], dim=-1)
    return y if bias is None else y + bias.to(x.dtype)


def project_back(g: Tensor, W_NK: Tensor) -> Tensor:
    """Return g W in g's dtype: the gradient of `project` with respect to x."""
    if elementwise.has_tiles(g, W_NK):
        return elementwise.tiled_product_back(g, W_NK)
    if W_NK.dtype == g.dtype:
        return g @ W_NK
    pairs = zip(g.split(SLICE_ROWS, dim=-1), W_NK.split(SLICE_ROWS))
    return sum((columns @ part.to(g.dtype) for columns, part in pairs), g.new_zeros(()))


def cast_output(dtype: torch.dtype):
    """Return a forward hook that casts an embedding's output to `dtype`."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.to(dtype)

    return hook
