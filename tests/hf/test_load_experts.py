"""Exact: experts load to the same bits from every form of a checkpoint; damage is named; paged, resumed, the same."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import onecard
from onecard.config import QuantConfig
from onecard.errors import UserError
from onecard.export.merge.merged import open_merged
from onecard.export.merge.quantized import quantize_checkpoint
from onecard.hf.fingerprint import fingerprint
from onecard.nn.experts import Experts4bit, weights_of
from tests.conftest import EXPERT_FAMILIES, make_checkpoint
from tests.paging.test_weights import least_budget, losses_and_gradients
from tests.train.test_loop import adapter_bytes, run

STACKS = ["gate_up_proj", "down_proj"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return {family: make_checkpoint(folder / family, family, dtype=torch.bfloat16) for family in EXPERT_FAMILIES}


def held_bytes(model):
    """What a model's parameters and scales take."""
    scales = sum(weight.loaded_state.nbytes for module in model.modules() for _, weight in weights_of(module))
    return sum(parameter.nbytes for parameter in model.parameters()) + scales


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_codes_are_those_of_the_stacked_weights(family, sources):
    plain = AutoModelForCausalLM.from_pretrained(sources[family], dtype=torch.bfloat16)
    model = onecard.load_model(str(sources[family]), device="cpu")
    for path, module in model.named_modules():
        if isinstance(module, Experts4bit):
            for name, weight in module.weights.items():
                packed, state = onecard.quantize_4bit(getattr(plain.get_submodule(path), name))
                assert torch.equal(weight.weight, packed) and torch.equal(weight.loaded_state.absmax, state.absmax)
    assert not any(isinstance(p, torch.nn.Parameter) and p.ndim == 3 for p in model.parameters())


def test_from_pretrained_is_the_same_door(sources):
    config = onecard.BitsAndBytesConfig(
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        sources["qwen3_moe"], quantization_config=config, dtype=torch.bfloat16
    )
    ours = onecard.load_model(str(sources["qwen3_moe"]), compute_dtype="bfloat16", device="cpu")
    assert fingerprint(theirs) == fingerprint(ours)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_a_4bit_checkpoint_of_bitsandbytes_has_its_experts_quantized(family, sources, tmp_path):
    """Its linears' codes are kept, its experts, in 16 bits there, quantized as from the original; fewer bytes."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(sources[family], quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "b", max_shard_size="60KB")
    ours = onecard.load_model(str(tmp_path / "b"), device="cpu")
    original = onecard.load_model(str(sources[family]), device="cpu")
    for (path, module), (_, other) in zip(ours.named_modules(), original.named_modules()):
        if isinstance(module, Experts4bit):
            for name, weight in module.weights.items():
                assert torch.equal(weight.dequantize(), other.weights[name].dequantize()), path
    paged = onecard.load_model(str(tmp_path / "b"), device="cpu", weights_budget=1 << 30, page_folder=tmp_path / "p")
    assert fingerprint(paged) == fingerprint(ours)
    stacks = [p for p in theirs.parameters() if p.ndim == 3]
    assert {p.dtype for p in stacks} == {torch.bfloat16}
    saved = sum(p.nbytes - (p.numel() // 2 + p.numel() // 64) for p in stacks)
    # Ours may only be smaller: theirs counts no scales here, so what experts save must be left but for the linears'.
    assert held_bytes(ours) <= sum(p.nbytes for p in theirs.parameters()) - 0.95 * saved


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_4bit_checkpoint_of_ours_is_the_original_in_4_bits(family, double_quant, tmp_path):
    """In shards that part a layer's experts; loaded resident, paged from its own files, and merged, the same."""
    source = make_checkpoint(tmp_path / "m", family, dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "s", max_shard_size="30KB")
    folder = quantize_checkpoint(str(tmp_path / "s"), str(tmp_path / "q"), QuantConfig(double_quant=double_quant))
    original = onecard.load_model(str(source), double_quant=double_quant, device="cpu")
    loaded = onecard.load_model(str(folder), device="cpu")
    assert fingerprint(loaded) == fingerprint(original)
    paged = onecard.load_model(str(folder), device="cpu", weights_budget=1 << 30, page_folder=tmp_path / "p")
    assert fingerprint(paged) == fingerprint(original) and paged.paged_base.spill is None
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert written < 0.6 * sum(path.stat().st_size for path in source.glob("*.safetensors"))
    one = open_merged(str(source), None, "dequantized", QuantConfig(double_quant=double_quant))
    other = open_merged(str(folder), None)
    name = next(name for name in other.shapes if name.endswith("layers.1.mlp.experts.down_proj"))
    experts = list(other.stack(name))
    assert all(torch.equal(a, b) for a, b in zip(one.stack(name), experts, strict=True))
    assert torch.equal(torch.stack(experts), other.read(name))


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_save_pretrained_is_read_again(family, sources, tmp_path):
    """From a model of 16-bit weights, and from one of 4-bit ones."""
    model = onecard.load_model(str(sources[family]), device="cpu")
    model.save_pretrained(tmp_path / "one", max_shard_size="40KB")
    again = onecard.load_model(str(tmp_path / "one"), device="cpu")
    assert fingerprint(again) == fingerprint(model)
    again.save_pretrained(tmp_path / "two")
    assert fingerprint(onecard.load_model(str(tmp_path / "two"), device="cpu")) == fingerprint(model)


def test_experts_of_a_4bit_checkpoint_are_stored_as_its_linears(sources, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    theirs = AutoModelForCausalLM.from_pretrained(sources["mixtral"], quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "b")
    model = onecard.load_model(str(tmp_path / "b"), device="cpu")
    states = [weight.loaded_state for module in model.modules() for _, weight in weights_of(module)]
    assert {(state.quant_type, state.nested) for state in states} == {("fp4", False)}


def edit(folder, change):
    """A copy's tensors changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
DAMAGES = {
    "NaN": lambda t: t[EXPERT].view(-1)[7:8].fill_(float("nan")),
    "Inf": lambda t: t[EXPERT].view(-1)[7:8].fill_(float("inf")),
    "wrong shape": lambda t: t.update({EXPERT: torch.zeros(16, 64, dtype=torch.bfloat16)}),
    "other width": lambda t: t.update({EXPERT: torch.zeros(32, 32, dtype=torch.bfloat16)}),
    "missing": lambda t: t.pop(EXPERT),
    "missing expert": lambda t: [t.pop(EXPERT.replace("up", kind)) for kind in ("gate", "up", "down")],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(kind, sources, tmp_path):
    shutil.copytree(sources["qwen3_moe"], tmp_path / "m")
    edit(tmp_path / "m", DAMAGES[kind])
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.(gate_up|down)_proj") as error:
        onecard.load_model(str(tmp_path / "m"), device="cpu")
    assert ("expert 2" in str(error.value)) == (not kind.startswith("missing"))


def test_damage_in_a_stack_is_named(sources, tmp_path):
    shutil.copytree(sources["gpt_oss"], tmp_path / "m")
    name = "model.layers.1.mlp.experts.down_proj"
    edit(tmp_path / "m", lambda t: t[name][3, 0, :1].fill_(float("nan")))
    with pytest.raises(UserError, match=rf"{name}, expert 3"):
        onecard.load_model(str(tmp_path / "m"), device="cpu")


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_paged_is_resident_to_the_bit(family, recompute, tmp_path):
    folder = make_checkpoint(tmp_path / "m", family, dtype=torch.bfloat16, num_hidden_layers=5, vocab_size=320)
    budget = least_budget(folder, tmp_path)
    resident = onecard.load_model(str(folder), device="cpu")
    paged = onecard.load_model(str(folder), device="cpu", weights_budget=budget, page_folder=tmp_path / "p")
    assert paged.pager.budget_bytes < sum(page.num_bytes for page in paged.pager.pages)
    assert fingerprint(paged) == fingerprint(resident)
    more = {"target_parameters": STACKS}
    expected, found = (losses_and_gradients(model, recompute, **more) for model in (resident, paged))
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0]))
    assert expected[1].keys() == found[1].keys() and any("experts" in name for name in found[1])
    assert all(torch.equal(expected[1][name], found[1][name]) for name in expected[1])


def test_straight_is_stop_and_resume(sources, chats, tmp_path):
    """And a run on a small Qwen3-MoE learns."""
    more = {"num_train_epochs": 2, "lora_dropout": 0.0, "target_parameters": STACKS, "validation_split": 0.1}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    result = run(sources["qwen3_moe"], chats, straight, **more)
    assert result.report.loss_after < result.report.loss_before - 2
    config = json.loads((straight / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(STACKS)
    assert sorted(config["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "adapter")
    for folder in (resumed / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > 3:
            shutil.rmtree(folder)
    run(sources["qwen3_moe"], chats, resumed, resuming=True, **more)
    assert adapter_bytes(resumed) == adapter_bytes(straight)
