"""Scales of blocks of weights, by weighted least squares over the codes of several candidates.

    signed    x ~ s q,        q in [-n, n - 1]         affine    x ~ s q - m,    q in [0, n],  s, m >= 0

The error is nonlinear in s, since q follows from s by rounding. For fixed codes it is quadratic, and the best s (and m)
has a closed form. So we round with some scales around the one that the largest weight fills, solve for the best s of
each, and keep the one of the least weighted error. llama.cpp searches in the same way. With weights w:

    signed    s = (w x q) / (w q q)                    error = (w x x) - (w x q)^2 / (w q q)
    affine    the same with a second unknown: 2 x 2 normal equations

Tensors are (..., L, S): L weights of a block, S blocks. The blocks are last, so that sums over a block add whole
vectors. All in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CANDIDATES = 11


def weights_of(x: Tensor, importance: Tensor | None) -> Tensor:
    """Return the weight of each error, sqrt(2 mean(x^2) + x^2) times the importance of its input.

    Large weights of a block matter more than small ones, but not by much. The mean is over all groups of a block.

    Args:
        x, importance: (G, L, S).
    """
    square = x.square()
    mean = square.mean((0, 1), keepdim=True)
    w = square.add_(mean, alpha=2.0).sqrt_()
    return w if importance is None else w.mul_(importance)


def signed_scales(
    x: Tensor, w: Tensor, n: int, round: Callable[[Tensor], Tensor], places: Tensor | None = None
) -> Tensor:
    """Return a scale for each block, (..., S). It is negative where the weight of the largest magnitude is positive, so
    that this one may get the code -n, unless `places` are of both signs.

    Args:
        n: the largest magnitude of a code; -n is one.
        round: rounds numbers to codes, in place.
        places: the number that the weight of the largest magnitude becomes with each candidate, times -1. None: from
            n / 6 within to half a code beyond n.
    """
    peak = -largest(x, -2)
    inverse, scale, most = reciprocal(peak), peak / n, torch.zeros_like(peak)
    wx, q, product = w * x, torch.empty_like(x), torch.empty_like(x)
    for place in (n + torch.linspace(-n / 6, 0.5, CANDIDATES) if places is None else places).tolist():
        q = round(torch.mul(x, (inverse * place).unsqueeze(-2), out=q))
        xq = torch.mul(wx, q, out=product).sum(-2)
        qq = q.square_().mul_(w).sum(-2)
        gain = xq * xq / qq
        better = gain > most
        scale, most = torch.where(better, xq / qq, scale), torch.where(better, gain, most)
    return scale


def affine_scales(x: Tensor, w: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return s and m of each block, (..., S)."""
    low = x.amin(-2).clamp_(max=0)
    span = x.amax(-2) - low
    inverse, above, wx = reciprocal(span), x - low.unsqueeze(-2), w * x
    scale, least, most = span / n, -low, torch.full_like(low, -torch.inf)
    sw, sx = w.sum(-2), wx.sum(-2)
    q, product = torch.empty_like(x), torch.empty_like(x)
    for end in torch.linspace(-2.0, 0.5, CANDIDATES).tolist():
        torch.mul(above, (inverse * (n + end)).unsqueeze(-2), out=q).round_().clamp_(0, n)
        xq = torch.mul(wx, q, out=product).sum(-2)
        sq = torch.mul(w, q, out=product).sum(-2)
        qq = q.mul_(product).sum(-2)
        det = sw * qq - sq * sq
        shift = (qq * sx - sq * xq) / det
        slope = torch.where(shift > 0, xq / qq, (sw * xq - sq * sx) / det)
        shift = shift.clamp_(max=0)
        gain = slope * xq + shift * sx
        better = (gain > most) & (det > 0)
        scale, least = torch.where(better, slope, scale), torch.where(better, -shift, least)
        most = torch.where(better, gain, most)
    return scale, least


def largest(x: Tensor, dim: int) -> Tensor:
    """Return the number of the largest magnitude, with its sign."""
    high, low = x.amax(dim), x.amin(dim)
    return torch.where(high >= -low, high, low)


def reciprocal(x: Tensor) -> Tensor:
    """Return 1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1 / x)
