"""Exact: save_pretrained writes bitsandbytes' 4-bit format; ours and theirs dequantize to the same bytes, both ways."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import onecard
from onecard.adapter.layers import lora_config
from onecard.config import LoraSettings
from onecard.errors import UserError
from onecard.hf.fingerprint import fingerprint
from onecard.nn.linear import Linear4bit
from tests.conftest import FAMILIES, make_checkpoint

WIDE = {"hidden_size": 128, "intermediate_size": 192, "dtype": torch.bfloat16}
STORED = [("nf4", True), ("fp4", False), ("nf4", False), ("fp4", True)]
EVERY = [(family, *stored) for family in FAMILIES for stored in STORED]
FIRST = [(family, *STORED[i % 4]) for i, family in enumerate(FAMILIES)]


def settings(quant_type, double_quant):
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": torch.float32,
    }


def differing_bytes(ours, theirs):
    """Bytes of the dequantized weights that differ, and the number of weights.

    No forward comes before, as on some CPUs bitsandbytes repacks its weights in one. Rows are multiples of the
    blocksize: for others, bitsandbytes 0.50.2 on a CPU starts a block with each row, unlike its own quantization.
    """
    from bitsandbytes.functional import dequantize_4bit

    weights = {name: module for name, module in ours.named_modules() if isinstance(module, Linear4bit)}
    wrong = 0
    for name, module in weights.items():
        weight = theirs.get_submodule(name).weight
        W = dequantize_4bit(weight.data, weight.quant_state)
        found = onecard.dequantize_4bit(module.weight, module.loaded_state)
        assert found.dtype == W.dtype and found.shape == W.shape, name
        wrong += int((found.contiguous().view(torch.uint8) != W.contiguous().view(torch.uint8)).sum())
    return wrong, len(weights)


@pytest.mark.parametrize(
    "family, quant_type, double_quant",
    [case if case in FIRST else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY],
)
def test_round_trips_differ_in_no_byte(family, quant_type, double_quant, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    source = make_checkpoint(tmp_path / "base", family, **WIDE)
    expected = 2 * (4 if family == "phi3" else 7)
    shards = {"max_shard_size": "200KB"} if double_quant else {}
    config = onecard.BitsAndBytesConfig(**settings(quant_type, double_quant))
    ours = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path / "ours", **shards)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == double_quant
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(theirs.get_submodule("model.layers.0.mlp.down_proj"), bnb.nn.Linear4bit)
    assert differing_bytes(ours, theirs) == (0, expected)
    again = onecard.load_model(str(tmp_path / "ours"), compute_dtype="float32", device="cpu")
    assert differing_bytes(again, theirs) == (0, expected)
    with pytest.warns(UserWarning, match="quantization_config"):  # transformers goes by the checkpoint's own
        third = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", quantization_config=config)
    assert differing_bytes(again, third) == (0, expected)

    config = BitsAndBytesConfig(**settings(quant_type, double_quant))
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", **shards)
    loaded = onecard.load_model(str(tmp_path / "theirs"), compute_dtype="float32", device="cpu")
    assert differing_bytes(loaded, theirs) == (0, expected)
    told = loaded.config.quantization_config
    assert (told.bnb_4bit_quant_type, told.bnb_4bit_use_double_quant) == (quant_type, double_quant)
    loaded.save_pretrained(tmp_path / "back")  # what was loaded in 4 bits is saved again, bit for bit
    assert fingerprint(onecard.load_model(str(tmp_path / "back"), compute_dtype="float32", device="cpu")) == (
        fingerprint(loaded)
    )


def test_the_files_are_those_of_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    source = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    for name, kind in (("ours", onecard.BitsAndBytesConfig), ("theirs", BitsAndBytesConfig)):
        config = kind(**settings("nf4", False))
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        if "quant_state" in name:
            facts = [json.loads(bytes(found[name].tolist())) for found in (ours, theirs)]
            assert facts[0] == facts[1], name
        else:
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    fields = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("ours", "theirs")
    ]
    assert {key: fields[1][key] for key in fields[0]} == fields[0]


@pytest.mark.parametrize("blocksize", [32, 128])
def test_any_blocksize_is_in_the_weights_own_tensors(blocksize, tmp_path):
    pytest.importorskip("bitsandbytes")
    source = make_checkpoint(tmp_path / "base", **{**WIDE, "head_dim": 32, "intermediate_size": 256})
    ours = onecard.load_model(str(source), blocksize=blocksize, compute_dtype="float32", device="cpu")
    ours.save_pretrained(tmp_path / "ours")
    assert differing_bytes(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) == (0, 14)
    assert fingerprint(onecard.load_model(str(tmp_path / "ours"), compute_dtype="float32", device="cpu")) == (
        fingerprint(ours)
    )


def test_what_the_format_does_not_hold_is_an_error(tmp_path):
    source = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="nf4 and fp4"):
        onecard.load_model(str(source), quant_type="int4", device="cpu").save_pretrained(tmp_path / "out")
    paged = onecard.load_model(str(source), device="cpu", weights_budget=1 << 30, page_folder=tmp_path / "p")
    with pytest.raises(UserError, match="paged base"):
        paged.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_transposed_and_tied_weights_come_back(tied, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32, tie_word_embeddings=tied)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    ours = onecard.load_model(str(tmp_path / "base"), compute_dtype="float32", device="cpu")
    ours.save_pretrained(tmp_path / "ours")
    again = onecard.load_model(str(tmp_path / "ours"), compute_dtype="float32", device="cpu")
    assert fingerprint(again) == fingerprint(ours)
    assert differing_bytes(again, AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) == (0, 4)
    embedding, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (embedding is head) == tied


def test_an_adapter_s_save_pretrained_writes_the_adapter_only(tmp_path, checkpoint):
    model = get_peft_model(onecard.load_model(str(checkpoint), device="cpu"), lora_config(LoraSettings(r=4)))
    model.save_pretrained(tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
