"""Exact: codes and scales are bitsandbytes'. Bound from the maths: the rounding error. Exact: any thread count."""

import pytest
import torch

from onecard.errors import UserError
from onecard.quant.blockwise import SLAB, all_finite, dequantize_4bit, pack, quantize_4bit, unpack
from onecard.quant.codebook import decision_bounds, dynamic_map, quant_map
from onecard.quant.nested import dequantize_absmax, fixed_order_mean, quantize_absmax
from onecard.quant.scales import state_absmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (63,), (64, 64), (129,), (7, 33), (3, 5, 17), (1, 4097), (200, 96), (2, 2))
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def random_tensor(seed: int) -> torch.Tensor:
    """Shapes, dtypes and the values that go wrong: zero blocks, ties, denormals, outliers."""
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = SHAPES[seed % len(SHAPES)], DTYPES[seed % 3]
    W = torch.randn(shape, generator=generator) * 10.0 ** ((seed // 7) % 7 - 4)
    flat = W.view(-1)
    kind = seed % 6
    if kind == 1:
        flat[: min(70, flat.numel())] = 0
    if kind == 2:
        bounds = decision_bounds("nf4")[0]
        flat[:] = bounds[torch.arange(flat.numel()) % 15]
        flat[0] = 1
    if kind == 3 and dtype == torch.float32:
        flat.mul_(1e-41)
    if kind == 4:
        flat[0] *= 1000
    return W.to(dtype)


def compare_with_bitsandbytes(seed: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    W, blocksize = random_tensor(seed), BLOCKSIZES[seed % 8]
    quant_type = ("nf4", "fp4")[seed % 2]
    packed, state = quantize_4bit(W, quant_type, blocksize, double_quant=False)
    peer, peer_state = functional.quantize_4bit(W, blocksize=blocksize, quant_type=quant_type)
    assert torch.equal(packed, peer), (seed, W.shape, W.dtype)
    assert torch.equal(state.absmax, peer_state.absmax), seed

    offset = state.absmax.mean()
    codes, nested_absmax, _ = quantize_absmax(state.absmax, offset)
    peer_codes, peer_nested = functional.quantize_blockwise(state.absmax - offset, blocksize=256)
    assert torch.equal(codes, peer_codes), seed
    assert torch.equal(nested_absmax, peer_nested.absmax), seed
    peer_absmax = functional.dequantize_blockwise(peer_codes, peer_nested) + offset
    assert torch.equal(dequantize_absmax(codes, nested_absmax, offset), peer_absmax), seed


@pytest.mark.parametrize("start", range(0, 200, 25))
def test_codes_and_scales_are_bitsandbytes(start):
    for seed in range(start, start + 25):
        compare_with_bitsandbytes(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(200, 2200, 250))
def test_codes_and_scales_are_bitsandbytes_on_two_thousand(start):
    for seed in range(start, start + 250):
        compare_with_bitsandbytes(seed)


def test_the_dynamic_map_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_error_is_within_half_the_widest_gap(quant_type, blocksize):
    W = torch.randn(300, 77, generator=torch.Generator().manual_seed(1))
    packed, state = quantize_4bit(W, quant_type, blocksize, double_quant=False)
    levels = quant_map(quant_type).clamp(-1, 1).sort().values
    scales = state.absmax.repeat_interleave(blocksize)[: W.numel()].view(W.shape)
    # Half a gap, plus the float32 rounding of the scaling and of the product, 2^-23 of the scale in all.
    bound = scales * (levels.diff().max() / 2 + 2**-22)
    assert ((dequantize_4bit(packed, state) - W).abs() <= bound).all()


def test_double_quantization_adds_what_its_map_allows():
    W = torch.randn(512, 512, generator=torch.Generator().manual_seed(2))
    _, plain = quantize_4bit(W, double_quant=False)
    _, nested = quantize_4bit(W, double_quant=True)
    group = torch.arange(plain.absmax.numel()) // 256
    # Half the map's widest gap and half a grid step, times the group's scale, plus float32 rounding.
    bound = nested.nested_absmax[group] * (dynamic_map().diff().max() / 2 + 1 / 65535) + plain.absmax * 2**-22
    assert ((state_absmax(nested) - plain.absmax).abs() <= bound).all()


def test_a_weight_costs_4_127_bits():
    W = torch.randn(1024, 1024)
    packed, state = quantize_4bit(W)
    bits = 8 * (packed.nbytes + state.nbytes) / W.numel()
    assert abs(bits - (4 + 8 / 64 + 32 / (64 * 256))) <= 32 / W.numel()


def test_any_thread_count_gives_the_same_bits():
    W = torch.randn(1000, 1003)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        packed, state = quantize_4bit(W)
        found.append((packed, state.absmax, state.nested_absmax, state.nested_offset))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_the_mean_is_right():
    x = torch.rand(12345)
    # float64 sums of 12,345 terms are right to 1e-12; one rounding to float32 remains.
    assert abs(fixed_order_mean(x).item() - x.double().mean().item()) <= 2**-24


def test_slabs_do_not_show():
    W = torch.randn(SLAB + 64 * 3 + 5)
    packed, state = quantize_4bit(W, double_quant=False)
    tail, tail_state = quantize_4bit(W[SLAB:], double_quant=False)
    assert torch.equal(packed[SLAB // 2 :], tail)
    assert torch.equal(dequantize_4bit(packed, state)[SLAB:], dequantize_4bit(tail, tail_state))


def test_pack_and_unpack():
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes)[0, 0] == 0x01
    assert torch.equal(unpack(pack(codes), 16), codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_named(bad):
    W = torch.zeros(4, 70)
    W[2, 3] = bad
    with pytest.raises(UserError) as error:
        quantize_4bit(W, name="layers.0.up_proj.weight")
    assert "layers.0.up_proj.weight" in str(error.value)
    assert "index [2, 3]" in str(error.value)


@pytest.mark.parametrize(
    "W, kwargs",
    [
        (torch.zeros(4), {"quant_type": "nf3"}),
        (torch.zeros(4), {"blocksize": 48}),
        (torch.zeros(4, dtype=torch.int8), {}),
        (torch.zeros(0, 4), {}),
    ],
)
def test_unsupported_input_is_refused(W, kwargs):
    with pytest.raises(UserError):
        quantize_4bit(W, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_seen(dtype, value):
    x = torch.randn(37, 1001).to(dtype)
    x[0, 0], x[1, 1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert all_finite(x) and all_finite(x[:0]) and all_finite(x.T)
    x[17, 500] = value
    assert not all_finite(x) and not all_finite(x.T)
