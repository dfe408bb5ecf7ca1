"""Codes and scales of a 4-bit weight that keep a linear's output close on calibration inputs, in the same format.

With H = sum of x x^T over the inputs x and D = W - W_hat, the squared error of the output is tr(D H D^T).

1. Scales. For each block, the share of its largest weight with the least sum of H_kk D_nk^2, as larger weights can be
   clipped. Then double quantization: from here on, the scales are those that a reader gets.
2. Codes. With H = R^T R, R upper triangular, row n has the error sum over k of (R_kk D_nk + sum over j > k of
   R_kj D_nj)^2. The columns k are rounded from the last to the first, each to the level nearest to

       W_nk + sum over j > k of U_kj D_nj,    U_kj = R_kj / R_kk,

   which compensates the errors so far. It is Babai's nearest plane, the same rounding as GPTQ's (Frantar et al. 2022,
   2210.17323; Chen et al. 2025, 2507.18553), without an inverse. Inputs with the largest H_kk are rounded first.
3. Start. A low-rank B A that corrects what is left, as LoftQ (Li et al. 2023, 2310.08659), but by the error of the
   output: with H = L L^T and D L = U S V^T, it is B A = U S V^T L^-1 of the largest singular values.

Shape suffixes: N outputs and K inputs of a linear, R the rank of the start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from onecard.config import StoredConfig
from onecard.export.calibrated.hessian import damped_cholesky
from onecard.kernels import ops
from onecard.kernels.backend import backend
from onecard.quant.blockwise import all_finite, make_state, not_finite, pack
from onecard.quant.codebook import decision_bounds, quant_map
from onecard.quant.scales import state_absmax
from onecard.quant.state import QuantState

SHARES = torch.tensor([1 - step / 20 for step in range(9)])  # of a block's largest weight: 1.00 ... 0.60
DAMPING = 0.01  # of H's mean diagonal, as in GPTQ
COLUMNS = 256  # that are rounded between two large products
PIECE_ROWS = 1024
SPARE, ITERATIONS = 8, 4  # of the search for singular vectors
ROUNDS = 2  # of codes and low-rank correction


@dataclass
class Factor:
    """H of a linear's inputs with damping, factored: H[order][:, order] = R^T R, R = diag(d) U.

    Attributes:
        order_K: the inputs by ascending H_kk.
        U_KK: upper triangular with a diagonal of ones, float32.
        d_K: R's diagonal, float32.
        weight_K: the `column_weights`.
    """

    order_K: Tensor
    U_KK: Tensor
    d_K: Tensor
    weight_K: Tensor

    @classmethod
    def of(cls, H_KK: Tensor) -> Factor:
        """Factor H, float32 (K, K). Raises UserError, same as `damped_cholesky`."""
        order, weight_K = H_KK.diagonal().argsort(stable=True), column_weights(H_KK.diagonal())
        L_KK = damped_cholesky(H_KK[order[:, None], order], DAMPING)
        d_K = L_KK.diagonal().clone()
        return cls(order, L_KK.div_(d_K).T.contiguous(), d_K, weight_K)

    def times(self, X: Tensor) -> Tensor:
        """Return R X."""
        return self.d_K[:, None] * (self.U_KK @ X)

    def transposed_times(self, X: Tensor) -> Tensor:
        """Return R^T X."""
        return self.U_KK.T @ (self.d_K[:, None] * X)


def column_weights(diagonal_K: Tensor) -> Tensor:
    """Return the weights of the columns' squared errors: H's diagonal with damping, float32 (K,)."""
    mean = diagonal_K.mean()
    return torch.where(diagonal_K == 0, mean, diagonal_K) + torch.where(mean > 0, DAMPING * mean, 1.0)


def row_pieces(N: int, K: int, blocksize: int) -> list[tuple[int, int]]:
    """Return the first and the last row + 1 of each piece of an (N, K) weight. A piece begins with a block."""
    step = 2 * blocksize // gcd(2 * blocksize, K)  # also a whole number of bytes of codes
    step *= -(-PIECE_ROWS // step)
    return [(start, min(start + step, N)) for start in range(0, N, step)]


def choose_scales(W: Tensor, weights: Tensor, quant: StoredConfig, name: str) -> Tensor:
    """Return the scale of each block of a weight, float32 (num_blocks,).

    Args:
        W: float32, in the order in which it is stored. Its first value begins a block.
        weights: those of the squared errors, of a shape that expands to W's.
    """
    size = quant.blocksize
    num_blocks = -(-W.numel() // size)
    values, factors = torch.zeros(2, num_blocks * size, dtype=torch.float32, device=W.device)
    values[: W.numel()], factors[: W.numel()] = W.reshape(-1), weights.expand_as(W).reshape(-1)
    values, factors = values.view(num_blocks, size), factors.view(num_blocks, size)
    if not all_finite(values):
        raise not_finite(W, W.shape, name)
    return backend(W.device).rounding.choose_scales(values, factors, quant.quant_type, SHARES.to(W.device))


def spread(absmax: Tensor, blocksize: int, first: int, count: int) -> Tensor:
    """Return the scale of each of `count` weights from index `first` on, which begins a block: float32 (count,)."""
    return absmax[first // blocksize :][: -(-count // blocksize)].repeat_interleave(blocksize)[:count]


def choose_levels(W_NK: Tensor, scale_NK: Tensor, factor: Factor, levels: Tensor) -> Tensor:
    """Return the number of each weight's level, uint8 (N, K).

    Args:
        W_NK, scale_NK: float32; a scale may be 0.
        levels: ascending, float32.
    """
    order, U_KK = factor.order_K, factor.U_KK
    W_KN, scale_KN = W_NK.T[order], scale_NK.T[order]  # copies: the weights of an input are contiguous
    D_KN, index_KN = torch.empty_like(W_KN), torch.empty_like(W_KN, dtype=torch.uint8)
    round_columns_ = backend(W_NK.device).rounding.round_columns_
    for end in range(len(order), 0, -COLUMNS):
        part = slice(max(end - COLUMNS, 0), end)
        target = torch.addmm(W_KN[part], U_KK[part, end:], D_KN[end:])
        round_columns_(target, W_KN[part], scale_KN[part], U_KK[part, part], levels, D_KN[part], index_KN[part])
    index_NK = torch.empty_like(W_NK, dtype=torch.uint8)
    index_NK[:, order] = index_KN.T
    return index_NK


def choose_codes(W_NK: Tensor, scale_NK: Tensor, factor: Factor, quant_type: str) -> Tensor:
    """Return the code of each weight, uint8 (N, K). A level outside [-1, 1] is no choice, as in quantize_4bit."""
    codes, levels = decision_bounds(quant_type, W_NK.device)[1], quant_map(quant_type, W_NK.device)
    codes = codes[levels[codes].abs() <= 1]
    return codes.to(torch.uint8)[choose_levels(W_NK, scale_NK, factor, levels[codes]).long()]


def packed_values(codes: Tensor) -> Tensor:
    """Pack codes in memory order, uint8 (ceil(numel / 2),)."""
    flat = codes.reshape(-1)
    return pack(torch.cat([flat, flat.new_zeros(flat.numel() % 2)])).view(-1)


def quantize(W_NK: Tensor, factor: Factor, quant: StoredConfig, name: str) -> tuple[Tensor, QuantState]:
    """Quantize a weight, (N, K) in a float dtype. Return its codes and state, same as quantize_4bit."""
    pieces = row_pieces(W_NK.shape[0], W_NK.shape[1], quant.blocksize)
    scales = [choose_scales(W_NK[a:b].float(), factor.weight_K, quant, name) for a, b in pieces]
    state = make_state(torch.cat(scales), W_NK.shape, W_NK.dtype, quant.quant_type, quant.blocksize, quant.double_quant)
    absmax, packed = state_absmax(state), []
    for a, b in pieces:
        W = W_NK[a:b].float()
        scale = spread(absmax, quant.blocksize, a * W.shape[1], W.numel()).view_as(W)
        packed.append(packed_values(choose_codes(W, scale, factor, quant.quant_type)))
    return torch.cat(packed)[:, None], state


def quantize_with_start(
    W_NK: Tensor, factor: Factor, quant: StoredConfig, name: str, rank: int
) -> tuple[Tensor, QuantState, Tensor, Tensor]:
    """Quantize a weight together with a low-rank correction: each is chosen for what the other leaves, twice in turn.

    Returns:
        codes and state, as from `quantize`; A (R, K) and B (N, R), float32. W is close to their W_hat + B A.
    """
    shifted = W_NK
    for _ in range(ROUNDS):
        packed, state = quantize(shifted, factor, quant, name)
        D_NK = W_NK.float() - ops.dequantize_4bit(packed, state).float()
        A_RK, B_NR = low_rank(D_NK, factor, rank)
        shifted = torch.addmm(W_NK.float(), B_NR, A_RK, alpha=-1)
    return packed, replace(state, dtype=W_NK.dtype), A_RK, B_NR


def low_rank(D_NK: Tensor, factor: Factor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (R, K) and B (N, R), float32, of the B A with the least output error of D - B A, float32 (N, K).

    The singular vectors are found by subspace iteration (Halko et al. 2011, 0909.4061, algorithm 4.4). R is the rank,
    or the smaller width if that is less. A's outputs are as large as those of LoRA's usual A, whose values have the
    variance 1 / (3 K), so that the learning rate means the same.
    """
    rank = min(rank, *D_NK.shape)
    D = D_NK[:, factor.order_K]  # D R^T = U S V^T, as H = R^T R
    count = min(rank + SPARE, *D.shape)
    noise = torch.randn(D.shape[1], count, generator=torch.Generator().manual_seed(0))
    V = torch.linalg.qr(noise.to(D.device))[0]
    for _ in range(ITERATIONS):
        U = torch.linalg.qr(D @ factor.transposed_times(V))[0]
        V = torch.linalg.qr(factor.times(D.T @ U))[0]
    U = torch.linalg.qr(D @ factor.transposed_times(V))[0]
    U_small, S, V_small = torch.linalg.svd(factor.times(D.T @ U).T, full_matrices=False)
    B_NR = (U @ U_small)[:, :rank] * S[:rank]
    A = V_small[:rank] / factor.d_K
    A = torch.linalg.solve_triangular(factor.U_KK.T, A, upper=False, left=False, unitriangular=True)
    A_RK = torch.empty_like(A)
    A_RK[:, factor.order_K] = A
    scale = (factor.weight_K.mean() / 3).sqrt()  # each row a of A has a H a^T = 1
    return A_RK * scale, B_NR / scale
