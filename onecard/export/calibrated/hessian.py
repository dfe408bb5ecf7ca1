"""The Hessian of a linear's squared output error, H = sum of x x^T over the inputs x: accumulated and factored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onecard.errors import UserError

SLAB = 512  # columns of H that one task computes


class Inputs:
    """Statistics of an input that linears share, over all tokens: H = sum of x x^T, the sum of x^2 and the mean |x|;
    float32.

    Attributes:
        names: names of the linears within their layer. The first one's input is recorded.
        norm: name within the layer of the norm whose output the input is; "" if there is none, or if stacked experts
            have the same input.
    """

    def __init__(self, name: str, norm: str, K: int, device: torch.device, with_H: bool = True):
        """Without `with_H`, H_KK is (0, 0)."""
        self.names, self.norm, self.with_H = [name], norm, with_H
        self.H_KK = torch.zeros(K if with_H else 0, K if with_H else 0, device=device)
        self.sum_K, self.square_K = torch.zeros(2, K, device=device)
        self.num_tokens = 0

    @property
    def mean_K(self) -> Tensor:
        return self.sum_K / max(self.num_tokens, 1)

    def tasks(self, inputs: list[Tensor]) -> list[Callable[[], None]]:
        """Return tasks that add the inputs of some rows, (..., K): to H's lower triangle, a slab of columns each."""
        x_TK = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).float()
        self.num_tokens += len(x_TK)
        return [partial(self.add, x_TK, start) for start in range(0, len(self.sum_K), SLAB)]

    def add(self, x_TK: Tensor, start: int) -> None:
        slab = x_TK[:, start : start + SLAB]
        if self.with_H:
            self.H_KK[start:, start : start + SLAB].addmm_(x_TK[:, start:].T, slab)
        self.square_K[start : start + SLAB] += slab.square().sum(0)
        self.sum_K[start : start + SLAB] += slab.abs().sum(0)

    def finish(self) -> None:
        """Copy H's lower triangle to the upper one."""
        for start in range(SLAB, len(self.H_KK), SLAB):
            self.H_KK[:start, start : start + SLAB] = self.H_KK[start : start + SLAB, :start].T


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices in bfloat16 with float32 sums. For values that are bfloat16's the products
    are exact, and come in half of the time on a CPU that multiplies bfloat16."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def damped_cholesky(H_KK: Tensor, damp_percent: float) -> Tensor:
    """Return the lower L with L L^T = H + damping, a share of H's mean on the diagonal. Overwrites H. An input that is
    always 0 affects no other.

    Raises:
        UserError: H is not finite.
    """
    diagonal = H_KK.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise UserError("activations must be finite", "NaN or Inf", "check the checkpoint", "calibration")
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    for _ in range(4):  # float32 may need more damping than requested
        diagonal += damp_percent * mean
        L, failed = torch.linalg.cholesky_ex(H_KK)
        if not failed:
            return L
        damp_percent *= 10
    raise UserError("activations must make a regular Hessian", "none", "use more rows, or other ones", "data")
