"""Exact: each kind of damage to an adapter, and each setting that cannot be, is an error that says so."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file

import onecard
from onecard.adapter.layers import lora_config
from onecard.adapter.load import with_adapter
from onecard.config import LoraSettings, SamplingConfig, make_config
from onecard.errors import UserError
from onecard.hf.load import load_tokenizer
from onecard.infer import decoding
from onecard.infer.chat import Talk
from onecard.infer.generate import generate

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def model(checkpoint):
    return onecard.load_model(str(checkpoint), compute_dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = onecard.load_model(str(checkpoint), compute_dtype="float32", device="cpu")
    settings = make_config(LoraSettings, {"r": 4, "target_modules": ["q_proj"]})
    get_peft_model(base, lora_config(settings)).save_pretrained(folder)
    return folder


def edit(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def edit_config(**fields):
    def damage(folder):
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in (found | fields).items() if v is not None}))

    return damage


DAMAGES = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "no config": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "config not JSON": (lambda f: (f / CONFIG).write_text("{"), CONFIG),
    "config without peft_type": (edit_config(peft_type=None), "peft_type"),
    "unknown peft_type": (edit_config(peft_type="LOORA"), "LOORA"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]), "truncated"),
    "another rank": (edit_config(r=8), NAME),
    "another model's modules": (edit_config(target_modules=["c_attn"]), "c_attn"),
    "missing tensor": (edit(lambda t: t.pop(NAME)), NAME),
    "extra tensor": (edit(lambda t: t.update(extra=torch.zeros(1))), "extra"),
    "integers": (edit(lambda t: t.update({NAME: t[NAME].to(torch.int32)})), f"{NAME}: an adapter's tensors"),
    "NaN": (edit(lambda t: t[NAME].view(-1)[5].fill_(float("nan"))), f"{NAME}: every parameter"),
    "trained over a changed base": (edit_config(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "an init that reads 16-bit weights": (edit_config(init_lora_weights="mica"), "leave a 4-bit base as it is"),
}


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_damaged_adapter_is_named(kind, model, adapter, tmp_path):
    damage, named = DAMAGES[kind]
    folder = tmp_path / "copy"
    shutil.copytree(adapter, folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        with_adapter(model, str(folder))
    assert named in str(error.value)


WRONG = [
    {"temperature": -1.0}, {"temperature": 3.0}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"repetition_penalty": 0},
    {"frequency_penalty": 3}, {"presence_penalty": -2.5}, {"logit_bias": {5: 101}}, {"logit_bias": {-1: 1}},
    {"logit_bias": ["5"]}, {"stop": [""]},
]  # fmt: skip


@pytest.mark.parametrize("settings", WRONG)
def test_sampling_that_cannot_be(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        SamplingConfig(**settings)


def test_settings_that_cannot_be(model, checkpoint):
    tokenizer = load_tokenizer(str(checkpoint))
    with pytest.raises(UserError, match="must"):
        generate(model, tokenizer, [5, 6], 0)
    with pytest.raises(UserError, match="must"):
        Talk(model, tokenizer, Console(), 0, SamplingConfig())
    with pytest.raises(UserError, match="a bias must be of one of the model's 304 tokens\n  found: token 9999999"):
        generate(model, tokenizer, [5, 6], 3, SamplingConfig(logit_bias={9999999: 1}))


def test_an_answer_ends_with_the_model_s_context(model, checkpoint, monkeypatch):
    """256 positions: a prompt that fills them has one token for an answer, and one that is longer is refused."""
    monkeypatch.setattr(decoding, "end_tokens", lambda *_: [])
    tokenizer = load_tokenizer(str(checkpoint))
    for num_tokens, most in ((200, 57), (256, 1)):
        answer = decoding.Answer(model, tokenizer, [5] * num_tokens, 100, SamplingConfig())
        while answer.finish_reason is None:
            answer.advance()
        assert (answer.num_tokens, answer.finish_reason) == (most, "length")
    for ids in ([], [5] * 257):
        with pytest.raises(UserError, match="leave room"):
            generate(model, tokenizer, ids)
