"""16-bit embeddings and heads in a model that computes in float32: cast at each use, never stored twice.

NewRows are rows of tokens that an adapter has beside the model's matrix: in place of rows that it has, or behind them.

Shape suffixes: P positions, V vocabulary of the model, N new rows, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def device_of(model: Any) -> torch.device:
    """Return the device of a model's embedding. An adapter's wrapper around it makes its whole weight on each look."""
    embedding = model.get_input_embeddings()
    return getattr(embedding, "original_module", embedding).weight.device


@dataclass(frozen=True, eq=False)
class NewRows:
    """Trained rows of a head, whose own matrix stays as it is.

    Attributes:
        rows_NH: float32.
        index_N: int64, the token of each. Those from V on follow V without a gap.
        low: those of index_N below V, whose own rows do not take part.
        num_beyond: how many are not below V.
        dtype: to which the rows are rounded before each use, the matrix's own.
    """

    rows_NH: Tensor
    index_N: Tensor
    low: Tensor
    num_beyond: int
    dtype: torch.dtype

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """Return the rows in `dtype`, with the values that a merge writes."""
        return self.rows_NH.to(self.dtype).to(dtype)

    def extend(self, z_PV: Tensor, x_PH: Tensor) -> Tensor:
        """Return the logits with those of the new rows, (P, V + num_beyond). It may overwrite `z_PV`."""
        if self.num_beyond:
            z_PV = torch.cat([z_PV, z_PV.new_empty(*z_PV.shape[:-1], self.num_beyond)], -1)
        return z_PV.index_copy_(-1, self.index_N, x_PH @ self.rounded(x_PH.dtype).T)

    def split_(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parts of a gradient of `extend`'s result: (P, V) of the matrix, and (P, N). It overwrites `g`."""
        g_PN = g.index_select(-1, self.index_N)
        g_PV = g[:, : g.shape[1] - self.num_beyond].contiguous()
        return (g_PV.index_fill_(-1, self.low, 0) if len(self.low) else g_PV), g_PN
