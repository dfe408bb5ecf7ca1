"""Exact for 32 bits; for 8 bits a bound from the map's gaps, and that it learns."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from onecard.optim.adamw import SMALL, AdamW, update
from onecard.paging.states import PagedStates
from onecard.quant.codebook import dynamic_map
from onecard.quant.dynamic import STATE_BLOCKSIZE, dequantize_8bit, quantize_8bit

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_maps_are_those_of_bitsandbytes(signed):
    bnb = pytest.importorskip("bitsandbytes")
    assert torch.equal(dynamic_map("cpu", signed), bnb.functional.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 100_003])
def test_a_state_is_off_by_half_a_gap_at_most(signed, size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)) ** 5
    x = x if signed else x.abs()
    codes, absmax = quantize_8bit(x, signed)
    back = dequantize_8bit(codes, absmax, signed)
    assert codes.numel() == size and absmax.numel() == -(-size // STATE_BLOCKSIZE)
    levels = dynamic_map("cpu", signed).double()
    scale = absmax.double().repeat_interleave(STATE_BLOCKSIZE)[:size]
    scaled = x.double() / scale
    upper = torch.searchsorted(levels, scaled).clamp(1, 255)
    half_gap = (levels[upper] - levels[upper - 1]) / 2
    below = scaled < levels[0]  # the signed map ends at -0.993
    half_gap[below] = (levels[0] - scaled)[below]
    # Beside it the roundings of the division and of the product, and of a midpoint: three of float32.
    assert (
        (back.double() - x.double()).abs() <= scale * half_gap + 3 * 2**-24 * (x.double().abs() + scale * half_gap)
    ).all()


def test_zeros_stay_zeros():
    for signed in (True, False):
        codes, absmax = quantize_8bit(torch.zeros(300), signed)
        assert torch.equal(dequantize_8bit(codes, absmax, signed), torch.zeros(300))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_32_bits_are_torch_s_own(weight_decay):
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 16), (16, 129), (7,), (300, 300)]
    mine = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    settings = {**SETTINGS, "weight_decay": weight_decay}
    ours, plain = AdamW(mine, **settings), torch.optim.AdamW(theirs, fused=True, **settings)
    for _ in range(50):
        for a, b in zip(mine, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        ours.step()
        plain.step()
    for a, b in zip(mine, theirs):
        assert torch.equal(a, b)
        assert all(torch.equal(ours.state[a][key], plain.state[b][key]) for key in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_bits", [8, 32])
def test_a_parameter_in_16_bits_has_a_float32_master(dtype, state_bits):
    """Steps too small for its own grid add up, as in float32."""
    start, grads = torch.ones(8192), torch.randn(200, 8192, generator=torch.Generator().manual_seed(0)) + 1
    plain, short = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.to(dtype))
    expected, found = AdamW([plain], 1e-5), AdamW([short], 1e-5, state_bits=state_bits)
    for g in grads.to(dtype):
        plain.grad, short.grad = g.float(), g
        expected.step()
        found.step()
    assert torch.equal(found.state[short]["master"], plain) and torch.equal(short, plain.to(dtype))
    assert all(tensor.dtype == torch.float32 for tensor in found.state[short].values())


def test_an_8_bit_update_is_the_exact_one_of_its_dequantized_states():
    generator = torch.Generator().manual_seed(1)
    size = (1 << 20) + 777  # more than one slice
    p, grad = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    m, m_absmax = quantize_8bit(torch.randn(size, generator=generator), True)
    v, v_absmax = quantize_8bit(torch.rand(size, generator=generator), False)
    state = {"step": torch.tensor(6.0), "exp_avg": m, "exp_avg_absmax": m_absmax, "exp_avg_sq": v,
             "exp_avg_sq_absmax": v_absmax}  # fmt: skip
    m64, v64 = dequantize_8bit(m, m_absmax, True).double(), dequantize_8bit(v, v_absmax, False).double()
    g64, w64 = grad.double(), p.double()
    m64, v64 = 0.9 * m64 + 0.1 * g64, 0.99 * v64 + 0.01 * g64**2
    step = 1e-2 * (m64 / (1 - 0.9**7)) / ((v64 / (1 - 0.99**7)).sqrt() + 1e-8)
    expected = w64 * (1 - 1e-2 * 0.1) - step
    update([p], [grad], [state], **SETTINGS)
    assert state["step"] == 7
    # m cancels, so its roundings count against |b1 m| + |(1 - b1) g|: some ten roundings of float32 in all.
    size_of_step = 1e-2 * ((m64.abs() + 0.2 * g64.abs()) / (1 - 0.9**7)) / ((v64 / (1 - 0.99**7)).sqrt() + 1e-8)
    assert ((p.double() - expected).abs() <= 10 * 2**-24 * (w64.abs() + 2 * size_of_step)).all()
    for key, exact, signed in (("exp_avg", m64, True), ("exp_avg_sq", v64, False)):
        codes, absmax = quantize_8bit(exact.float(), signed)
        # The same codes but where float32's roundings straddle a midpoint.
        assert (codes != state[key]).float().mean() < 1e-4
        assert torch.allclose(absmax, state[f"{key}_absmax"], rtol=4 * 2**-24, atol=0)


def regression(state_bits):
    """The loss of a linear regression after 200 updates."""
    generator = torch.Generator().manual_seed(2)
    X, W = torch.randn(512, 128, generator=generator), torch.randn(128, 64, generator=generator)
    p = torch.nn.Parameter(torch.zeros(128, 64))
    optimizer = AdamW([p], lr=3e-2, state_bits=state_bits)
    assert p.numel() >= SMALL
    for _ in range(200):
        loss = (X @ (p - W)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), optimizer.state[p]


def test_8_bits_learn_as_32_do():
    (loss8, state8), (loss32, state32) = regression(8), regression(32)
    assert loss32 < 0.1 and loss8 < 2 * loss32 + 1e-3
    sizes = [sum(t.nbytes for t in state.values()) / (128 * 64) for state in (state8, state32)]
    assert sizes[0] == pytest.approx(2 + 8 / 256, abs=0.001) and sizes[1] == pytest.approx(8, abs=0.001)


@pytest.mark.parametrize("crowded, batched", [(None, True), (False, True), (True, False)])
def test_a_gpu_updates_one_by_one_only_where_states_have_no_room(crowded, batched):
    paged = None if crowded is None else PagedStates(Path(), crowded)
    for kind, expected in (("cuda", batched), ("cpu", False)):
        group = {"params": [SimpleNamespace(device=torch.device(kind))]}
        assert AdamW.is_batched.fget(SimpleNamespace(param_groups=[group], paged=paged)) == expected  # type: ignore


def test_what_is_left_of_a_failed_step_goes_one_by_one(tmp_path):
    """In the same order. A batch has parameters of one kind of state, and of one number of steps."""
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (SMALL, 3, SMALL, 5)]
    optimizer = AdamW(params, 1e-2, state_bits=8, paged=PagedStates(tmp_path))
    for p in params:
        p.grad = torch.ones_like(p)
    assert [[id(p) for p in some] for some, _ in optimizer.units(True)] == [
        [id(params[0]), id(params[2])],
        [id(params[1]), id(params[3])],
    ]
    optimizer.left = optimizer.units(True)[::-1]
    optimizer.page_out()
    assert [id(p) for some, _ in reversed(optimizer.left) for p in some] == [id(params[i]) for i in (0, 2, 1, 3)]
    assert all(len(some) == 1 for some, _ in optimizer.left)
    optimizer.left, params[0].grad = None, None
    optimizer.step()
    params[0].grad = torch.ones_like(params[0])
    assert [len(some) for some, _ in optimizer.units(True)] == [1, 2, 1]
