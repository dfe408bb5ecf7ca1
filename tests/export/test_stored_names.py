"""No worse than plain: checkpoints whose tensors lie otherwise than the model's parameters, by name or turned."""

import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import onecard
from onecard.adapter.layers import lora_config
from onecard.adapter.load import with_adapter
from onecard.adapter.origin import origin_of
from onecard.config import LoraSettings, QuantConfig, TrainConfig, make_config
from onecard.errors import UserError
from onecard.export.merge.merged import merge, open_merged
from onecard.export.merge.quantized import quantize_checkpoint
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from onecard.nn.linear import Linear4bit
from onecard.train.prepare import prepare
from onecard.train.session import show
from tests.conftest import make_tokenizer
from tests.export.merge.test_merged import make_adapter, off_by
from tests.families.build import SIZES, make_family
from tests.infer.test_generate import edit_config

RENAMED = ["gemma3", "gpt_neox", "lfm3", "nemotron_h", "kimi_linear"]
ENDS = {"gemma3": ("embed_tokens", "lm_head"), "gpt2": ("wte", "lm_head"), "gpt_neox": ("embed_in", "lm_head")}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A function that gives a family's tiny checkpoint, made once."""
    made = {}

    def give(name):
        if name not in made:
            made[name] = make_family(tmp_path_factory.mktemp(name) / "base", name)
        return made[name]

    return give


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_a_multimodal_checkpoint_merges_with_its_tower_untouched(targets, family, tmp_path):
    base = family("gemma3")
    model = onecard.load_model(str(base), compute_dtype="float32", device="cpu")
    config = lora_config(LoraSettings(target_modules=targets), model)
    names = {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}
    ids, before, live = make_adapter(tmp_path / "adapter", base, **names)
    merged = merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert off_by(merged, ids, before, live) < 1e-4
    old, new = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert old.keys() == new.keys()
    for name in old:
        inside = name.startswith("language_model.") and ".layers." in name and "_proj." in name
        assert torch.equal(old[name], new[name]) != inside, name
    model, report = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.parametrize("name", list(ENDS))
@pytest.mark.parametrize("settings", [{}, {"added": 3}], ids=["trained", "added"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, on ties
def test_embedding_and_head_by_their_names(name, settings, family, tmp_path):
    """Each is under one name in the result, and the tie and the vocabulary's size are told where the model looks."""
    base = family(name)
    saved = {"modules_to_save": list(ENDS[name])}
    ids, before, live = make_adapter(tmp_path / "adapter", base, **saved, **settings)
    merged = merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert off_by(merged, ids, before, live) < 1e-4
    _, report = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


@pytest.mark.parametrize("name", [*RENAMED, "gpt2"])
def test_4_bits_of_renamed_and_turned_tensors(name, family, tmp_path):
    """Exact: what is quantized loads as what load_model makes, is known again, and merges to the same bytes."""
    base = family(name)
    small = quantize_checkpoint(str(base), str(tmp_path / "small"), QuantConfig())
    loaded = [onecard.load_model(str(folder), compute_dtype="float32", device="cpu") for folder in (base, small)]
    linears = [{n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)} for model in loaded]
    assert linears[0].keys() == linears[1].keys() and linears[0]
    assert all(torch.equal(m.dequantize(), linears[1][n].dequantize()) for n, m in linears[0].items())
    assert origin_of(loaded[0], "m").sample == origin_of(loaded[1], "m").sample
    make_adapter(tmp_path / "adapter", base, target_modules=lora_config(LoraSettings(), loaded[0]).target_modules)
    a, b = (
        load_file(merge(str(model), str(tmp_path / "adapter"), str(tmp_path / out)) / "model.safetensors")
        for model, out in ((base, "a"), (small, "b"))
    )
    for key, tensor in a.items():
        if key in b:  # experts' may lie stacked there
            assert torch.equal(tensor, b[key]), key
    assert {f"{n}.weight" for n in linears[0]} <= read_model(inspect_checkpoint(tmp_path / "b")).stored.keys()


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_another_base_is_told_apart(name, family, tmp_path):
    base = family(name)
    model = onecard.load_model(str(base), compute_dtype="float32", device="cpu")
    other = AutoModelForCausalLM.from_pretrained(base)
    for key, parameter in other.named_parameters():
        if ".layers.1." in key or ".h.1." in key:
            parameter.data.mul_(1 + 0.1 * torch.rand(parameter.shape))
    other.save_pretrained(tmp_path / "other")
    second = onecard.load_model(str(tmp_path / "other"), compute_dtype="float32", device="cpu")
    assert origin_of(model, "m").sample != origin_of(second, "m").sample


def test_an_adapter_that_plain_peft_trained_on_turned_weights(family, tmp_path):
    base = family("gpt2")
    ids, before, live = make_adapter(tmp_path / "adapter", base)
    edit_config(fan_in_fan_out=True)(tmp_path / "adapter")  # as peft writes it there
    merged = merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert off_by(merged, ids, before, live) < 1e-4
    model = onecard.load_model(str(base), compute_dtype="float32", device="cpu")
    again = with_adapter(model, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, live)


def test_a_checkpoint_without_the_models_prefix(family, tmp_path):
    """As the first GPT-2 lies on the hub."""
    base = tmp_path / "base"
    shutil.copytree(family("gpt2"), base)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors")
    ids, before, live = make_adapter(tmp_path / "adapter", base)
    merged = merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert off_by(merged, ids, before, live) < 1e-4
    assert load_file(merged / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_the_plan_reads_the_size_of_renamed_tensors(family):
    model = read_model(inspect_checkpoint(family("gemma3")))
    with safe_open(family("gemma3") / "model.safetensors", "pt") as file:
        assert "language_model.model.embed_tokens.weight" in file.keys()  # noqa: SIM118
    assert model.itemsize["model.language_model.embed_tokens.weight"] == 4
    assert not any("vision" in name for name in model.linears)


def test_a_merge_that_will_be_refused_is_told_before_the_training(tmp_path, chats, monkeypatch):
    monkeypatch.setitem(SIZES, "vocab_size", 320)
    base = make_family(tmp_path / "base", "hrm_text")
    make_tokenizer().save_pretrained(base)
    fields = {"model": str(base), "data": str(chats), "output": str(tmp_path / "o"), "max_steps": 1, "device": "cpu"}
    prepared = prepare(make_config(TrainConfig, {**fields, "sample_prompts": []}))
    console = Console(record=True, width=300, quiet=False)
    show(prepared, console)
    said = console.export_text()
    assert "merge and export will refuse" in said and "no model.H_module.layers.0.mlp.gate_proj.weight" in said
    with pytest.raises(UserError, match="each weight that training has in 4 bits"):
        open_merged(str(base), None)


def test_the_config_says_what_stayed_in_16_bits(family, tmp_path):
    small = quantize_checkpoint(str(family("gemma3")), str(tmp_path / "small"), QuantConfig())
    stored = json.loads((small / "config.json").read_text())["quantization_config"]
    assert "model.vision_tower" in stored["llm_int8_skip_modules"]
