"""The codebooks: the levels of 4-bit codes, and of the 8-bit codes of scales and optimizer states.

NF4   QLoRA, arXiv 2305.14314, appendix E: quantiles of N(0, 1) at evenly spaced probabilities, for 8 positive and
      7 negative levels separately, so that zero is exact. They are scaled so that the ends are -1 and 1.
FP4   one sign, two exponent bits and one mantissa bit (E2M1) with a subnormal of 1/192, scaled to [-1, 1].
Int4  uniform levels for comparison: i/7 for i in -7 ... 7. Its sixteenth level, -8/7, is never chosen.
UInt4 the integers of GPTQ and compressed-tensors less 8, not scaled. No weight is quantized to it here.
MXFP4 E2M1 with a subnormal of 0.5, not scaled, with -0.0: the levels of the OCP Microscaling Formats (mxfp4.py).
NVFP4 the same levels, with other scales (nvfp4.py). No weight is quantized to it; a checkpoint has such codes.

The 8-bit dynamic map (Dettmers, arXiv 1511.04561) has the levels of the scales' codes in double quantization. Each
decade from 10^-6 to 10^0 has twice as many linear steps as the decade below it.

The NF4 constants are the published float32 values, because a checkpoint's codes mean exactly these.
tests/quant/test_codebook.py compares them with derive_nf4.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = FP4_MAGNITUDES + tuple(0.0 - x for x in FP4_MAGNITUDES)  # no -0.0: both zeros of bitsandbytes are +0.0
INT4 = tuple(i / 7 for i in range(-8, 8))
UINT4 = tuple(float(i) for i in range(-8, 8))
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_ASCENDING = (*range(15, 7, -1), *range(8))
MXFP4 = E2M1_MAGNITUDES + tuple(-x for x in E2M1_MAGNITUDES)
CODES = {"nf4": NF4, "fp4": FP4, "int4": INT4, "uint4": UINT4, "uint4_zeros": UINT4, "mxfp4": MXFP4, "nvfp4": MXFP4}

# Codes in ascending order of their level. FP4's two zeros are levels 7 and 8: code 0, then code 8. MXFP4's: -0.0, 0.0.
ASCENDING = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
    "int4": tuple(range(16)),
    "uint4": tuple(range(16)),
    "uint4_zeros": tuple(range(16)),
    "mxfp4": E2M1_ASCENDING,
    "nvfp4": E2M1_ASCENDING,
}

NF4_TAIL = 1 - (1 / 30 + 1 / 32) / 2  # the outermost quantile's probability: 1 - appendix E's delta


def derive_nf4(tail: float = NF4_TAIL) -> Tensor:
    """Derive NF4 from the normal distribution's quantiles: float64 (16,), ascending."""
    positive = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return levels / levels.max()


@cache
def quant_map(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """Return the level of each 4-bit code: float32 (16,)."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


@cache
def decision_bounds(quant_type: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the midpoints between neighbouring levels, float32 (15,), and each interval's code, int64 (16,)."""
    order = torch.tensor(ASCENDING[quant_type], device=device)
    levels = quant_map(quant_type, device)[order]
    return (levels[:-1] + levels[1:]) / 2, order


@cache
def dynamic_map(device: torch.device | str = "cpu", signed: bool = True) -> Tensor:
    """Return the 8-bit dynamic map: float32 (256,), ascending. Signed: 0 is code 127, 1 is code 255. Unsigned, for
    values that are never negative: the sign bit doubles the steps of each decade, and 0 is code 0."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2
        decade = 10 ** (exponent - 6)
        levels += (decade * centres).tolist() + ((-decade * centres).tolist() if signed else [])
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


GRID = 65536  # points of the grid that a scale is rounded to before its nearest code is looked up


@cache
def dynamic_lookup(device: torch.device | str = "cpu") -> Tensor:
    """Return the nearest dynamic code of each grid point -1 + 2i/65535: uint8 (65536,). Ties go to the lower code."""
    point = (torch.arange(GRID, dtype=torch.float64) * 2 / (GRID - 1) - 1).float()
    levels = dynamic_map()
    upper = torch.searchsorted(levels, point).clamp(1, 255)
    nearer_above = (levels[upper] - point).abs() < (point - levels[upper - 1]).abs()
    return (upper - 1 + nearer_above).to(torch.uint8).to(device)
