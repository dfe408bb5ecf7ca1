"""Exact: quantization to MXFP4 is the specification's, by search in float64; what is in MXFP4 stays as it is.
Behaviour: a run with quant_type mxfp4, and its merge."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import onecard
from onecard.adapter.origin import read_origin
from onecard.config import QuantConfig, make_config
from onecard.errors import UserError
from onecard.export.merge.merged import merge, open_merged
from onecard.export.merge.quantized import quantize_checkpoint
from onecard.memory.plan import plan
from onecard.nn.experts import weights_of
from onecard.quant import blockwise
from onecard.quant.blockwise import unpack
from onecard.quant.codebook import E2M1_MAGNITUDES
from onecard.quant.mxfp4 import from_mxfp4
from tests.conftest import EXPERT_FAMILIES, make_checkpoint
from tests.kernels.cpu.test_native import DTYPES, weights
from tests.mxfp4 import random_mxfp4
from tests.train.test_loop import run

MXFP4 = {"quant_type": "mxfp4", "blocksize": 32, "double_quant": False}


def searched(block):
    """Codes and exponent of a block of Python floats, by the words of the specification."""
    most = max(map(abs, block))
    exponent = 0 if most == 0 else max(math.frexp(most)[1] - 1 - 2 + 127, 0)
    codes = []
    for x in block:
        m = abs(x) / 2.0 ** (exponent - 127)
        nearest = min(range(8), key=lambda code: (abs(m - E2M1_MAGNITUDES[code]), code % 2))  # a tie: to even
        codes.append(nearest + (8 if math.copysign(1, x) < 0 else 0))
    return codes, exponent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_exponents_are_the_specification_s(dtype):
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 0.2499, 5.1, -0.0, 0.0, 0.7501, 7.9, 4.0])
    extremes = torch.tensor([torch.finfo(dtype).max, 1e38, -3e38, 1e-38])
    more = [
        torch.cat([ties, -ties]),
        extremes.clamp(-6e4, 6e4) if dtype == torch.float16 else extremes,
        torch.full((40,), 1e-45),
    ]
    for W in (*weights(dtype), *(W.to(dtype) for W in more)):
        packed, state = onecard.quantize_4bit(W, **MXFP4)
        found, flat = unpack(packed, W.numel()).tolist(), W.flatten().tolist()
        for number, exponent in enumerate(state.absmax.tolist()):
            part = slice(32 * number, 32 * number + 32)
            assert (found[part], exponent) == searched(flat[part])
        assert onecard.dequantize_4bit(packed, state).float().isfinite().all() or dtype == torch.float16


def test_slabs_make_no_difference(monkeypatch):
    W = torch.randn(33, 65)
    packed, state = onecard.quantize_4bit(W, **MXFP4)
    monkeypatch.setattr(blockwise, "SLAB", 64)
    again, other = onecard.quantize_4bit(W, **MXFP4)
    assert torch.equal(packed, again) and torch.equal(state.absmax, other.absmax)


def test_what_is_in_mxfp4_stays_so():
    """Of every block with the level 6 or 4: a largest level below 4 would take a smaller exponent."""
    blocks, scales = random_mxfp4(4, 8, 96, exponents=(3, 250))
    blocks[..., 0] = 0x76
    packed, state = from_mxfp4("w", blocks, scales)
    again, other = onecard.quantize_4bit(onecard.dequantize_4bit(packed, state), **MXFP4)
    assert torch.equal(again, packed) and torch.equal(other.absmax, state.absmax)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_not_finite_is_an_error(bad):
    W = torch.randn(7, 65)
    W[3, 4] = bad
    with pytest.raises(UserError, match=r"at index \[3, 4\]"):
        onecard.quantize_4bit(W, **MXFP4)


@pytest.mark.parametrize("fields", [{"blocksize": 64}, {"double_quant": True}], ids=str)
def test_another_storage_is_refused(fields):
    with pytest.raises(UserError, match="mxfp4 has blocks of 32"):
        onecard.quantize_4bit(torch.randn(64), **(MXFP4 | fields))
    with pytest.raises(UserError, match="mxfp4 has blocks of 32"):
        make_config(QuantConfig, {"quant_type": "mxfp4", **fields})


def test_settings_leave_its_storage_out():
    config = make_config(QuantConfig, {"quant_type": "mxfp4"})
    assert (config.blocksize, config.double_quant) == (32, False)


def test_bitsandbytes_format_is_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="nf4 and fp4"):
        quantize_checkpoint(str(checkpoint), str(tmp_path / "q"), QuantConfig(quant_type="mxfp4"))
    with pytest.raises(UserError, match="mxfp4"):
        onecard.load_model(str(checkpoint), **MXFP4, device="cpu").save_pretrained(tmp_path / "s")


def test_the_plan_counts_its_scales(checkpoint):
    found = {term.name: term.num_bytes for term in plan(str(checkpoint), quant_type="mxfp4").terms}
    model = onecard.load_model(str(checkpoint), **MXFP4, device="cpu")
    states = [weight.loaded_state for module in model.modules() for _, weight in weights_of(module)]
    assert found["base, scales"] == sum(state.nbytes for state in states) == sum(s.numel for s in states) // 32


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts_are_merged_as_they_are_loaded(family, tmp_path):
    """In every layout, also (E, K, N), whose blocks still run along the inputs."""
    folder = make_checkpoint(tmp_path / "m", family, dtype=torch.bfloat16)
    model = onecard.load_model(str(folder), **MXFP4, device="cpu")
    merged = merge(str(folder), None, str(tmp_path / "o"), "dequantized", QuantConfig(quant_type="mxfp4"))
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    count = 0
    for path, module in model.named_modules():
        for name, weight in weights_of(module):
            W = getattr(theirs.get_submodule(path), name)
            assert torch.equal(W, weight.dequantize().to(W.dtype)), (path, name)
            count += 1
    assert count == 12
    stack = next(iter(open_merged(str(folder), None).experts.stacks.values()))
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    path, name = next((p, n) for p, m in model.named_modules() for n, w in weights_of(m) if n == "down_proj")
    W = getattr(original.get_submodule(path), name)
    packed, _ = onecard.quantize_4bit((W.mT if stack.is_transposed else W).contiguous(), **MXFP4)
    assert torch.equal(dict(weights_of(model.get_submodule(path)))[name].weight, packed)


@pytest.mark.slow
def test_a_run_learns_on_it(checkpoint, chats, tmp_path):
    result = run(checkpoint, chats, tmp_path / "o", num_train_epochs=2, validation_split=0.1, quant_type="mxfp4")
    assert result.report.loss_after < result.report.loss_before - 0.3
    origin = read_origin(tmp_path / "o" / "adapter")
    assert (origin.quant_type, origin.blocksize, origin.double_quant) == ("mxfp4", 32, False)
    merge(str(checkpoint), str(tmp_path / "o" / "adapter"), str(tmp_path / "merged"))
