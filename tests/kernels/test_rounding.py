"""Rounding to levels. Exact: the C++ kernels choose the same on every path and number of threads, and as the
specification where sums are exact. Bound: every choice is the best one to float32's rounding, in float64."""

import pytest
import torch

from onecard.kernels import rounding
from onecard.kernels.cpu import native
from onecard.kernels.cpu.library import library
from onecard.quant.codebook import CODES, quant_map
from tests.kernels.cpu.test_native import isa, threads  # noqa: F401

SHARES = torch.tensor([1.0, 0.9, 0.75, 0.6])


def columns(exact):
    """P = 37 columns of N = 201 values, whose sums are exact or of any float32 values; some scales are 0."""
    generator = torch.Generator().manual_seed(0)
    target, W, scale, U = (torch.randn(37, n, generator=generator) for n in (201, 201, 201, 37))
    scale, levels = scale.abs() + 0.1, quant_map("nf4")
    levels = levels.sort().values
    if exact:
        target, W = (x.mul(64).round().div(64) for x in (target, W))
        scale, U, levels = 2 ** scale.log2().round(), U.sign() / 2, torch.arange(-8, 8) / 8
    scale[5, 7:9] = 0
    return target, W, scale, U, levels


def rounded(backend, target, W, scale, U, levels):
    D, index = torch.full_like(W, torch.nan), torch.zeros_like(W, dtype=torch.uint8)
    backend.round_columns_(target, W, scale, U, levels, D, index)
    return D, index


def test_columns_are_the_specifications(isa, threads):  # noqa: F811
    for found, expected in zip(rounded(native, *columns(True)), rounded(rounding, *columns(True))):
        assert torch.equal(found, expected)
    assert expected.unique().numel() == 16


@pytest.mark.parametrize("backend", [rounding, native])
def test_each_level_is_the_nearest_after_the_columns_behind_it(backend):
    if backend is native and library() is None:
        pytest.skip("built without a compiler")
    target, W, scale, U, levels = columns(False)
    D, index = rounded(backend, target, W, scale, U, levels)
    wanted = target.double() + U.double().triu(1) @ D.double()
    values = levels.double()[:, None, None] * scale.double()
    distance = (wanted - values).abs()
    chosen = distance.gather(0, index.long()[None])[0]
    largest = target.abs() + U.triu(1).abs() @ D.abs()
    assert (chosen <= distance.amin(0) + 40 * 2**-24 * largest.double()).all()
    assert torch.allclose(D, W - levels[index.long()] * scale, rtol=0, atol=1e-6)


def blocks(size):
    generator = torch.Generator().manual_seed(1)
    values, weights = torch.randn(2, 130, size, generator=generator)
    values[3], values[4, 1:] = 0, 0
    return values, weights.square()


@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_scales_have_the_least_error(quant_type, size, isa, threads):  # noqa: F811
    values, weights = blocks(size)
    found = native.choose_scales(values, weights, quant_type, SHARES)
    largest = values.abs().amax(1)
    levels = torch.tensor(CODES[quant_type], dtype=torch.float64)
    levels = levels[levels.abs() <= 1]
    errors = []
    for share in SHARES:
        scale = (share * largest).double()
        distance = (values.double()[..., None] - levels * scale[:, None, None]).abs().amin(2)
        errors.append((distance.square() * weights).sum(1))
    errors, chosen = torch.stack(errors), torch.stack([share * largest == found for share in SHARES])
    assert chosen.any(0).all() and chosen.any(1).all(), "a share of the largest value; each share somewhere"
    least = torch.where(chosen, errors, torch.inf).amin(0)
    assert (least <= errors.amin(0) * (1 + size * 2**-23)).all()
    specified = rounding.choose_scales(values, weights, quant_type, SHARES)
    assert (specified == found).float().mean() > 0.97  # else two shares tie


def test_paths_choose_the_same(threads):  # noqa: F811
    """Sums of any values, too: every path adds in one order."""
    kernels, found = library(), {}
    if kernels is None:
        pytest.skip("built without a compiler")
    before = kernels.onecard_isa()
    for path in ("scalar", "neon", "avx2", "avx512", "avx512_bf16", "amx"):
        if kernels.onecard_set_isa(path.encode()):
            found[path] = (*rounded(native, *columns(False)), native.choose_scales(*blocks(64), "nf4", SHARES))
    kernels.onecard_set_isa(before)
    for path, tensors in found.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, found["scalar"])), path
