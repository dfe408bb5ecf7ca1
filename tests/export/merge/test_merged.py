"""No worse than plain: a merged checkpoint beside the live adapter. Exact: files, hashes, what is untouched."""

import hashlib
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import onecard
from onecard.adapter.layers import register_fused
from onecard.adapter.load import with_adapter
from onecard.config import QuantConfig
from onecard.errors import UserError
from onecard.export.merge.merged import merge, open_merged
from onecard.export.merge.quantized import quantize_checkpoint, requantize
from onecard.nn.experts import weights_of
from onecard.terminal import load
from tests.conftest import EXPERT_FAMILIES, make_checkpoint
from tests.infer.test_generate import DAMAGES, edit_config


def make_adapter(folder, base, added=0, **settings):
    """A random adapter of some strength on a 4-bit base; its logits on a few tokens, without and with it.

    Args:
        added: tokens that the vocabulary gets first.
    """
    torch.manual_seed(1)
    model = onecard.load_model(str(base), compute_dtype=torch.float32, device="cpu")
    size = model.config.get_text_config().vocab_size + added
    if added:
        model.resize_token_embeddings(size, mean_resizing=False)
    ids = torch.cat([torch.arange(5, 45), torch.arange(size - added, size)])[None]
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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"added": 3, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"added": 3, "modules_to_save": ["embed_tokens"]},
        {"added": 3, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"added": 3},
        {"added": 3, "trainable_token_indices": [306, 305]},
        {"trainable_token_indices": {"embed_tokens": [40, 7, 9]}},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, on ties and saved embeddings
def test_tokens_and_ties(tmp_path, settings, tied):
    """As above, with tokens added or trained by themselves; the vocabulary's size and the tie are those of the result,
    and the adapter comes back alive on the base as it was."""
    base = make_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    ids, before, live = make_adapter(tmp_path / "adapter", base, **settings)
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert off_by(tmp_path / "merged", ids, before, live) < 1e-4
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.vocab_size == AutoConfig.from_pretrained(base).vocab_size + settings.get("added", 0)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != config.tie_word_embeddings  # noqa: SIM118
    back = with_adapter(onecard.load_model(str(base), compute_dtype=torch.float32, device="cpu"), tmp_path / "adapter")
    with torch.no_grad():
        assert (back(ids).logits - live).norm() <= 1e-4 * (live - before).norm()


def test_the_tokenizer_of_the_run_comes_along(tmp_path):
    base = make_checkpoint(tmp_path / "base")
    (base / "preprocessor_config.json").write_text("{}")
    (base / "LICENSE").write_text("free")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("x")
    make_adapter(tmp_path / "adapter", base, added=1, modules_to_save=["embed_tokens", "lm_head"])
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "plain"))
    found = {p.name for p in (tmp_path / "plain").iterdir()}
    assert found >= {"preprocessor_config.json", "LICENSE", "tokenizer.json", "generation_config.json"}
    assert (tmp_path / "plain" / "additional_chat_templates" / "tool.jinja").is_file()
    assert "onecard.json" not in found
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<mug>"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "own"))
    own = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert own.convert_tokens_to_ids("<mug>") == AutoConfig.from_pretrained(tmp_path / "own").vocab_size - 1
    assert own.chat_template == tokenizer.chat_template
    alive = load(str(base), str(tmp_path / "adapter"), None, "cpu")[1]
    assert alive.get_vocab() == own.get_vocab() and alive.chat_template == own.chat_template
    assert (tmp_path / "own" / "preprocessor_config.json").is_file()


def beside_peft_s_merge(base, tmp_path):
    """(name, tensor, peft's) of the adapter merged into the original weights."""
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"), base="original")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert set(found) == set(expected)
    return [(name, tensor, expected[name]) for name, tensor in found.items()]


def test_original_base_is_plain_peft_s_merge(tmp_path):
    base = make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    for name, tensor, expected in beside_peft_s_merge(base, tmp_path):
        assert (tensor - expected).abs().max() <= 4 * 2**-24 * expected.abs().max(), name


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


OF_THE_MODEL = ("another rank", "another model's modules", "an init that reads 16-bit weights")  # not the folder's
NOT_ADDED = {
    "biases": (edit_config(bias="all"), "bias all"),
    "aLoRA": (edit_config(alora_invocation_tokens=[5]), r"alora_invocation_tokens [5]"),
}


@pytest.mark.parametrize("kind", [*(kind for kind in DAMAGES if kind not in OF_THE_MODEL), *NOT_ADDED])
def test_a_damaged_adapter_is_not_merged(kind, tmp_path):
    """What with_adapter refuses of a folder, and what is not added to a linear's weight."""
    base = make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    damage, named = {**DAMAGES, **NOT_ADDED}[kind]
    damage(tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert named.removesuffix(".lora_A.weight") in str(error.value) and not (tmp_path / "merged").exists()


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
    for name, tensor, expected in beside_peft_s_merge(base, tmp_path):
        # Sums of r products in float32, in another order.
        assert (tensor - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * expected.abs().max(), name


def test_an_adapter_of_other_experts_is_refused(tmp_path):
    base = make_checkpoint(tmp_path / "base", "mixtral")
    make_adapter(tmp_path / "adapter", base, **ON_EXPERTS)
    other = make_checkpoint(tmp_path / "other", "mixtral", num_local_experts=3)
    with pytest.raises(UserError, match="must have the same rank"):
        merge(str(other), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    narrow = make_checkpoint(tmp_path / "narrow", "mixtral", intermediate_size=64)
    with pytest.raises(UserError, match="must have the adapter's"):
        merge(str(narrow), str(tmp_path / "adapter"), str(tmp_path / "merged"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_requantized_experts_say_what_is_left(family, tmp_path):
    """<Q(W + D) - W, D> / <D, D> over all updated weights, from the two checkpoints as they are loaded."""
    base = make_checkpoint(tmp_path / "base", family)
    make_adapter(tmp_path / "adapter", base, **ON_EXPERTS)
    folder, left = requantize(str(base), str(tmp_path / "adapter"), str(tmp_path / "q"), QuantConfig())
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    found, before = (onecard.load_model(str(f), compute_dtype="float32", device="cpu") for f in (folder, base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    along = whole = 0.0
    for (path, module), (_, other) in zip(found.named_modules(), before.named_modules()):
        for (name, weight), (_, old) in zip(weights_of(module), weights_of(other)):
            D = (getattr(merged.get_submodule(path), name).detach() - old.dequantize()).double()
            along += ((weight.dequantize() - old.dequantize()).double() * D).sum().item()
            whole += D.square().sum().item()
    assert left.share == pytest.approx(along / whole, rel=1e-5)  # sums of float32 products


def test_the_compute_dtype_that_is_told(tmp_path):
    base = str(make_checkpoint(tmp_path / "base"))
    for asked, told in (("auto", "bfloat16"), ("float16", "float16")):
        folder = quantize_checkpoint(base, str(tmp_path / asked), QuantConfig(compute_dtype=asked))
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert stored["bnb_4bit_compute_dtype"] == told


def test_linears_that_are_not_in_the_checkpoint_are_refused(tmp_path):
    """Rather than left in 16 bits, or without their rounding, unsaid."""
    base = make_checkpoint(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({name.replace("q_proj", "query"): t for name, t in tensors.items()}, base / "model.safetensors")
    with pytest.raises(UserError, match=r"no model\.layers\.0\.self_attn\.q_proj\.weight"):
        quantize_checkpoint(str(base), str(tmp_path / "small"), QuantConfig())
    assert not (tmp_path / "small").exists()
