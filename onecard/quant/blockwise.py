"""Blockwise 4-bit quantization: one float32 scale (absmax) for each `blocksize` consecutive weights.

    code[i] = argmin_c |w[i] / absmax[i // blocksize] - quant_map[c]|,    w_hat[i] = quant_map[code[i]] * absmax

Weights of any shape are read in memory order. Two codes share a byte, the first in the high nibble. The float32
operations have bitsandbytes' order, so that codes and scales are bit-identical to its own: a full block is multiplied
by 1/absmax, a short last block is divided by absmax. The functions process a weight in slabs, so that the extra memory
is a few MiB for any size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.config import BLOCKSIZES, MXFP4_STORAGE, QUANT_TYPES
from onecard.errors import UserError
from onecard.quant.codebook import decision_bounds, quant_map
from onecard.quant.mxfp4 import BLOCKSIZE as MXFP4_BLOCKSIZE
from onecard.quant.mxfp4 import encode_mxfp4
from onecard.quant.nested import quantize_absmax
from onecard.quant.scales import SHIFTED, state_absmax
from onecard.quant.state import QuantState

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLAB = 1 << 18  # weights in a slab; a multiple of every blocksize
SMALLEST_ABSMAX = 1e-38


def quantize_4bit(
    W: Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    name: str = "tensor",
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor of any shape to 4 bits a weight.

    Args:
        W: float32, bfloat16 or float16, any shape with at least one element, every element finite.
        quant_type: "nf4", "fp4", "int4" or "mxfp4".
        blocksize: weights that share a scale: a power of two from 32 to 4096; 32 for mxfp4.
        double_quant: store the scales in 8 bits (see nested.py); False for mxfp4.
        name: the tensor's name in an error.

    Returns:
        The codes, uint8 (ceil(numel/2), 1), and the QuantState that dequantize_4bit needs.

    Raises:
        UserError: an unknown quant_type or blocksize, another dtype, an empty tensor, NaN or Inf (with its index).
    """
    check_quantizable(W, quant_type, blocksize, double_quant, name)
    if quant_type == "mxfp4":
        return quantize_mxfp4(W, name)
    packed, absmax = quantize_blocks(W, quant_type, blocksize, name)
    return packed, make_state(absmax, W.shape, W.dtype, quant_type, blocksize, double_quant)


def dequantize_4bit(packed: Tensor, state: QuantState) -> Tensor:
    """Dequantize a weight to state.shape and state.dtype. Each product is in float32 and is rounded once."""
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    absmax = state_absmax(state)
    dequantize_blocks(packed, absmax, state.quant_type, state.blocksize, out)
    return out


def check_quantizable(W: Tensor, quant_type: str, blocksize: int, double_quant: bool, name: str) -> None:
    """Raise UserError unless W can be quantized with these settings. `quantize_blocks` finds NaN and Inf."""
    storage = {"blocksize": blocksize, "double_quant": double_quant}
    fits = quant_type != "mxfp4" or storage == MXFP4_STORAGE
    checks = (
        (quant_type in QUANT_TYPES, f"quant_type must be one of {QUANT_TYPES}", repr(quant_type)),
        (blocksize in BLOCKSIZES, f"blocksize must be one of {BLOCKSIZES}", repr(blocksize)),
        (fits, "mxfp4 has blocks of 32 and no double quantization", str(storage)),
        (W.dtype in DTYPES, "a weight must be float32, bfloat16 or float16", str(W.dtype)),
        (W.numel() > 0, "a weight must have elements", f"shape {tuple(W.shape)}"),
    )
    for holds, must, found in checks:
        if not holds:
            raise UserError(must, found, "pass a supported value", name)


def check_stack(shape: torch.Size, blocksize: int, name: str) -> int:
    """Return the number of weights of a part of a stack. Raises UserError unless a part is whole blocks."""
    numel = shape[1:].numel()
    if numel % blocksize:
        found = f"{numel:,} weights of shape {list(shape[1:])}, blocks of {blocksize}"
        raise UserError("an expert's weights must be whole blocks", found, "use a smaller blocksize", name)
    return numel


def quantize_mxfp4(W: Tensor, name: str) -> tuple[Tensor, QuantState]:
    """Quantize a tensor to MXFP4. Raises UserError for NaN or Inf."""
    flat = W.detach().reshape(-1)
    blocks = -(-flat.numel() // MXFP4_BLOCKSIZE)
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=W.device)
    exponents = torch.empty(blocks, dtype=torch.uint8, device=W.device)
    for start in range(0, flat.numel(), SLAB):
        x = flat[start : start + SLAB].float()
        if not all_finite(x):
            raise not_finite(flat, W.shape, name)
        codes, found = encode_mxfp4(x)
        exponents[start // MXFP4_BLOCKSIZE :][: found.numel()] = found
        slab_packed = pack(codes[: x.numel() + x.numel() % 2])
        packed[start // 2 :][: slab_packed.shape[0]] = slab_packed
    return packed, QuantState(exponents, W.shape, W.dtype, MXFP4_BLOCKSIZE, "mxfp4")


def quantize_blocks(W: Tensor, quant_type: str, blocksize: int, name: str) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8 (ceil(numel/2), 1), and absmax, float32 (ceil(numel/blocksize),)."""
    flat = W.detach().reshape(-1)
    num_weights = flat.numel()
    packed = torch.empty((num_weights + 1) // 2, 1, dtype=torch.uint8, device=W.device)
    absmax = torch.empty(-(-num_weights // blocksize), dtype=torch.float32, device=W.device)
    for start in range(0, num_weights, SLAB):
        x = flat[start : start + SLAB].float()
        slab_absmax, scaled = scale_blocks(x, blocksize)
        if not torch.isfinite(slab_absmax).all():
            raise not_finite(flat, W.shape, name)
        absmax[start // blocksize :][: slab_absmax.numel()] = slab_absmax
        if scaled.numel() % 2:
            scaled = torch.cat([scaled, scaled.new_zeros(1)])  # the spare nibble encodes 0
        slab_packed = pack(nearest_codes(scaled, quant_type))
        packed[start // 2 :][: slab_packed.shape[0]] = slab_packed
    return packed, absmax


def scale_blocks(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return absmax, float32 (ceil(n/blocksize),), and x / absmax in [-1, 1], float32 (n,), of x, float32 (n,)."""
    full = x.numel() - x.numel() % blocksize
    blocks = x[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]).view(-1)
    if full < x.numel():
        tail_absmax = x[full:].abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, x[full:] / tail_absmax])
    return absmax, scaled.clamp_(-1, 1)


def nearest_codes(scaled: Tensor, quant_type: str) -> Tensor:
    """Return the code of the nearest level, uint8 (n,). A tie goes to the lower level."""
    bounds, order = decision_bounds(quant_type, scaled.device)
    interval = torch.bucketize(scaled, bounds, out_int32=True)
    return order.to(torch.uint8)[interval]


def pack(codes: Tensor) -> Tensor:
    """Pack two codes into each byte, the first in the high nibble: uint8 (n,), n even, to (n/2, 1)."""
    return ((codes[::2] << 4) | codes[1::2])[:, None]


def unpack(packed: Tensor, num_weights: int) -> Tensor:
    """Unpack the codes: uint8 (ceil(n/2), 1) to (n,)."""
    return torch.stack([packed.view(-1) >> 4, packed.view(-1) & 0xF], dim=1).view(-1)[:num_weights]


def dequantize_blocks(packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int, out: Tensor) -> None:
    """Dequantize codes and float32 scales into `out`, contiguous and of any float dtype.

    Args:
        absmax: `state_absmax`.
    """
    absmax, shifts = absmax.view(-1, 2).T if quant_type in SHIFTED else (absmax, None)
    levels = quant_map(quant_type, packed.device)
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2): one look-up returns both weights of a byte
    flat = out.view(-1)
    for start in range(0, flat.numel(), SLAB):
        piece = flat[start : start + SLAB]
        num_bytes = (piece.numel() + 1) // 2
        index = packed.view(-1)[start // 2 :][:num_bytes].int()
        values = pairs.index_select(0, index).view(-1)[: piece.numel()]
        blocks = slice(start // blocksize, -(-(start + piece.numel()) // blocksize))
        full = piece.numel() - piece.numel() % blocksize
        num_full = full // blocksize
        values[:full].view(-1, blocksize).mul_(absmax[blocks][:num_full, None])
        values[full:].mul_(absmax[blocks][-1])
        if shifts is not None:
            values[:full].view(-1, blocksize).add_(shifts[blocks][:num_full, None])
            values[full:].add_(shifts[blocks][-1])
        piece.copy_(values)


def make_state(
    absmax: Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    double_quant: bool,
) -> QuantState:
    """Make a QuantState from scales, float32 (num_blocks,); quantize them if `double_quant`."""
    if not double_quant:
        return QuantState(absmax, shape, dtype, blocksize, quant_type)
    codes, nested_absmax, offset = quantize_absmax(absmax)
    return QuantState(codes, shape, dtype, blocksize, quant_type, nested_absmax, offset)


def all_finite(x: Tensor) -> bool:
    """Whether x, of any shape, has no NaN and no Inf. The least and the largest value tell, faster than isfinite."""
    if x.numel() == 0:
        return True
    least, largest = torch.aminmax(x)
    return bool(torch.isfinite(least) & torch.isfinite(largest))


def not_finite(flat: Tensor, shape: torch.Size, name: str) -> UserError:
    """Return the error for NaN or Inf, with the first bad element's index."""
    first = int((~torch.isfinite(flat)).nonzero()[0])
    index, rest = [], first
    for size in reversed(shape):
        index.append(rest % size)
        rest //= size
    return UserError(
        "every weight must be finite",
        f"{flat[first].item()} at index {list(reversed(index))} of shape {list(shape)}",
        "the checkpoint is damaged or its training diverged: fetch it again or use an earlier one",
        name,
    )
