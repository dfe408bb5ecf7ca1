"""Exact: the Triton kernels under Triton's interpreter give quant/'s bits in float32 (its bfloat16 cast truncates, so
16-bit outputs are compared on a GPU only). Each kernel compiles for every target without a spill."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from onecard.errors import UserError
from onecard.kernels import reference
from onecard.kernels.triton import backend
from onecard.quant.blockwise import make_state
from tests.kernels.test_native import bits, weights

ON_GPU = torch.cuda.is_available()  # else conftest.py has turned the interpreter on
DEVICE = "cuda" if ON_GPU else "cpu"
OUTPUTS = [torch.float32, torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]
pytestmark = pytest.mark.gpu if ON_GPU else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_quantize_is_bit_equal(quant_type, dtype):
    for W in weights(dtype):
        if dtype == torch.bfloat16 and not ON_GPU and 0 < W.abs().max() < 1e-38:
            continue  # the interpreter takes denormal bfloat16 for zero
        for blocksize in (32, 64, 1024):
            packed, absmax = backend.quantize_blocks(W.to(DEVICE), quant_type, blocksize, "W")
            expected_packed, expected_absmax = reference.quantize_blocks(W, quant_type, blocksize, "W")
            assert torch.equal(packed.cpu(), expected_packed)
            assert torch.equal(bits(absmax.cpu()), bits(expected_absmax))


@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_dequantize_is_bit_equal(quant_type, dtype):
    for W in weights(torch.float32):
        for blocksize in (32, 64, 1024):
            packed, absmax = reference.quantize_blocks(W, quant_type, blocksize, "W")
            nested = make_state(absmax, W.shape, W.dtype, quant_type, blocksize, True)
            for scales in ((absmax, None, None), (nested.absmax, nested.nested_absmax, nested.nested_offset)):
                expected = torch.empty(W.shape, dtype=dtype)
                reference.dequantize_into(packed, *scales, quant_type, blocksize, expected)
                moved = [None if t is None else t.to(DEVICE) for t in scales]
                found = torch.empty(W.shape, dtype=dtype, device=DEVICE)
                backend.dequantize_into(packed.to(DEVICE), *moved, quant_type, blocksize, found)
                assert torch.equal(bits(found.cpu()), bits(expected))


@pytest.mark.parametrize("num_rows", [1, 3, 16])
@pytest.mark.parametrize("N, K, blocksize", [(5, 64, 64), (48, 576, 64), (33, 512, 128)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_product_is_within_its_rounding(num_rows, N, K, blocksize, double_quant):
    """float32 sums of K terms: |error| <= (K + 2) 2^-24 sum |x w|."""
    generator = torch.Generator().manual_seed(0)
    packed, absmax = reference.quantize_blocks(torch.randn(N, K, generator=generator), "nf4", blocksize, "W")
    state = make_state(absmax, torch.Size((N, K)), torch.float32, "nf4", blocksize, double_quant).to(DEVICE)
    weight = (packed.to(DEVICE), state.absmax, state.nested_absmax, state.nested_offset, "nf4", blocksize)
    W = torch.empty(N, K, device=DEVICE)
    reference.dequantize_into(*weight, W)
    x = torch.randn(num_rows, K, generator=generator).to(DEVICE)
    assert backend.can_multiply(x, blocksize)
    exact = x.double() @ W.double().T
    bound = (K + 2) * 2**-24 * (x.double().abs() @ W.double().abs().T)
    assert ((backend.multiply(x, *weight, N) - exact).abs() <= bound).all()


@pytest.mark.parametrize("vocab", [1, 7, 5000])
def test_cross_entropy_in_place(vocab):
    """|error| <= 2 |torch's error| + 8 roundings of float32, in the Euclidean norm."""
    logits = 5 * torch.randn(9, vocab, generator=torch.Generator().manual_seed(0))
    target = torch.arange(9) % vocab
    found, plain = logits.to(DEVICE), logits.clone()
    losses = backend.cross_entropy_(found, target.to(DEVICE))
    torchs = reference.cross_entropy_(plain, target)
    truth = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    gradient = logits.double().softmax(-1) - torch.nn.functional.one_hot(target, vocab)
    for a, b, c in ((losses.cpu(), torchs, truth), (found.cpu(), plain, gradient)):
        assert (a - c).norm() <= 2 * (b - c).norm() + 8 * 2**-24 * max(c.norm(), 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_an_error(bad):
    W = torch.randn(10, 13, device=DEVICE)
    W[3, 4] = bad
    with pytest.raises(UserError, match=r"\[3, 4\]"):
        backend.quantize_blocks(W, "nf4", 64, "some.weight")


def test_every_kernel_compiles_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_triton"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 spills") == 5 * 10, done.stdout
