"""MXFP4 (OCP Microscaling Formats 1.0): E2M1 codes in blocks of 32 with an E8M0 scale, as gpt-oss is released.

    w[i] = level[code[i]] * 2^(e[i // 32] - 127),    level: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same with a minus

A scale is the exponent e alone, a uint8; 255 means NaN. A level has two significant bits, so that each product is exact
in float32 and bfloat16. Blocks run along a weight's inputs. A QuantState holds the exponents as `absmax`, uint8 without
nested_absmax.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from onecard.errors import UserError
from onecard.quant.state import QuantState

BLOCKSIZE = 32
BLOCKS, SCALES = "_blocks", "_scales"  # after a weight's name in a checkpoint
LARGEST_EXPONENT = 252  # 6 * 2^(252 - 127) is finite in float32 and bfloat16, 6 * 2^(253 - 127) is not
SLAB = 1 << 18  # bytes in a slab: larger ones leave gaps in the heap, which grows the process


@cache
def exponent_map(device: torch.device | str = "cpu") -> Tensor:
    """Return 2^(e-127) for each exponent e, float32 (256,): 2^-127 is subnormal, and the last is NaN."""
    bits = torch.arange(256, dtype=torch.int32) << 23
    bits[0], bits[255] = 1 << 22, 0x7FC00000
    return bits.view(torch.float32).to(device)


def encode_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize float32 weights (n,), finite, by section 6.3 of the specification.

    The exponent is that of the block's largest magnitude less 2, the exponent of the largest level. A magnitude is
    rounded to the nearest level, a tie to the even code, and beyond 6 to 6. A block of zeros has the exponent 0.

    Returns:
        Codes, uint8 (32 ceil(n / 32),), where those beyond n are zeros, and exponents, uint8 (ceil(n / 32),).
    """
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCKSIZE)).view(-1, BLOCKSIZE)
    absmax = blocks.abs().amax(dim=1)
    _, exponent = torch.frexp(absmax)  # absmax = m 2^exponent with m in [0.5, 1)
    exponents = (exponent - 1 - 2 + 127).clamp(min=0).masked_fill(absmax == 0, 0).to(torch.uint8)
    return encode_e2m1(blocks / exponent_map(x.device)[exponents.long()][:, None]).view(-1), exponents


def encode_e2m1(x: Tensor) -> Tensor:
    """Return the codes of the nearest levels, uint8 in x's shape. A tie goes to the even code, and beyond 6 to 6."""
    m = x.abs()
    codes = (m > 0.25).to(torch.uint8) + (m >= 0.75) + (m > 1.25) + (m >= 1.75) + (m > 2.5) + (m >= 3.5) + (m > 5)
    return codes + (torch.signbit(x).to(torch.uint8) << 3)


def from_mxfp4(
    name: str, blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, QuantState]:
    """Return the codes and the state of a checkpoint's tensors. No value changes.

    Args:
        blocks: uint8 (..., K / 32, 16), two codes a byte, the first in the low nibble.
        scales: uint8 (..., K / 32), exponents.
        dtype: dtype of dequantize_4bit's result.

    Returns:
        The codes, uint8 (numel/2, 1), the first in the high nibble, and the QuantState of shape (..., K), both in new
        memory.

    Raises:
        UserError: shapes that do not fit together; a scale that is NaN or makes a weight infinite.
    """
    check_mxfp4(name, tuple(blocks.shape), tuple(scales.shape))
    exponents = scales.flatten().clone()
    if exponents.numel() and int(exponents.max()) > LARGEST_EXPONENT:
        first = int((exponents > LARGEST_EXPONENT).nonzero()[0])
        raise UserError(
            f"every scale of MXFP4 must be finite: an exponent of at most {LARGEST_EXPONENT}",
            f"{int(exponents[first])} at flat index {first} of shape {list(scales.shape)}",
            "fetch the checkpoint again",
            name,
        )
    packed = swapped_nibbles(blocks.reshape(-1))
    shape = torch.Size([*blocks.shape[:-2], blocks.shape[-2] * BLOCKSIZE])
    return packed.view(-1, 1), QuantState(exponents, shape, dtype, BLOCKSIZE, "mxfp4")


def swapped_nibbles(codes: Tensor) -> Tensor:
    """Return two codes a byte, uint8 (n,), with the other one in the high nibble, in new memory."""
    found = torch.empty_like(codes)
    for piece, swapped in zip(codes.split(SLAB), found.split(SLAB)):
        torch.bitwise_left_shift(piece, 4, out=swapped)
        swapped |= piece >> 4
    return found


def check_mxfp4(name: str, blocks: tuple[int, ...], scales: tuple[int, ...]) -> None:
    """Raise UserError unless these are the shapes of a weight's blocks and scales."""
    if len(blocks) < 3 or blocks[:-1] != scales or blocks[-1] != BLOCKSIZE // 2 or 0 in blocks:
        must = f"MXFP4 must have blocks (..., {BLOCKSIZE // 2}) and a scale for each"
        raise UserError(must, f"blocks {list(blocks)}, scales {list(scales)}", "fetch the checkpoint again", name)
