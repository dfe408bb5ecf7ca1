"""Weights as blocks of GGUF's quantized types: codes and scales, and their bytes.

    Q6_K, Q3_K      256 weights: 16 groups of 16,  x ~ (d c) q,            c of 8 or 6 bits, signed
    Q5_K, Q4_K      256 weights:  8 groups of 32,  x ~ (d c) q - dmin b,   c and b of 6 bits
    IQ4_NL          32 weights,                    x ~ d v[q],             v a table of 16 values
    Q4_0, Q5_0      32 weights,                    x ~ d q
    Q4_1, Q5_1      32 weights,                    x ~ d q + m

d, dmin and m are F16. A group's scale is found first (scales.py) and rounded to c with the d that the largest scale
needs. Then the codes follow, and with them d and dmin are solved for once more, by least squares over the whole block.
The codes are those of the final scales. The layouts of bytes are ggml's (ggml-common.h), which the gguf package's
dequantizers read. That package itself quantizes the types with blocks of 32, except IQ4_NL, unless there is an
importance matrix; Q4_0 without one is quant/q4_0.py, with the package's bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from onecard.export.calibrated.layers import Workers
from onecard.export.gguf.scales import affine_scales, largest, reciprocal, signed_scales, weights_of
from onecard.quant.mxfp4 import encode_mxfp4
from onecard.quant.q4_0 import quantize_q4_0

CHUNK = 1 << 16  # weights that one task quantizes: its tensors stay in a core's cache
TABLE = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0])  # IQ4_NL's values
MIDDLES = (TABLE[1:] + TABLE[:-1]) / 2  # all multiples of 0.5
LOOKUP = torch.bucketize(torch.arange(-256, 256) / 2 + 0.25, MIDDLES)  # by floor(2 x) + 256: the nearest value's index
# A block's largest weight becomes one of these: from the third value to half a gap beyond the first, with both signs.
PLACES = torch.outer(torch.tensor([1.0, -1.0]), torch.linspace(87.0, 138.5, 11)).flatten()
LOOKUP_CODES, LOOKUP_VALUES = LOOKUP.float().numpy(), TABLE[LOOKUP].numpy()


@dataclass(frozen=True)
class Codes:
    """S blocks of G groups of L weights: x = d scales codes - dmin mins, or without the second term.

    Attributes:
        codes: (G, L, S), float32 integers; for IQ4_NL the indices of its values.
        d, dmin: (S,), F16. scales, mins: (G, S), float32 integers.
    """

    codes: Tensor
    d: Tensor
    scales: Tensor
    dmin: Tensor | None = None
    mins: Tensor | None = None


def quantize(W: Tensor, kind: Kind, importance: Tensor | None = None) -> np.ndarray:
    """Return the bytes of some rows, (nbytes,) uint8.

    Args:
        W: (N, K), K a multiple of the type's block; finite.
        importance: of each input, (K,) float32, not negative.
    """
    if kind == Kind.Q4_0 and importance is None:  # as training for the file rounds it (quant/q4_0.py)
        return pack_q4_0(*quantize_q4_0(W.float())).reshape(-1)
    if kind == Kind.MXFP4:  # values that are MXFP4's stay as they are
        return pack_mxfp4(*encode_mxfp4(W.float().reshape(-1))).reshape(-1)
    if kind not in LAYOUTS or (importance is None and kind not in OURS):
        return gguf.quantize(W.float().numpy(), kind).reshape(-1)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = W.float().reshape(-1, size)
    if importance is not None:
        importance = importance.reshape(1, -1).expand(len(W), -1).reshape(-1, size)
    out = np.empty((len(blocks), nbytes), np.uint8)
    step = CHUNK // size

    def task(first: int) -> None:
        some = slice(first, first + step)
        found = codes_of(blocks[some], kind, None if importance is None else importance[some])
        out[some] = LAYOUTS[kind].pack(found)

    Workers(W.device).map(task, range(0, len(blocks), step))
    return out.reshape(-1)


def codes_of(blocks: Tensor, kind: Kind, importance: Tensor | None = None) -> Codes:
    """Return codes and scales of blocks, (S, G L) float32; `importance` has the same shape."""
    layout = LAYOUTS[kind]
    shape = (layout.groups, -1, len(blocks))
    x = blocks.T.reshape(shape).contiguous()
    return layout.quantize(x, weights_of(x, None if importance is None else importance.T.reshape(shape)))


def signed(x: Tensor, w: Tensor, n: int, steps: int) -> Codes:
    """Return codes in [-n, n - 1], and scales of groups in [-steps, steps - 1].

    Args:
        x, w: (G, L, S): weights, and those of their errors.
    """
    scale = signed_scales(x, w, n, partial(signed_round, n=n))
    d = half(largest(scale, 0) / -steps)
    c = (scale * reciprocal(d)).round_().clamp_(-steps, steps - 1)
    q = signed_round(x * reciprocal(d * c).unsqueeze(1), n)
    unit = q * c.unsqueeze(1)
    uu = (w * unit * unit).sum((0, 1))
    d = torch.where(uu > 0, half((w * unit * x).sum((0, 1)) / uu), d)
    return Codes(signed_round(x * reciprocal(d * c).unsqueeze(1), n), d, c)


def affine(x: Tensor, w: Tensor, n: int) -> Codes:
    """Return codes in [0, n], and scales and minima of groups in [0, 63]."""
    scale, least = affine_scales(x, w, n)
    d, dmin = half(scale.amax(0) / 63), half(least.amax(0) / 63)
    c, b = ((y * reciprocal(unit)).round_().clamp_(0, 63) for y, unit in ((scale, d), (least, dmin)))
    q = affine_round(x, d * c, dmin * b, n)
    unit, other = q * c.unsqueeze(1), -b.unsqueeze(1).expand_as(q)
    products = ((unit, unit), (unit, other), (other, other), (unit, x), (other, x))
    uu, uo, oo, ux, ox = ((w * one * two).sum((0, 1)) for one, two in products)
    det = uu * oo - uo * uo
    better_d, better_dmin = half((ux * oo - ox * uo) / det), half((ox * uu - ux * uo) / det)
    fine = (det > 1e-6 * uu * oo) & (better_d > 0) & (better_dmin >= 0)
    alone = half((ux - dmin * uo) / uu)  # the best d with dmin as it is
    d = torch.where(fine, better_d, torch.where(alone > 0, alone, d))
    dmin = torch.where(fine, better_dmin, dmin)
    return Codes(affine_round(x, d * c, dmin * b, n), d, c, dmin, b)


def signed_32(x: Tensor, w: Tensor, n: int) -> Codes:
    """Return codes in [-n, n - 1] of blocks with one scale each."""
    d = half(signed_scales(x, w, n, partial(signed_round, n=n))[0])
    return Codes(signed_round(x * reciprocal(d), n), d, torch.ones(1, len(d)))


def affine_32(x: Tensor, w: Tensor, n: int) -> Codes:
    """Return codes in [0, n] of blocks with one scale and one minimum each."""
    scale, least = (half(y[0]) for y in affine_scales(x, w, n))
    ones = torch.ones(1, len(scale))
    return Codes(affine_round(x, scale[None], least[None], n), scale, ones, least, ones)


def nonlinear(x: Tensor, w: Tensor) -> Codes:
    """Return the indices of IQ4_NL's values."""
    d = half(signed_scales(x, w, 127, partial(look_up, table=LOOKUP_VALUES), PLACES)[0])
    return Codes(look_up(x * reciprocal(d), LOOKUP_CODES), d, torch.ones(1, len(d)))


def signed_round(x: Tensor, n: int) -> Tensor:
    return x.round_().clamp_(-n, n - 1)


def affine_round(x: Tensor, scale: Tensor, least: Tensor, n: int) -> Tensor:
    """Return (x + least) / scale as codes in [0, n]. scale, least: (G, S)."""
    return (x + least.unsqueeze(1)).mul_(reciprocal(scale).unsqueeze(1)).round_().clamp_(0, n)


def look_up(x: Tensor, table: np.ndarray) -> Tensor:
    """Replace numbers by the entries of the nearest value's index, in place. A tie goes to the larger value."""
    place = x.mul_(2).floor_().add_(256).clamp_(0, 511).numpy().astype(np.intp)
    np.take(table, place, out=x.numpy(), mode="clip")
    return x


def half(x: Tensor) -> Tensor:
    """Return float32 numbers rounded to F16."""
    return x.half().float()


# Bytes


def rows(x: Tensor, *shape: int) -> np.ndarray:
    """Return integers of blocks as bytes, (S, *shape); x: (..., S)."""
    return x.reshape(-1, x.shape[-1]).T.to(torch.int16).contiguous().numpy().astype(np.uint8).reshape(-1, *shape)


def floats(x: Tensor | None) -> np.ndarray:
    """Return F16 numbers of blocks as bytes, (S, 2)."""
    assert x is not None
    return x.half().numpy().view(np.uint8).reshape(-1, 2)


def join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def merge_bits(q: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Return bytes whose lowest `bits` come from the first index of an axis, the next from the second, and so on."""
    shifts = np.arange(q.shape[axis], dtype=np.uint8) * np.uint8(bits)
    shape = [1] * q.ndim
    shape[axis] = -1
    return np.bitwise_or.reduce(q << shifts.reshape(shape), axis=axis)


def pack_q6_k(found: Codes) -> np.ndarray:
    q = rows(found.codes + 32, 2, 4, 32)
    low = merge_bits((q & 15).reshape(-1, 2, 2, 64), 4, 2)
    return join(low, merge_bits(q >> 4, 2, 2), rows(found.scales, 16), floats(found.d))


def pack_q3_k(found: Codes) -> np.ndarray:
    q, c = rows(found.codes + 4, 2, 4, 32), rows(found.scales + 32, 16)
    high = merge_bits((q >> 2).reshape(-1, 8, 32), 1, 1)
    low = merge_bits((c & 15).reshape(-1, 2, 8), 4, 1)
    return join(high, merge_bits(q & 3, 2, 2), low, merge_bits((c >> 4).reshape(-1, 4, 4), 2, 1), floats(found.d))


def pack_scales(found: Codes) -> np.ndarray:
    """Return the scales and minima of Q4_K and Q5_K, (S, 12): 4 of 6 bits each, whose bytes' other 2 bits have the high
    ones of the last 4; then the low 4 bits of the last 4."""
    assert found.mins is not None
    c, b = rows(found.scales, 2, 4), rows(found.mins, 2, 4)
    first = [x[:, 0] | (x[:, 1] >> 4 << 6) for x in (c, b)]
    return join(*first, (c[:, 1] & 15) | (b[:, 1] << 4))


def pack_q4_k(found: Codes) -> np.ndarray:
    q = rows(found.codes, 4, 2, 32)
    return join(floats(found.d), floats(found.dmin), pack_scales(found), merge_bits(q, 4, 2))


def pack_q5_k(found: Codes) -> np.ndarray:
    q = rows(found.codes, 8, 32)
    high, low = merge_bits(q >> 4, 1, 1), merge_bits((q & 15).reshape(-1, 4, 2, 32), 4, 2)
    return join(floats(found.d), floats(found.dmin), pack_scales(found), high, low)


def pack_32(found: Codes, lowest: int = 0, is_5_bit: bool = False) -> np.ndarray:
    """Pack a block of 32: d, the minimum if there is one, the fifth bits, and the lower four of two halves."""
    q = rows(found.codes - lowest, 32)
    low = merge_bits((q & 15).reshape(-1, 2, 16), 4, 1)
    least = [] if found.dmin is None else [floats(-found.dmin)]
    high = [np.packbits(q >> 4, axis=1, bitorder="little")] if is_5_bit else []
    return join(floats(found.d), *least, *high, low)


def pack_q4_0(codes: Tensor, d: Tensor) -> np.ndarray:
    """Pack codes and scales of quant/q4_0.py."""
    return join(d.reshape(-1, 1).numpy().view(np.uint8), merge_bits(codes.numpy().reshape(-1, 2, 16), 4, 1))


def pack_mxfp4(codes: Tensor, exponents: Tensor) -> np.ndarray:
    """Pack codes and exponents of quant/mxfp4.py."""
    return join(exponents.reshape(-1, 1).numpy(), merge_bits(codes.numpy().reshape(-1, 2, 16), 4, 1))


@dataclass(frozen=True)
class Layout:
    """A type: how many groups a block has, how it is quantized, (x, w) to codes, and packed, codes to (S, nbytes)."""

    groups: int
    quantize: Callable[[Tensor, Tensor], Codes]
    pack: Callable[[Codes], np.ndarray]


LAYOUTS = {
    Kind.Q6_K: Layout(16, partial(signed, n=32, steps=128), pack_q6_k),
    Kind.Q3_K: Layout(16, partial(signed, n=4, steps=32), pack_q3_k),
    Kind.Q5_K: Layout(8, partial(affine, n=31), pack_q5_k),
    Kind.Q4_K: Layout(8, partial(affine, n=15), pack_q4_k),
    Kind.IQ4_NL: Layout(1, nonlinear, pack_32),
    Kind.Q4_0: Layout(1, partial(signed_32, n=8), partial(pack_32, lowest=-8)),
    Kind.Q5_0: Layout(1, partial(signed_32, n=16), partial(pack_32, lowest=-16, is_5_bit=True)),
    Kind.Q4_1: Layout(1, partial(affine_32, n=15), pack_32),
    Kind.Q5_1: Layout(1, partial(affine_32, n=31), partial(pack_32, is_5_bit=True)),
}
OURS = (Kind.Q6_K, Kind.Q3_K, Kind.Q5_K, Kind.Q4_K, Kind.IQ4_NL)  # those that the gguf package does not quantize
