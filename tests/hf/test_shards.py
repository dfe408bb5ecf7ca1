"""Exact: shards without a right index are the checkpoint all the same, and a head of the file is the head."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import onecard
from onecard.adapter.load import with_adapter
from onecard.errors import UserError
from onecard.export.merge.merged import open_merged
from onecard.hf.checkpoint import INDEX, inspect_checkpoint
from tests.conftest import make_checkpoint, make_tokenizer


@pytest.fixture(scope="module")
def shards(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "s"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(folder, max_shard_size="80KB")
    make_tokenizer().save_pretrained(folder)
    return folder


def test_shards_without_a_right_index_are_read(shards, checkpoint, tmp_path):
    ids = torch.tensor([[5, 6, 7]])
    expected = onecard.load_model(str(checkpoint), compute_dtype="float32", device="cpu")(ids).logits
    for kind in ("none", "another count"):
        folder = tmp_path / kind
        shutil.copytree(shards, folder)
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).unlink()
        if kind != "none":
            names = {name: "model-00001-of-00001.safetensors" for name in index["weight_map"]}
            (folder / INDEX).write_text(json.dumps({**index, "weight_map": names}))
        before = sorted(path.name for path in folder.iterdir())
        model = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
        assert torch.equal(model(ids).logits, expected)
        assert model.name_or_path == str(folder)
        assert sorted(path.name for path in folder.iterdir()) == before


def test_shards_that_are_not_whole_are_refused(shards, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(shards, folder)
    (folder / INDEX).unlink()
    files = sorted(folder.glob("*.safetensors"))
    files[1].unlink()
    with pytest.raises(UserError, match=f"no {files[1].name}"):
        inspect_checkpoint(folder)
    shutil.copyfile(files[0], files[1])
    with pytest.raises(UserError, match="in one file"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_of_the_file_is_the_head(same, tmp_path):
    """tie_word_embeddings true and an lm_head in the file: transformers unties where the two differ."""
    folder = make_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.clone() if same else embedding.flip(0).contiguous()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    merged = open_merged(str(folder), None)
    assert merged.config["tie_word_embeddings"] is same
    assert ("lm_head.weight" in merged.shapes) is not same
    if not same:
        assert torch.equal(merged.read("lm_head.weight"), head)
    live = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    assert torch.equal(live.get_output_embeddings().weight.float(), head.float())


def test_resized_embeddings_compute_in_float32(tmp_path):
    """An adapter with added tokens on a 16-bit checkpoint that computes in float32."""
    from peft import LoraConfig, get_peft_model

    base = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base)
    num_tokens = model.config.vocab_size + 2
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    saved = ["embed_tokens", "lm_head"]
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    live = onecard.load_model(str(base), compute_dtype="float32", device="cpu")
    with torch.no_grad():
        z = with_adapter(live, str(tmp_path / "adapter"))(torch.tensor([[5, num_tokens - 1]])).logits
    assert z.dtype == torch.float32 and z.shape[-1] == num_tokens and z.isfinite().all()
