"""Exact: weights in NVFP4 are dequantized to the bits of their formula, on every path, and integers with zeros to its
values. Bound from the maths: the product straight from the codes."""

import pytest
import torch

from onecard.kernels import ops, reference
from onecard.kernels.cpu import native
from onecard.kernels.cpu.library import call, library
from onecard.kernels.dequantize import dequantize_part
from onecard.quant.blockwise import dequantize_4bit, pack
from onecard.quant.nvfp4 import E4M3, from_nvfp4, scale_map
from onecard.quant.scales import state_absmax
from onecard.quant.state import PackedWeight, QuantState
from tests.kernels.cpu.test_native import DTYPES, bits, isa  # noqa: F401  # a fixture
from tests.kernels.test_mxfp4 import product_is_within_its_rounding, tiles_have

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nvfp4(N, K, dtype=torch.float32, divides=True, seed=0, spread=False):
    """A random weight in NVFP4, and its values by the formula. `spread`: every scale of E4M3, also subnormal ones."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1 if spread else 0x30, 0x7F, (N, K // 16), generator=generator, dtype=torch.uint8)
    whole = torch.rand((), generator=generator) * 3 + 0.1
    each = scales.view(E4M3).float()
    each = each / whole if divides else each * whole
    W = torch.tensor(LEVELS + tuple(-level for level in LEVELS))[codes.int()] * each.repeat_interleave(16, dim=1)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    weight = PackedWeight.of(*from_nvfp4(packed, scales, scale_map(whole, divides), dtype))
    return weight, W.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize("divides", [True, False], ids=["compressed-tensors", "ModelOpt"])
def test_every_path_has_the_bits_of_the_formula(isa, backend, dtype, divides):  # noqa: F811
    for N, K in ((1, 16), (3, 48), (5, 112), (7, 1024), (65, 16 * 67)):
        weight, W = nvfp4(N, K, dtype, divides, seed=N, spread=True)
        found = torch.empty(N, K, dtype=dtype)
        backend.dequantize_into(weight, found)
        assert torch.equal(bits(found), bits(W))


def test_rows_are_those_of_the_whole():
    weight, W = nvfp4(9, 80)
    rows = dequantize_part(weight, state_absmax(weight), 4 * 80, 3 * 80)
    assert torch.equal(rows.view(3, 80), W[4:7])


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("K", [64, 192, 1088])
def test_product_is_within_its_rounding(isa, num_rows, K):  # noqa: F811
    product_is_within_its_rounding(native.multiply, *nvfp4(13, K), num_rows)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_product_of_bfloat16_is_within_its_rounding(isa, num_rows):  # noqa: F811
    """The levels are exact in bfloat16, and so are the products of two of them in float32."""
    product_is_within_its_rounding(native.multiply, *nvfp4(24, 448), num_rows, torch.bfloat16)


def test_triton_has_the_bits_too():
    codec = pytest.importorskip("onecard.kernels.triton.codec", reason="Triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for N, K in ((3, 48), (7, 1104)):
        weight, W = nvfp4(N, K, spread=True)
        moved = PackedWeight(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in weight))
        found = torch.empty(N, K, device=device)
        codec.dequantize_into(moved, found)
        assert torch.equal(bits(found.cpu()), bits(W))
    packed, state, W = uint4_zeros(7, 384, 128, torch.float32)
    found = torch.empty(7, 384, device=device)
    codec.dequantize_into(PackedWeight.of(packed.to(device), state.to(device)), found)
    assert torch.equal(found.cpu(), W)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_product_of_triton_is_within_its_rounding(num_rows):
    product = pytest.importorskip("onecard.kernels.triton.product", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("tests on a GPU: test_triton.py has the same launch")
    product_is_within_its_rounding(product.multiply, *nvfp4(7, 96), num_rows)


def uint4_zeros(N, K, size, dtype):
    """Random integers with zeros, and their values by the formula in float64."""
    generator = torch.Generator().manual_seed(N)
    codes, zeros = (torch.randint(0, 16, (N, k), generator=generator, dtype=torch.uint8) for k in (K, K // size))
    scales = (torch.rand(N, K // size, generator=generator) * 0.05).bfloat16().float()
    absmax = torch.stack([scales, (8 - zeros.float()) * scales], dim=-1).view(-1)
    state = QuantState(absmax, torch.Size([N, K]), dtype, size, "uint4_zeros")
    each = [x.double().repeat_interleave(size, dim=1) for x in (zeros, scales)]
    return pack(codes.view(-1)), state, ((codes.double() - each[0]) * each[1]).float().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [reference, native], ids=["reference", "native"])
def test_integers_with_zeros_have_the_values_of_the_formula(isa, backend, dtype):  # noqa: F811
    for N, K, size in ((3, 64, 32), (40, 384, 128), (5, 4096, 4096)):
        packed, state, W = uint4_zeros(N, K, size, dtype)
        found = torch.empty(N, K, dtype=dtype)
        backend.dequantize_into(PackedWeight.of(packed, state), found)
        assert torch.equal(found, W)


@pytest.mark.parametrize("num_rows", [1, 40])
def test_a_linear_of_integers_with_zeros_is_that_of_its_weight(num_rows):
    packed, state, W = uint4_zeros(40, 384, 128, torch.float32)
    weight = PackedWeight.of(packed, state)
    assert torch.equal(dequantize_4bit(packed, state), W)
    assert torch.equal(dequantize_part(weight, state_absmax(weight), 384, 39 * 384).view(-1, 384), W[1:])
    x = torch.randn(num_rows, 384, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = ops.qlora_linear(x, packed, state)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x @ W.T) and torch.equal(grad, torch.ones_like(y) @ W)


@pytest.mark.skipif(library() is None or not call("onecard_has_linear"), reason="this CPU or build has no AMX")
def test_the_weight_on_tiles_is_that_of_dequantize():
    packed, state, W = uint4_zeros(96, 672, 32, torch.bfloat16)
    tiles_have(PackedWeight.of(packed, state), W)
    tiles_have(*nvfp4(96, 672, torch.bfloat16))
