"""Behaviour: what a release of transformers, peft or torch must give; tests/matrix.py runs these in each of them.

Bounds: float32 sums in another order differ by some 1e-6; a cache, mask, norm or factor that is lost, by 1e-1.
"""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import onecard
from onecard.export.merge.merged import merge
from onecard.infer.decoding import CachedContext
from tests.conftest import make_checkpoint
from tests.hf.test_load import dequantized_twin
from tests.train.test_loop import run

FAMILIES = ["llama", "qwen3", "gemma2", "mistral"]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    """A checkpoint, our model of it, and transformers' own on the dequantized weights."""
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    ours = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    return SimpleNamespace(folder=folder, ours=ours, theirs=dequantized_twin(ours, folder))


def random_ids(rows, width):
    return torch.randint(5, 200, (rows, width), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model):
    return model.eval()(random_ids(2, 17)).logits


def off(found, expected):
    """Relative difference."""
    return ((found - expected).norm() / expected.norm()).item()


def test_logits(loaded):
    assert off(logits_of(loaded.ours), logits_of(loaded.theirs)) < 1e-4


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate(loaded, use_cache, padded):
    """The prompt, then token after token over the cache: as transformers generates, which has one or not."""
    ids = random_ids(3, 9) if padded else random_ids(1, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = mask[1, :1] = 0
    settings = {
        "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    found = loaded.ours.generate(ids, use_cache=use_cache, **settings)
    expected = loaded.theirs.generate(ids, use_cache=False, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert off(torch.stack(found.logits), torch.stack(expected.logits)) < 1e-4


@torch.no_grad()
def test_context(loaded):
    """The cache that chat and server use: a prompt in two pieces, then single tokens, against one pass over all."""
    ids = random_ids(1, 24)
    context, expected = CachedContext(loaded.ours), loaded.theirs(ids).logits[0]
    pieces = [ids[0, :9], ids[0, 9:17], *ids[0, 17:].split(1)]
    found = torch.cat([context.feed(piece.tolist()) for piece in pieces])
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0) - 1
    assert off(found, expected[ends]) < 1e-4


@pytest.fixture(scope="module")
def trained(loaded, chats, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    settings = {"num_train_epochs": 3, "validation_split": 0.1, "save_steps": 100, "lora_dropout": 0.0}
    return run(loaded.folder, chats, output, **settings)


def test_train(trained):
    assert trained.report.loss_after < trained.report.loss_before - 0.5


def test_save(loaded, trained):
    """Plain peft reads the adapter onto the dequantized base."""
    plain = PeftModel.from_pretrained(dequantized_twin(loaded.ours, loaded.folder), trained.adapter)
    assert off(logits_of(plain), logits_of(loaded.theirs)) > 1e-2  # it learned something
    assert off(logits_of(trained.model), logits_of(plain)) < 1e-4


def test_merge(loaded, trained, tmp_path):
    merged = merge(str(loaded.folder), str(trained.adapter), str(tmp_path / "merged"))
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert off(logits_of(model), logits_of(trained.model)) < 1e-4
