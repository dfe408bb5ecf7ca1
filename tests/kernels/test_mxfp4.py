"""Exact: MXFP4 is dequantized to the bits of transformers' own dequantizer, on every path. Bound from the maths: the
product straight from the codes."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from onecard.errors import UserError
from onecard.kernels import ops, reference
from onecard.kernels.cpu import native
from onecard.kernels.cpu.library import call, library
from onecard.quant.mxfp4 import LARGEST_EXPONENT, from_mxfp4
from onecard.quant.scales import state_absmax
from onecard.quant.state import PackedWeight, part_of
from tests.kernels.cpu.test_native import DTYPES, bits, isa  # noqa: F401  # a fixture
from tests.mxfp4 import random_mxfp4


def codes_and_scales(*shape, exponents=(0, LARGEST_EXPONENT + 1)):
    return random_mxfp4(*shape, exponents=exponents)


def every_product():
    """Every pair of a byte with every exponent: (1, 253 * 16, 32)."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(LARGEST_EXPONENT + 1, 1, 1, 1)
    scales = torch.arange(LARGEST_EXPONENT + 1, dtype=torch.uint8).repeat_interleave(16)
    return blocks.view(1, -1, 1, 16), scales.view(1, -1, 1)


def theirs(blocks, scales, dtype):
    """transformers' dequantized (E, N, K)."""
    return convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2).contiguous()


def weight_of(blocks, scales):
    return PackedWeight.of(*from_mxfp4("w", blocks, scales))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [reference, native], ids=["reference", "native"])
def test_every_product_has_the_bits_of_transformers(isa, backend, dtype):  # noqa: F811
    """Zeros with their sign and subnormal scales included. float16 overflows in the same places."""
    for blocks, scales in (every_product(), codes_and_scales(3, 5, 96), codes_and_scales(2, 7, 32 * 300)):
        weight = weight_of(blocks, scales)
        found = torch.empty(weight.shape, dtype=dtype)
        backend.dequantize_into(weight, found)
        assert torch.equal(bits(found), bits(theirs(blocks, scales, dtype)))


def test_triton_has_the_bits_too():
    codec = pytest.importorskip("onecard.kernels.triton.codec", reason="Triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for blocks, scales in (every_product(), codes_and_scales(2, 7, 320)):
        weight = weight_of(blocks.to(device), scales.to(device))
        found = torch.empty(weight.shape, device=device)
        codec.dequantize_into(weight, found)
        assert torch.equal(bits(found.cpu()), bits(theirs(blocks, scales, torch.float32)))


def test_blocks_and_scales_are_not_changed_and_not_shared():
    blocks, scales = codes_and_scales(2, 4, 64)
    before = blocks.clone(), scales.clone()
    packed, state = from_mxfp4("w", blocks, scales)
    packed.zero_(), state.absmax.zero_()
    assert torch.equal(blocks, before[0]) and torch.equal(scales, before[1])


def test_bytes_are_four_and_a_quarter_bits_a_weight():
    packed, state = from_mxfp4("w", *codes_and_scales(2, 4, 64))
    assert 8 * (packed.nbytes + state.nbytes) == 4.25 * state.numel
    assert not state.nested


def test_a_part_of_a_stack_is_its_expert():
    blocks, scales = codes_and_scales(3, 5, 96)
    packed, state = from_mxfp4("w", blocks, scales)
    codes, part, skip = part_of(packed, state, 1)
    assert skip == 0 and torch.equal(ops.dequantize_4bit(codes, part), theirs(blocks, scales, torch.bfloat16)[1])


def case(N, K):
    """A weight and its values in float32."""
    blocks, scales = codes_and_scales(1, N, K, exponents=(110, 130))
    return weight_of(blocks, scales)._replace(shape=[N, K]), theirs(blocks, scales, torch.float32)[0]


def product_is_within_its_rounding(multiply, weight, W, num_rows, dtype=torch.float32):
    (N, K), exact = W.shape, W.double()
    x = torch.randn(num_rows, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = multiply(x, weight).double()
    bound = (K + 2) * 2**-24 * (x.double().abs() @ exact.abs().T)  # a float32 sum of K products, in any order
    assert y.shape == (num_rows, N) and ((y - x.double() @ exact.T).abs() <= bound).all()


def tiles_have(weight, W):
    """x the identity: every sum has one term that is not zero."""
    N, K = W.shape
    y, _ = native.linear(torch.eye(K, dtype=torch.bfloat16), weight, None)
    assert torch.equal(y, W.T)
    assert torch.equal(native.linear_backward(torch.eye(N).bfloat16(), weight, [True] * 4)[0], W)


@pytest.mark.parametrize("num_rows", [1, 3, 16])
@pytest.mark.parametrize("N, K", [(5, 64), (48, 576)])
def test_product_is_within_its_rounding(isa, num_rows, N, K):  # noqa: F811
    product_is_within_its_rounding(native.multiply, *case(N, K), num_rows)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_product_of_triton_is_within_its_rounding(num_rows):
    product = pytest.importorskip("onecard.kernels.triton.product", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("tests on a GPU: test_triton.py has the same launch")
    product_is_within_its_rounding(product.multiply, *case(7, 96), num_rows)


@pytest.mark.skipif(library() is None or not call("onecard_has_linear"), reason="this CPU or build has no AMX")
def test_the_weight_on_tiles_is_that_of_dequantize():
    blocks, scales = codes_and_scales(1, 96, 672, exponents=(100, 140))
    tiles_have(weight_of(blocks, scales)._replace(shape=[96, 672]), theirs(blocks, scales, torch.bfloat16)[0])


@pytest.mark.parametrize("exponent", [LARGEST_EXPONENT + 1, 255])
def test_a_scale_that_is_not_finite_is_refused(exponent):
    """The first such exponent would make a level infinite in silence; 255 is NaN."""
    blocks, scales = codes_and_scales(2, 4, 64)
    scales[1, 2, 1] = exponent
    with pytest.raises(UserError, match=f"{exponent} at flat index 13"):
        from_mxfp4("w", blocks, scales)
    blocks[:] = 0x77
    assert theirs(blocks, scales, torch.float32).isinf().any()


def test_the_largest_exponent_is_finite():
    blocks, scales = codes_and_scales(1, 1, 32, exponents=(LARGEST_EXPONENT, LARGEST_EXPONENT + 1))
    blocks[:] = 0x77  # the level 6
    weight = from_mxfp4("w", blocks, scales)
    assert ops.dequantize_4bit(*weight).isfinite().all() and state_absmax(weight[1]).item() == 2.0**125


@pytest.mark.parametrize("shapes", [((2, 4, 2, 16), (2, 4, 3)), ((2, 4, 2, 8), (2, 4, 2)), ((2, 16), (2,))], ids=str)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(UserError, match="MXFP4 must have blocks"):
        from_mxfp4("w", *(torch.zeros(shape, dtype=torch.uint8) for shape in shapes))
