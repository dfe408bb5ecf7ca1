"""Exact: a multimodal model without the parts that text does not pass through computes, learns and saves the same."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import onecard
from onecard.adapter.load import with_adapter
from onecard.config import QuantConfig, TrainConfig, make_config
from onecard.errors import UserError
from onecard.export.merge.merged import merge
from onecard.export.merge.quantized import quantize_checkpoint
from onecard.nn.experts import weights_of
from onecard.nn.linears import beside_text
from tests.conftest import chat_rows, make_tokenizer, write_rows
from tests.families.build import make_family, tiny_config

FAMILIES = ["gemma3", "qwen2_5_vl", "glm4v"]  # glm4v's norms are of the same kind in the text and the vision part
SLOW = ["qwen3_vl", "llama4", "internvl", "llava_next", "mllama", "idefics3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("base"), "mistral3")


def load(base, text_only=True, **settings):
    return onecard.load_model(str(base), compute_dtype="float32", device="cpu", text_only=text_only, **settings)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 40)[None], use_cache=False).logits


def held_bytes(model):
    """The bytes of all parameters but codes, and of all codes."""
    weights = [weight for module in model.modules() for _, weight in weights_of(module)]
    codes = {id(weight.weight): weight.weight.nbytes for weight in weights}
    return sum(p.nbytes for p in model.parameters() if id(p) not in codes), sum(codes.values())


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_text_part_alone_computes_the_same_bits_in_less_memory(tmp_path, family):
    base = make_family(tmp_path, family)
    whole, part = load(base, text_only=False), load(base)
    assert torch.equal(logits(part), logits(whole))
    assert [name for name, _ in part.named_parameters()] == [name for name, _ in whole.named_parameters()]
    beside = beside_text(whole)
    assert beside == beside_text(part) and beside
    for name in beside:
        assert all(tensor.numel() == 0 for tensor in part.get_submodule(name).state_dict().values())
    (others, codes), (all_others, all_codes) = held_bytes(part), held_bytes(whole)
    left = sum(p.nbytes for name in beside for p in whole.get_submodule(name).parameters())
    assert codes == all_codes and others == all_others - left < all_others
    planned = {t.name: t.num_bytes for t in onecard.plan(str(base), compute_dtype="float32", text_only=True).terms}
    assert planned["embeddings, norms, head"] == others


def test_a_checkpoint_of_text_loads_as_before(checkpoint):
    assert torch.equal(logits(load(checkpoint)), logits(load(checkpoint, text_only=False)))


@pytest.mark.parametrize("way", ["4 bits", "paged"])
def test_other_storages(base, tmp_path, way):
    if way == "paged":
        found = load(base, weights_budget=100_000, page_folder=tmp_path)
    else:
        base = quantize_checkpoint(str(base), str(tmp_path / "4bit"), make_config(QuantConfig, {}))
        found = load(base)
    assert torch.equal(logits(found), logits(load(base, text_only=False)))
    assert all(p.numel() == 0 for p in found.model.vision_tower.parameters())


def test_a_part_is_not_saved_as_a_whole(base, tmp_path):
    with pytest.raises(UserError, match="its text part"):
        load(base).save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))


def test_a_tensor_that_is_of_no_part_is_still_an_error(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "model.strange.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"not part of the model: model\.strange\.weight"):
        load(tmp_path)


def test_a_run_on_the_text_part_ends_as_one_on_the_whole(tmp_path):
    """The adapter has the same bits and the same config, plain peft loads it on the whole, and a merge keeps all."""
    tokenizer = make_tokenizer()
    text = tiny_config("mistral3").text_config
    text.vocab_size = len(tokenizer)
    base = make_family(tmp_path / "base", "mistral3", text_config=text)
    tokenizer.save_pretrained(base)
    data = write_rows(tmp_path / "rows.jsonl", chat_rows(12))
    runs = {}
    for text_only in (False, True):
        fields = {"model": str(base), "data": str(data), "output": str(tmp_path / f"run {text_only}"),
                  "text_only": text_only, "max_steps": 2, "sample_prompts": [], "max_seq_length": 96, "device": "cpu",
                  "compute_dtype": "float32", "gradient_accumulation_steps": 1, "learning_rate": 1e-2}  # fmt: skip
        runs[text_only] = onecard.train(TrainConfig(**fields))
    losses = {key: [row["loss"] for row in run.metrics] for key, run in runs.items()}
    assert losses[True] == losses[False]
    folders = [run.adapter for run in runs.values()]
    whole, part = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
    whole, part = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    assert whole == part
    adapter = folders[1]
    expected = logits(with_adapter(load(base), str(adapter)))
    assert torch.equal(logits(with_adapter(load(base, text_only=False), str(adapter))), expected)
    merged = merge(str(base), str(adapter), str(tmp_path / "merged"))
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    vision = [name for name in before if "vision_tower" in name]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in vision)
    plain = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32).eval()
    assert (logits(plain) - expected).abs().max() < 1e-4 * expected.abs().max()  # the merge rounds in float32 once
    original = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    tuned = PeftModel.from_pretrained(original, adapter)
    assert not tuned.load_adapter(adapter, "again").unexpected_keys
    learned = {name for name, _ in tuned.named_parameters() if "lora_" in name and ".default." in name}
    assert learned == {f"{name.removesuffix('.weight')}.default.weight" for name in load_file(
        adapter / "adapter_model.safetensors")}  # fmt: skip
