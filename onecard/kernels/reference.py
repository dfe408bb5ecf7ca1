"""The backend for every device that torch has: quant/ itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onecard.quant.blockwise import dequantize_blocks, quantize_blocks
from onecard.quant.dynamic import STATE_BLOCKSIZE, dequantize_8bit, quantize_8bit
from onecard.quant.scales import state_absmax
from onecard.quant.state import PackedWeight

__all__ = ["adamw_8bit_", "cross_entropy_", "dequantize_into", "quantize_blocks"]


class Lora(NamedTuple):
    """A LoRA term s B A: A (R, K) and B (N, R), of one float dtype."""

    A_RK: Tensor
    B_NR: Tensor
    scaling: float


def dequantize_into(weight: PackedWeight, out: Tensor) -> None:
    """Dequantize the weight into `out` (contiguous, any float dtype)."""
    dequantize_blocks(weight.codes, state_absmax(weight), weight.quant_type, weight.blocksize, out)


def cross_entropy_(z_PV: Tensor, target_P: Tensor) -> Tensor:
    """Return the losses logsumexp(z) - z[target], float32 (P,). Replace z with softmax(z) - onehot(target)."""
    z = z_PV.float()
    logsumexp = z.logsumexp(-1)
    row = torch.arange(len(target_P), device=z.device)
    losses_P = logsumexp - z[row, target_P]
    dz = torch.exp(z - logsumexp[:, None])
    dz[row, target_P] -= 1
    z_PV.copy_(dz)
    return losses_P


SLICE = 1 << 18  # elements computed in float32 at a time; a multiple of STATE_BLOCKSIZE


class Rates(NamedTuple):
    """The numbers of one AdamW update, each rounded to float32 where it is used."""

    decay: float  # 1 - lr * weight_decay
    rate: float  # lr / (1 - beta1^step)
    root: float  # (1 - beta2^step)^-1/2
    beta1: float
    rest1: float  # 1 - beta1
    beta2: float
    rest2: float
    eps: float

    @classmethod
    def of(cls, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Rates:
        rate, root = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
        return cls(1 - lr * weight_decay, rate, root, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps)


def adamw_8bit_(parts: list[tuple[Tensor, ...]], rates: Rates) -> None:
    """Update w and its 8-bit states in place with AdamW. Each operation is rounded to float32 once:

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) (g g)
        w = w decay - rate (m / (sqrt(v) root + eps))

    Args:
        parts: one tuple per parameter: w, float32 of any shape; its gradient; and for m and for v the codes,
            uint8 (numel,), and absmax, float32 (ceil(numel / 256),).
    """
    for w, grad, *states in parts:
        w, grad, made = w.view(-1), grad.reshape(-1), []
        for first in range(0, w.numel(), SLICE):
            part = slice(first, min(first + SLICE, w.numel()))
            blocks = slice(first // STATE_BLOCKSIZE, -(-part.stop // STATE_BLOCKSIZE))
            places = [w[part], *(state[blocks if number % 2 else part] for number, state in enumerate(states))]
            made += zip(places, _adamw_slice(grad[part].float(), *places, rates=rates))
        for place, value in made:  # last, so that a failed allocation changes nothing
            place.copy_(value)


def _adamw_slice(
    g: Tensor, w: Tensor, m_codes: Tensor, m_absmax: Tensor, v_codes: Tensor, v_absmax: Tensor, rates: Rates
) -> tuple[Tensor, ...]:
    """Return the new w, and the codes and absmax of m and of v."""
    m, v = dequantize_8bit(m_codes, m_absmax, signed=True), dequantize_8bit(v_codes, v_absmax, signed=False)
    m.mul_(rates.beta1).add_(g * rates.rest1)
    v.mul_(rates.beta2).add_((g * g).mul_(rates.rest2))
    root = v.double().sqrt().float()  # rounded to nearest; torch's float32 sqrt is sometimes off by one bit
    update = (m / root.mul_(rates.root).add_(rates.eps)).mul_(rates.rate)
    return (w * rates.decay).sub_(update), *quantize_8bit(m, True), *quantize_8bit(v, False)
