"""Exact: 8-bit AdamW's C++ and Triton kernels give the reference's bits, on every path and at every thread count."""

import pytest
import torch

from onecard.kernels import reference
from onecard.kernels.cpu import native
from onecard.kernels.reference import Rates
from onecard.quant.dynamic import midpoints, quantize_8bit
from tests.kernels.cpu.test_native import isa, threads  # noqa: F401

SIZES = [1, 255, 256, 257, 4096, 10_007]
ALIGNED = [16, 256, 4096, 10_000]  # all in one launch: loads are wide
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters(sizes):
    """A parameter a size with gradients of many magnitudes, some of them zero, and states of an earlier update."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for size in sizes:
        w, g, m, v = (torch.randn(size, generator=generator) for _ in range(4))
        g = g * torch.exp(6 * torch.randn(size, generator=generator))
        g[size // 2 : size // 2 + 300] = 0
        parts.append((w, g, *quantize_8bit(m**3, True), *quantize_8bit(v.abs() ** 5, False)))
    zeros = torch.zeros(304)
    parts.append((torch.ones(304), zeros, *quantize_8bit(zeros, True), *quantize_8bit(zeros, False)))
    return parts


def after(backend, device="cpu", sizes=SIZES):
    """Three updates' worth of bits."""
    parts = [tuple(x.to(device) for x in part) for part in parameters(sizes)]
    for step in (1, 2, 700):
        backend.adamw_8bit_(parts, Rates.of(step, 1e-2, (0.9, 0.999), 1e-8, 0.1))
    bits = [x.cpu() for w, _, *states in parts for x in (w, *states)]
    assert not any(torch.equal(now, before[0]) for now, before in zip(bits[::5], parameters(sizes)))
    return bits


def test_cpp_is_bit_equal(isa, threads):  # noqa: F811
    assert all(torch.equal(a, b) for a, b in zip(after(native), after(reference)))


@pytest.mark.parametrize("sizes", [SIZES, ALIGNED])
def test_triton_is_bit_equal(sizes):
    pytest.importorskip("triton", reason="Triton is not installed")
    from onecard.kernels.triton import codec

    assert all(torch.equal(a, b) for a, b in zip(after(codec, DEVICE, sizes), after(reference, sizes=sizes)))


def test_a_tie_goes_to_the_lower_level():
    """With b1 = b2 = 0 the states are g and g^2, so that values lie on the bounds."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from onecard.kernels.triton import codec

    found = []
    for backend in (codec, reference):
        g = torch.cat([torch.ones(1), midpoints("cpu", True)])
        states = (*quantize_8bit(torch.zeros(256), True), *quantize_8bit(torch.zeros(256), False))
        part = tuple(x.to(DEVICE if backend is codec else "cpu") for x in (torch.ones(256), g, *states))
        backend.adamw_8bit_([part], Rates(1.0, 0.1, 1.0, 0.0, 1.0, 0.0, 1.0, 1e-8))
        found.append([x.cpu() for x in part])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("signed", [True, False])
def test_a_cell_and_one_bound_find_every_level(signed):
    """Of the bounds themselves, their neighbours, zeros, ones, denormals and values of all magnitudes."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from onecard.kernels.triton.adamw import CELLS, LOWEST, search_tables

    bounds, infinity = midpoints("cpu", signed), torch.tensor(torch.inf)
    values = torch.exp2(-40 * torch.rand(10_000, generator=torch.Generator().manual_seed(0)))
    x = torch.cat([values, torch.tensor([0.0, 1.0, 1e-45, 2.0**-28]), bounds.abs()])
    x = torch.cat([x, torch.nextafter(x, infinity).clamp(max=1), torch.nextafter(x, -infinity).clamp(min=0)])
    x = torch.cat([x, -x]) if signed else x
    below, padded = search_tables(torch.device("cpu"), signed)
    bits = x.view(torch.int32)
    cell = (((bits & 0x7FFFFFFF) >> 16) - LOWEST).clamp(0, CELLS - 1) + CELLS * (bits < 0)
    found = below[cell].long()
    assert torch.equal(found + (x > padded[found]), torch.bucketize(x, bounds))
