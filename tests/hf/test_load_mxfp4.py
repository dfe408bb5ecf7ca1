"""Exact: experts in MXFP4 load without a rounding, resident and paged. No worse than plain: the model computes as
transformers on the same weights. Behaviour: damage is named; plan, memory and a run; the adapter outside onecard."""

import json
import shutil
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import onecard
from onecard.adapter.layers import lora_config
from onecard.adapter.load import with_adapter
from onecard.config import LoraSettings, QuantConfig
from onecard.data.dataset import Dataset
from onecard.errors import UserError
from onecard.export.calibrated.base import Source
from onecard.export.merge.merged import merge, open_merged
from onecard.export.merge.quantized import quantize_checkpoint
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.fingerprint import fingerprint
from onecard.hf.skeleton import read_model
from onecard.kernels.cpu import native
from onecard.memory.measure import begin_peak, peak_memory_bytes
from onecard.memory.plan import plan
from onecard.nn.experts import Experts4bit, weights_of
from tests.forks import Forked
from tests.mxfp4 import edit_config, make_mxfp4
from tests.nn.test_experts import no_worse, plain_model, set_adapter
from tests.paging.test_weights import least_budget, losses_and_gradients
from tests.train.test_loop import run

IDS = torch.randint(5, 200, (2, 17), generator=torch.Generator().manual_seed(0))
STACKS = ["gate_up_proj", "down_proj"]
ON_EXPERTS = {"target_parameters": STACKS}
SQUARE = {"hidden_size": 64, "intermediate_size": 64}  # as gpt-oss's down_proj: no shape tells its sides apart


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_mxfp4(tmp_path_factory.mktemp("mxfp4") / "m")


def transformers_own(folder, dtype=torch.bfloat16):
    """transformers' model, which dequantizes the experts to 16 bits."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def stacks_in(model):
    return {
        f"{path}.{name}": weight
        for path, module in model.named_modules()
        if isinstance(module, Experts4bit)
        for name, weight in module.weights.items()
    }


@pytest.mark.parametrize("size", [{}, SQUARE], ids=str)
def test_experts_have_the_bits_of_transformers(size, tmp_path):
    folder = make_mxfp4(tmp_path / "m", **size)
    theirs, ours = transformers_own(folder), onecard.load_model(str(folder), compute_dtype="bfloat16", device="cpu")
    found = stacks_in(ours)
    assert len(found) == 4 and {w.loaded_state.quant_type for w in found.values()} == {"mxfp4"}
    for name, weight in found.items():
        assert torch.equal(weight.dequantize(), theirs.get_parameter(name)), name


def test_a_weight_takes_four_and_a_quarter_bits(source):
    model = onecard.load_model(str(source), device="cpu")
    for name, weight in stacks_in(model).items():
        assert 8 * (weight.weight.nbytes + weight.loaded_state.nbytes) == 4.25 * weight.shape.numel(), name


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_linears_take_the_run_s_type(quant_type, source):
    """As those of a 16-bit checkpoint: the same codes."""
    theirs = transformers_own(source)
    model = onecard.load_model(str(source), quant_type=quant_type, double_quant=False, device="cpu")
    linears = {path: m for path, m in model.named_modules() for name, _ in weights_of(m) if name == "weight"}
    assert len(linears) == 8
    for path, linear in linears.items():
        packed, state = onecard.quantize_4bit(theirs.get_submodule(path).weight, quant_type, double_quant=False)
        assert torch.equal(linear.weight, packed) and torch.equal(linear.loaded_state.absmax, state.absmax)


@pytest.mark.parametrize("size", [{}, SQUARE], ids=str)
def test_it_computes_as_transformers_on_the_same_weights(size, tmp_path):
    """Logits, and the gradients of every A and B; many rows, and one, straight from the codes."""
    folder = make_mxfp4(tmp_path / "m", **size)
    base = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    config = lora_config(LoraSettings(r=4, **ON_EXPERTS), base)
    models = (base, plain_model(folder, base), plain_model(folder, base, torch.float64))
    for ids in (IDS, IDS[:1, :1]):
        ours, theirs, exact = (model(ids).logits for model in models)
        assert no_worse(ours, theirs, exact, torch.float32)
    found = []
    for model in models:
        tuned = set_adapter(get_peft_model(model, config, autocast_adapter_dtype=False))
        tuned.to(torch.float64) if model is models[2] else None
        config._custom_modules = None  # for peft's own layers around the others
        logits = tuned(IDS).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        found.append({name: p.grad for name, p in tuned.named_parameters() if p.requires_grad})
    ours, theirs, truth = found
    assert ours.keys() == theirs.keys() == truth.keys() and sum("experts" in name for name in ours) == 8
    for name, gradient in truth.items():
        assert gradient.abs().max() > 0
        assert no_worse(ours[name], theirs[name], gradient, torch.float32), name


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_all_that_is_not_in_4_bits_computes_in_the_compute_dtype(dtype, source):
    model = onecard.load_model(str(source), compute_dtype=dtype, device="cpu")
    assert model(IDS[:1, :3]).logits.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("recompute", [False, True])
def test_paged_is_resident_to_the_bit(recompute, tmp_path):
    folder = make_mxfp4(tmp_path / "m", num_hidden_layers=5)
    budget = least_budget(folder, tmp_path)
    resident = onecard.load_model(str(folder), device="cpu")
    paged = onecard.load_model(str(folder), device="cpu", weights_budget=budget, page_folder=tmp_path / "p")
    assert paged.pager.budget_bytes < sum(page.num_bytes for page in paged.pager.pages)
    assert fingerprint(paged) == fingerprint(resident)
    expected, found = (losses_and_gradients(model, recompute, **ON_EXPERTS) for model in (resident, paged))
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0]))
    assert all(torch.equal(expected[1][name], found[1][name]) for name in expected[1])


def test_the_fingerprint_covers_codes_and_exponents(source):
    model = onecard.load_model(str(source), device="cpu")
    before, weight = fingerprint(model), next(iter(stacks_in(model).values()))
    weight.loaded_state.absmax[5] += 1
    other = fingerprint(model)
    weight.loaded_state.absmax[5] -= 1
    weight.weight.data[7] ^= 1
    assert len({before, other, fingerprint(model)}) == 3


def test_the_plan_counts_what_is_loaded(source, monkeypatch):
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    found = {term.name: term for term in plan(str(source), r=4, compute_dtype="bfloat16", **ON_EXPERTS).terms}
    model = onecard.load_model(str(source), compute_dtype="bfloat16", device="cpu")
    weights = [weight for module in model.modules() for _, weight in weights_of(module)]
    codes = found["base, 4-bit codes"].num_bytes + found["experts, 4-bit codes"].num_bytes
    assert codes == sum(weight.weight.nbytes for weight in weights)
    assert found["base, scales"].num_bytes == sum(weight.loaded_state.nbytes for weight in weights)
    assert "P_e / 32" in found["base, scales"].formula
    tuned = get_peft_model(model, lora_config(LoraSettings(r=4, **ON_EXPERTS), model))
    assert found["LoRA weights"].num_bytes == sum(p.nbytes for p in tuned.parameters() if p.requires_grad)


@pytest.mark.parametrize("name, memory", [("gpt-oss-20b", 24), ("gpt-oss-120b", 80)])
def test_gpt_oss_fits(name, memory):
    """With the bytes of its published files' experts: 4.25 bits a weight."""
    found = plan(name, device_memory_bytes=memory << 30, device="cuda")
    assert found.fits and found.total_bytes <= memory << 30
    layers, experts = (24, 32) if name == "gpt-oss-20b" else (36, 128)
    weights = layers * experts * 3 * 2880 * 2880
    terms = {term.name: term.num_bytes for term in plan(name, device="cuda", double_quant=False).terms}
    attention = layers * 2880 * 64 * (64 + 8 + 8 + 64)
    assert terms["experts, 4-bit codes"] == weights // 2
    assert terms["base, scales"] == weights // 32 + 4 * attention // 64


def peak_of_load(warm, folder):
    """Print the peak of a load and what it keeps, in bytes beyond what the process had."""
    cpu = torch.device("cpu")
    onecard.load_model(str(warm), device="cpu")  # libraries' own memory
    before = begin_peak(cpu)
    model = onecard.load_model(str(folder), device="cpu")
    held = sum(w.weight.nbytes + w.loaded_state.nbytes for m in model.modules() for _, w in weights_of(m))
    print(peak_memory_bytes(cpu) - before, held)


@pytest.mark.slow
def test_the_load_needs_two_stacks_more_than_the_model(source, tmp_path):
    """Not the file, nor a second copy of the codes: each stack is released before the next is read."""
    folder = make_mxfp4(tmp_path / "m", wide=(64, 2048), num_hidden_layers=8)
    done = Forked(peak_of_load, source, folder).wait()
    assert done.code == 0, done.err
    peak, held = map(int, done.out.split()[-2:])
    stack = 64 * 2 * 2048 * 64 // 2  # the codes of the larger
    assert held > 100e6 and peak < held + 2 * stack, (peak, held)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BLOCKS, SCALES = (f"model.layers.1.mlp.experts.down_proj_{end}" for end in ("blocks", "scales"))
CHANGES = {
    "a scale of NaN": (lambda t: t[SCALES][2, 3].fill_(255), r"down_proj.*255 at flat index 393"),
    "an infinite weight": (lambda t: t[SCALES][2, 3].fill_(253), r"down_proj.*253 at flat index"),
    "no scales": (lambda t: t.pop(SCALES), r"down_proj: .*_blocks U8, _scales missing"),
    "no blocks": (lambda t: t.pop(BLOCKS), r"down_proj: .*_blocks missing, _scales U8"),
    "neither": (lambda t: [t.pop(BLOCKS), t.pop(SCALES)], r"experts\.down_proj: every linear must have"),
    "scales of float": (lambda t: t.update({SCALES: t[SCALES].float()}), r"down_proj: .*_blocks U8, _scales F32"),
    "fewer scales": (lambda t: t.update({SCALES: t[SCALES][..., :1].clone()}), "MXFP4 must have blocks"),
    "blocks of 16": (lambda t: t.update({BLOCKS: t[BLOCKS][..., :8].clone()}), "MXFP4 must have blocks"),
    "an expert less": (
        lambda t: t.update({BLOCKS: t[BLOCKS][1:].clone(), SCALES: t[SCALES][1:].clone()}),
        r"down_proj: .*must have shape \[4, 64, 96\].*shape \[3, 64, 96\]",
    ),
    "its sides swapped": (
        lambda t: t.update({BLOCKS: t[BLOCKS].view(4, 96, 2, 16), SCALES: t[SCALES].view(4, 96, 2)}),
        r"down_proj: .*must have shape \[4, 64, 96\].*shape \[4, 96, 64\]",
    ),
    "a NaN in a linear": (
        lambda t: t["model.layers.0.self_attn.q_proj.weight"][1, :1].fill_(float("nan")),
        r"q_proj\.weight: every weight must be finite",
    ),
    "a linear missing": (
        lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"),
        r"q_proj\.weight: every linear must",
    ),
}


DAMAGES = {kind: (partial(edit, change=change), expected) for kind, (change, expected) in CHANGES.items()}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(kind, source, tmp_path):
    damage, expected = DAMAGES[kind]
    shutil.copytree(source, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=f"(?s){expected}"):
        onecard.load_model(str(tmp_path / "m"), device="cpu")


@pytest.mark.parametrize("fields, expected", [
    ({"quant_method": "mxfp4", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    ({"quant_method": "mxfp5"}, "quantized with mxfp5"),
], ids=str)  # fmt: skip
def test_another_quantization_config_is_refused(fields, expected, source, tmp_path):
    shutil.copytree(source, tmp_path / "m")
    edit_config(tmp_path / "m", quantization_config=fields)
    with pytest.raises(UserError, match=expected):
        inspect_checkpoint(tmp_path / "m")


def test_integers_are_no_mxfp4_of_another_checkpoint(source, tmp_path):
    """Without its quantization_config, blocks and scales are refused as before."""
    shutil.copytree(source, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="weights must be float"):
        inspect_checkpoint(tmp_path / "m")


def test_save_pretrained_says_that_bitsandbytes_has_no_such_format(source, tmp_path):
    model = onecard.load_model(str(source), device="cpu")
    with pytest.raises(UserError, match="mxfp4"):
        model.save_pretrained(tmp_path / "s")


def test_16_bit_stacks_beside_packed_ones(source, tmp_path):
    """modules_to_not_convert may leave a layer's experts in 16 bits. They are quantized as those of any checkpoint."""
    shutil.copytree(source, tmp_path / "m")
    theirs = transformers_own(source)
    name = "model.layers.1.mlp.experts.down_proj"
    stack = theirs.get_parameter(name).detach().contiguous()
    edit(tmp_path / "m", lambda t: [t.pop(BLOCKS), t.pop(SCALES), t.update({name: stack})])
    weights = stacks_in(onecard.load_model(str(tmp_path / "m"), compute_dtype="bfloat16", device="cpu"))
    assert weights[name].loaded_state.quant_type == "nf4"
    packed, state = onecard.quantize_4bit(stack)
    assert torch.equal(weights[name].weight, packed)
    assert read_model(inspect_checkpoint(tmp_path / "m")).mxfp4 == set(weights) - {name}
    merged = open_merged(str(tmp_path / "m"), None, "dequantized")
    assert torch.equal(merged.read(name), onecard.dequantize_4bit(packed, state))


def test_a_run_on_packed_experts_ends_in_an_adapter_of_transformers_and_peft(source, chats, tmp_path):
    """Trained on the packed base. peft on transformers' model of the same weights computes the same, the merge too, but
    for its rounding to bfloat16. With its linears rounded, transformers' own model of the checkpoint is that model."""
    output = tmp_path / "o"
    result = run(source, chats, output, num_train_epochs=2, lora_dropout=0.0, validation_split=0.1, **ON_EXPERTS)
    assert result.report.loss_after < result.report.loss_before - 0.5
    adapter = str(output / "adapter")
    base = onecard.load_model(str(source), compute_dtype="float32", device="cpu")
    plain, exact = (plain_model(source, base, dtype) for dtype in (torch.float32, torch.float64))
    before = plain(IDS).logits
    theirs, truth = (PeftModel.from_pretrained(model, adapter)(IDS).logits for model in (plain, exact))
    effect = theirs - before
    assert effect.norm() > 0.1 * before.norm()
    assert no_worse(with_adapter(base, adapter)(IDS).logits, theirs, truth, torch.float32)

    folder = merge(str(source), adapter, str(tmp_path / "merged"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert not [name for name in tensors if name.endswith(("_blocks", "_scales"))]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    assert (merged - theirs).norm() < 0.05 * effect.norm()

    own = transformers_own(source, torch.float32)
    for path, module in base.named_modules():
        for name, weight in weights_of(module):
            if name == "weight":  # a linear, which training had in 4 bits
                own.get_submodule(path.replace(".base_layer", "")).weight.data = weight.dequantize()
    assert torch.equal(PeftModel.from_pretrained(own, adapter)(IDS).logits, theirs)


def test_quantize_writes_what_the_dequantized_experts_round_to(source, tmp_path):
    """A second rounding, which the user asks for; without it there is no other 4-bit form to write."""
    folder = quantize_checkpoint(str(source), str(tmp_path / "q"), QuantConfig())
    theirs = transformers_own(source)
    found = stacks_in(onecard.load_model(str(folder), compute_dtype="bfloat16", device="cpu"))
    for name, weight in found.items():
        packed, state = onecard.quantize_4bit(theirs.get_parameter(name))
        assert torch.equal(weight.weight, packed) and torch.equal(weight.loaded_state.absmax, state.absmax), name


def test_calibration_is_refused(source):
    with pytest.raises(UserError, match="a model to calibrate must be in 16 or 32 bits"):
        Source(str(source), QuantConfig(), Dataset([], "text", 64)).open()


def test_experts_are_the_same_over_both_bases(source):
    """The original weights are those of the linears; the experts have no others."""
    one, other = (open_merged(str(source), None, base) for base in ("dequantized", "original"))
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(one.read(name), other.read(name))
    linear = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(other.read(linear), load_file(source / "model.safetensors")[linear])
    assert not torch.equal(one.read(linear), other.read(linear))
