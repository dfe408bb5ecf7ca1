"""Exact: 8-bit AdamW's C++ and Triton kernels give the reference's bits, on every path and at every thread count."""

import pytest
import torch

from onecard.kernels import reference
from onecard.kernels.cpu import native
from onecard.kernels.reference import Rates
from onecard.quant.dynamic import quantize_8bit
from tests.kernels.cpu.test_native import isa, threads  # noqa: F401

SIZES = [1, 255, 256, 257, 4096, 10_007]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters():
    """A parameter a size with gradients of many magnitudes, some of them zero, and states of an earlier update."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for size in SIZES:
        w, g, m, v = (torch.randn(size, generator=generator) for _ in range(4))
        g = g * torch.exp(6 * torch.randn(size, generator=generator))
        g[size // 2 : size // 2 + 300] = 0
        parts.append((w, g, *quantize_8bit(m**3, True), *quantize_8bit(v.abs() ** 5, False)))
    zeros = torch.zeros(300)
    parts.append((torch.ones(300), zeros, *quantize_8bit(zeros, True), *quantize_8bit(zeros, False)))
    return parts


def after(backend, device="cpu"):
    """Three updates' worth of bits."""
    parts = [tuple(x.to(device) for x in part) for part in parameters()]
    for step in (1, 2, 700):
        backend.adamw_8bit_(parts, Rates.of(step, 1e-2, (0.9, 0.999), 1e-8, 0.1))
    bits = [x.cpu() for w, _, *states in parts for x in (w, *states)]
    assert not any(torch.equal(now, before[0]) for now, before in zip(bits[::5], parameters()))
    return bits


def test_cpp_is_bit_equal(isa, threads):  # noqa: F811
    assert all(torch.equal(a, b) for a, b in zip(after(native), after(reference)))


def test_triton_is_bit_equal():
    pytest.importorskip("triton", reason="Triton is not installed")
    from onecard.kernels.triton import codec

    assert all(torch.equal(a, b) for a, b in zip(after(codec, DEVICE), after(reference)))
