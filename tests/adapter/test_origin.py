"""Behaviour: an adapter's folder tells how its base was stored and which it was; nothing else is taken for it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import onecard
from onecard.adapter.load import with_adapter
from onecard.adapter.origin import FILE, read_origin, sample_base, stored_as
from onecard.config import LoadConfig, QuantConfig, TrainConfig, make_config
from onecard.errors import UserError
from onecard.export.merge.merged import open_merged
from onecard.export.merge.quantized import quantize_checkpoint
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from onecard.train.session import run_training

STORED = {"quant_type": "fp4", "blocksize": 128, "double_quant": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, checkpoint, chats):
    output = tmp_path_factory.mktemp("run") / "o"
    fields = {"model": str(checkpoint), "data": str(chats), "output": str(output), "max_steps": 2, "device": "cpu"}
    run_training(make_config(TrainConfig, {**fields, **STORED, "sample_prompts": []}), False, Console(quiet=True))
    return output / "adapter"


def test_a_run_writes_what_it_stood_on_and_peft_does_not_mind(trained, checkpoint, recwarn):
    assert {key: getattr(read_origin(trained), key) for key in STORED} == STORED
    assert read_origin(trained).model == str(checkpoint)
    recwarn.clear()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), trained)
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]


def test_a_file_of_before_its_later_fields_is_read(trained, checkpoint, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "older"))
    content = json.loads((folder / FILE).read_text())
    for name in ("scales", "train_for", "sha256"):
        content.pop(name, None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / FILE).write_text(json.dumps({**content, "sha256": digest}))
    with_adapter(onecard.load_model(str(checkpoint), device="cpu", **STORED), str(folder))
    (folder / FILE).write_text(json.dumps({**content, "sha256": digest, "model": "another"}))
    with pytest.raises(UserError, match="as training wrote them"):
        read_origin(folder)


def test_what_is_not_given_comes_from_the_run(trained):
    config = stored_as(trained, {"compute_dtype": "float32", "blocksize": 128})
    assert config == LoadConfig(compute_dtype="float32", **STORED)
    with pytest.raises(UserError, match="quant_type fp4"):
        stored_as(trained, {"quant_type": "nf4"})
    assert stored_as(None, {"quant_type": "int4"}) == LoadConfig(quant_type="int4")


def test_a_base_stored_otherwise_is_refused(trained, checkpoint):
    with_adapter(onecard.load_model(str(checkpoint), device="cpu", **STORED), str(trained))
    with pytest.raises(UserError, match="quant_type fp4"):
        with_adapter(onecard.load_model(str(checkpoint), device="cpu"), str(trained))
    with pytest.raises(UserError, match="quant_type fp4"):
        open_merged(str(checkpoint), str(trained), quant=QuantConfig())
    assert open_merged(str(checkpoint), str(trained)).quant == LoadConfig(**STORED)


@pytest.mark.parametrize("factor", ["noise", 1.01, 2.0], ids=str)
def test_another_base_of_the_same_shape_is_refused(factor, trained, checkpoint, tmp_path):
    """Also one whose codes are the same, because a whole weight has another scale."""
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight.mul_(1 + 0.1 * torch.rand(64, 96) if factor == "noise" else factor)
    model.save_pretrained(other)
    with pytest.raises(UserError, match="other weights") as error:
        with_adapter(onecard.load_model(str(other), device="cpu", **STORED), str(trained))
    assert str(checkpoint) in str(error.value)
    for base in ("dequantized", "original"):
        with pytest.raises(UserError, match="other weights"):
            open_merged(str(other), str(trained), base)


def test_the_same_base_in_4_bits_or_other_shards_is_known_again(trained, checkpoint, tmp_path):
    small = quantize_checkpoint(str(checkpoint), str(tmp_path / "small"), QuantConfig(**STORED))
    with_adapter(onecard.load_model(str(small), device="cpu"), str(trained))
    assert open_merged(str(small), str(trained)).quant == LoadConfig(**STORED)
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    open_merged(str(tmp_path / "shards"), str(trained))
    quant = QuantConfig(**{**STORED, "double_quant": True})
    nested = quantize_checkpoint(str(checkpoint), str(tmp_path / "nested"), quant)
    with pytest.raises(UserError, match="double_quant False"):
        open_merged(str(nested), str(trained))


def test_a_sample_is_that_of_all_forms_of_a_base(checkpoint, tmp_path):
    """In 16 bits and in 4, with and without double quantization. A base with one larger weight has another."""
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.model.layers[0].self_attn.o_proj.weight.data.mul_(1.3)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(other)
    samples = []
    for base in (checkpoint, other):
        folders = [Path(base)]
        for nested in (True, False):
            quant = QuantConfig(double_quant=nested)
            folders.append(quantize_checkpoint(str(base), str(tmp_path / f"{Path(base).name}-{nested}"), quant))
        for folder in folders:
            known = read_model(inspect_checkpoint(folder))
            sample = sample_base(inspect_checkpoint(folder), known.modules, known.linears, "nf4", 64)
            assert len(sample.pairs()) == len(known.linears)
            samples.append(sample)
    for i, one in enumerate(samples):
        for j, two in enumerate(samples):
            assert one.codes == two.codes and one.is_of(two) == (i // 3 == j // 3), (i, j)
    old = samples[0]._replace(scales="")
    assert not old.is_of(samples[0])


def test_without_the_file_or_with_a_damaged_one(trained, checkpoint, tmp_path):
    copy = tmp_path / "adapter"
    copy.mkdir()
    for path in trained.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / FILE).write_text(json.dumps({"model": "x"}))
    with pytest.raises(UserError, match="delete it"):
        read_origin(copy)
    (copy / FILE).unlink()
    tuned = with_adapter(onecard.load_model(str(checkpoint), device="cpu", **STORED), str(copy))
    assert tuned(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert open_merged(str(checkpoint), str(copy)).quant == LoadConfig()
