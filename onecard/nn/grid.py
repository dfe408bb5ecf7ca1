"""A linear with the weight that a file in few bits will have: training for the format that is served.

    y = x Q(W + s B A)^T + bias        W = dequantize(packed, scales)

Q rounds to the checkpoint's dtype and then to the file's grid, with the functions that the exports use (quant/). Its
gradient is taken as 1 (straight-through: Bengio et al. 2013, arXiv 1308.3432). With g = dL/dy,

    dx = g Q(W + s B A)        dA = s (g B)^T x        dB = s g^T (x A^T)

so A and B have LoRA's gradients, at outputs that the rounding has changed. Q(W + s B A) exists only inside the forward
and the backward. A merge computes the same sums over the same rows, so that its float32 bits are the same on a CPU.

Shape suffixes: M rows of x, N outputs, K inputs, R the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.config import TrainFor
from onecard.kernels import dequantize as weights
from onecard.kernels import ops
from onecard.kernels.cpu_info import product_dtype
from onecard.kernels.reference import Lora
from onecard.quant import nvfp4, q4_0
from onecard.quant.grouped import round_to_nearest
from onecard.quant.scales import state_absmax
from onecard.quant.state import PackedWeight

SLAB_VALUES = 1 << 22  # weights whose merge is in float32 at a time
ROUNDING_BYTES = 64  # temporaries of a weight while it is rounded
# Weights that are rounded at a time: on a CPU the temporaries stay in a core's cache, on a GPU the launches are few.
PIECE_VALUES = {"cpu": 1 << 16, "cuda": 1 << 20}


@dataclass(frozen=True)
class Grid:
    """The values that a format's file can hold of a linear's merged weight.

    Attributes:
        dtype: the checkpoint's, to which a merge rounds first.
        group_size: of gptq.
        blocksize, double_quant: of nf4.
    """

    format: TrainFor
    dtype: torch.dtype
    group_size: int
    blocksize: int
    double_quant: bool

    @torch.no_grad()
    def merged(self, weight: PackedWeight, lora: Lora, peak: float, dtype: torch.dtype) -> Tensor:
        """Return Q(W + s B A), (N, K), in a new tensor of `dtype`.

        Args:
            peak: the largest magnitude of the merged weights that share a scale; of nvfp4.
        """
        N, K = weight.shape
        if self.format == "nf4":
            W_NK = torch.empty(N, K, dtype=self.dtype, device=weight.codes.device)
            for start, rows in merged_rows(weight, lora):
                W_NK[start : start + len(rows)] = rows
            packed, state = ops.quantize_4bit(W_NK, "nf4", self.blocksize, self.double_quant)
            del W_NK
            return weights.dequantize(PackedWeight.of(packed, state), dtype)
        out_NK = torch.empty(N, K, dtype=dtype, device=weight.codes.device)
        count = piece_rows(K, out_NK.device.type)
        for start, rows in merged_rows(weight, lora):
            pieces = rows.split(count)
            for piece, out in zip(pieces, out_NK[start : start + len(rows)].split(len(pieces[0]))):
                out.copy_(self.nearest(piece.to(self.dtype).float(), peak))
        return out_NK

    def nearest(self, W_NK: Tensor, peak: float) -> Tensor:
        """Round float32 rows to the grid."""
        if self.format == "q4_0":
            return q4_0.dequantize_q4_0(*q4_0.quantize_q4_0(W_NK))
        if self.format == "gptq":
            return round_to_nearest(W_NK, self.group_size, sym=True).dequantize()
        return nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(W_NK, peak))

    @torch.no_grad()
    def peak(self, weight: PackedWeight, lora: Lora) -> float:
        """Return the largest magnitude of W + s B A, rounded to the checkpoint's dtype."""
        return max(rows.to(self.dtype).abs().max().item() for _, rows in merged_rows(weight, lora))


def merged_bytes(format: TrainFor, shape: Sequence[int], itemsize: int, device: str) -> int:
    """Return the most bytes of a merged weight (N, K) and its temporaries on a device, "cpu" or "cuda"; `itemsize`: of
    the compute dtype."""
    N, K = shape
    slab, piece = min(N, slab_rows(K)) * K, min(N, piece_rows(K, device)) * K
    if format == "nf4":  # the merged weight in 16 bits, and its codes with their scales
        return (itemsize * 2 + 5) * N * K // 2 + 8 * slab
    return itemsize * N * K + 8 * slab + ROUNDING_BYTES * piece


def slab_rows(K: int) -> int:
    """Return how many rows of K weights are merged at a time."""
    return max(SLAB_VALUES // K, 1)


def piece_rows(K: int, device: str) -> int:
    """Return how many rows of K weights are rounded at a time."""
    return max(PIECE_VALUES[device] // K, 1)


def add_update(W_NK: Tensor, A_RK: Tensor, B_NR: Tensor, scaling: float) -> Tensor:
    """Return W + s B A of float32 tensors."""
    return (B_NR @ A_RK).mul_(scaling).add_(W_NK)


def merged_rows(weight: PackedWeight, lora: Lora) -> Iterator[tuple[int, Tensor]]:
    """Yield W + s B A in float32: the number of the first row, and some rows."""
    N, K = weight.shape
    absmax, A_RK, B_NR = state_absmax(weight), lora.A_RK.float(), lora.B_NR.float()
    for start in range(0, N, slab_rows(K)):
        count = min(slab_rows(K), N - start)
        W_NK = weights.dequantize_part(weight, absmax, start * K, count * K).view(-1, K)
        yield start, add_update(W_NK, A_RK, B_NR[start : start + count], lora.scaling)


class MergedLinear(torch.autograd.Function):
    """The product of `merged_linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, A_RK: Tensor, B_NR: Tensor, *rest: Any) -> Tensor:
        *fields, scaling, grid, peak = rest
        weight, lora = PackedWeight(*fields), Lora(A_RK, B_NR, scaling)
        N, K = weight.shape
        work, save = product_dtype(x.dtype, x.device.type), weights.saving()
        x_MK, W_NK = x.reshape(-1, K).to(work), grid.merged(weight, lora, peak, work)
        y_MN = x_MK @ W_NK.T
        if bias is not None:
            y_MN += bias.to(y_MN.dtype)
        kept = {weights.SAVE_COPY: W_NK, weights.SAVE_SHAPE: weights.shape_of(W_NK)}.get(save, W_NK.new_empty(0))
        ctx.save_for_backward(*weight[:4], x, A_RK, B_NR, kept)
        ctx.meaning, ctx.how = weight[4:], (scaling, grid, peak)
        return y_MN.resize_(*x.shape[:-1], N).to(x.dtype)  # not a view: some models add to it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *tensors, x, A_RK, B_NR, W_NK = ctx.saved_tensors
        weight, (scaling, grid, peak) = PackedWeight(*tensors, *ctx.meaning), ctx.how
        N, K = weight.shape
        lora, work = Lora(A_RK, B_NR, scaling), product_dtype(x.dtype, x.device.type)
        g_MN, x_MK = grads[0].reshape(-1, N).to(work), x.reshape(-1, K).to(work)
        needs_x, _, needs_A, needs_B = ctx.needs_input_grad[:4]

        def merged() -> Any:
            return nullcontext(W_NK if W_NK.numel() else grid.merged(weight, lora, peak, work))

        needed = [needs_x, False, needs_A, needs_B]
        xA_MR = x_MK @ A_RK.to(work).T
        grad_x, _, grad_A, grad_B = ops.plain_backward(g_MN, merged, lora, x_MK, xA_MR, needed, True)
        grad_x = None if grad_x is None else grad_x.view(x.shape).to(x.dtype)
        grad_A, grad_B = (None if grad is None else grad.to(A_RK.dtype) for grad in (grad_A, grad_B))
        return (grad_x, None, grad_A, grad_B, *[None] * 10)


def merged_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, lora: Lora, grid: Grid, peak: float = 0.0
) -> Tensor:
    """Compute a linear with the weight that a file will have.

    Args:
        x: (..., K) in the compute dtype; y is (..., N) in the same.
        weight: the frozen 4-bit weight of shape (N, K).
        bias: (N,), any float dtype, or None; frozen.
        lora: the adapter, float32.
        peak: same as in `Grid.merged`.
    """
    return MergedLinear.apply(x, bias, lora.A_RK, lora.B_NR, *weight, lora.scaling, grid, peak)  # type: ignore
