"""No worse than plain: a merged checkpoint beside the live adapter. Exact: files, hashes, what is untouched."""

import hashlib
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import onecard
from onecard.config import QuantConfig
from onecard.errors import UserError
from onecard.export.merged import merge, open_merged
from onecard.export.quantized import quantize_checkpoint
from onecard.nn.lora import register_fused
from tests.conftest import EXPERT_FAMILIES, make_checkpoint


def make_adapter(folder, base, **settings):
    """A random adapter of some strength on a 4-bit base; its logits on a few tokens, without and with it."""
    torch.manual_seed(1)
    model = onecard.load_model(str(base), compute_dtype=torch.float32, device="cpu")
    ids = torch.arange(5, 45)[None]
    before = model(ids).logits
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )
    tuned = get_peft_model(model, register_fused(config))
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        elif parameter.requires_grad:
            parameter.data.mul_(1.1)
    tuned.eval()
    with torch.no_grad():
        live = tuned(ids).logits
    tuned.save_pretrained(folder)
    return ids, before, live


def off_by(merged, ids, before, live):
    """Share of the adapter's effect that the merged model misses."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        found = model(ids).logits
    return ((found - live).norm() / (live - before).norm()).item()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"v_proj": 2}},
        {"target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_merged_is_the_live_adapter(tmp_path, settings):
    """float32 sums of the same products: within 1e-4 of the adapter's effect."""
    base = make_checkpoint(tmp_path / "base")
    ids, before, live = make_adapter(tmp_path / "adapter", base, **settings)
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert off_by(tmp_path / "merged", ids, before, live) < 1e-4


def test_original_base_is_plain_peft_s_merge(tmp_path):
    base = make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"), base="original")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() <= 4 * 2**-24 * expected[name].abs().max(), name


@pytest.mark.parametrize("tied", [True, False])
def test_shards_dtype_ties_and_other_files(tmp_path, tied):
    base = make_checkpoint(tmp_path / "one", dtype=torch.bfloat16, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "base", max_shard_size="60KB"
    )
    for path in base.glob("token*"):
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    hashes = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "base").iterdir()}
    make_adapter(tmp_path / "adapter", tmp_path / "base", modules_to_save=["lm_head"] if tied else None)
    merge(str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in hashes} == hashes
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "quantization_config" not in config
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.parametrize("nested", [True, False])
def test_a_4bit_base_merges_to_the_same_bytes(tmp_path, nested):
    """Exact: a checkpoint in 4 bits holds what the 16-bit one is rounded to."""
    base, quant = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16), QuantConfig(double_quant=nested)
    make_adapter(tmp_path / "adapter", base)
    small = quantize_checkpoint(str(base), str(tmp_path / "small"), quant)
    for name, model in (("a", base), ("b", small)):
        merge(str(model), str(tmp_path / "adapter"), str(tmp_path / name), quant=quant)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match="original weights"):
        open_merged(str(small), None, "original")


def test_another_model_is_refused(tmp_path):
    base = make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    other = make_checkpoint(tmp_path / "other", hidden_size=128)
    with pytest.raises(UserError, match=r"_proj\.weight of shape"):
        merge(str(other), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_nothing_is_overwritten(tmp_path):
    base = make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="new folder"):
        merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))


def test_a_full_disk_is_told_first(tmp_path, monkeypatch):
    base = make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("onecard.export.folder.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="room"):
        merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))


STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ON_EXPERTS = {"target_modules": ["q_proj", "o_proj"], "target_parameters": STACKS}


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [ON_EXPERTS, {**ON_EXPERTS, "use_rslora": True}, {**ON_EXPERTS, "target_parameters": STACKS[1:]}],
    ids=["both", "rslora", "down"],
)
def test_merged_experts_are_the_live_adapter(family, settings, tmp_path):
    """As above, of every expert; from tensors of each expert's own, and from stacked ones."""
    base = make_checkpoint(tmp_path / "base", family)
    ids, before, live = make_adapter(tmp_path / "adapter", base, **settings)
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert off_by(tmp_path / "merged", ids, before, live) < 1e-4
    assert set(load_file(tmp_path / "merged/model.safetensors")) == set(load_file(base / "model.safetensors"))


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_original_experts_are_plain_peft_s_merge(family, tmp_path):
    base = make_checkpoint(tmp_path / "base", family)
    make_adapter(tmp_path / "adapter", base, **ON_EXPERTS)
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"), base="original")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert set(found) == set(expected)
    for name, tensor in found.items():
        # Sums of r products in float32, in another order.
        assert (tensor - expected[name]).abs().max() <= 8 * torch.finfo(torch.float32).eps * expected[name].abs().max()


def test_an_adapter_of_other_experts_is_refused(tmp_path):
    base = make_checkpoint(tmp_path / "base", "mixtral")
    make_adapter(tmp_path / "adapter", base, **ON_EXPERTS)
    other = make_checkpoint(tmp_path / "other", "mixtral", num_local_experts=3)
    with pytest.raises(UserError, match="must have the same rank"):
        merge(str(other), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    narrow = make_checkpoint(tmp_path / "narrow", "mixtral", intermediate_size=64)
    with pytest.raises(UserError, match="must have the adapter's"):
        merge(str(narrow), str(tmp_path / "adapter"), str(tmp_path / "merged"))
