"""Exact: terms against the parameters of real models; public models' sizes against what they are known for."""

import pytest
import torch

import onecard
from onecard.config import parse_bytes
from onecard.errors import UserError
from onecard.hf.load import meta_model
from onecard.memory.model import known_config
from onecard.memory.plan import plan
from onecard.memory.shapes import KNOWN

BILLIONS = {
    "llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-2-70b": 68.98, "llama-3-8b": 8.03, "llama-3-70b": 70.55,
    "llama-3.1-405b": 405.85, "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "mistral-7b": 7.24,
    "mistral-large-123b": 122.61, "qwen2.5-0.5b": 0.49, "qwen2.5-7b": 7.62, "qwen2.5-72b": 72.71,
    "qwen3-0.6b": 0.60, "qwen3-8b": 8.19, "qwen3-32b": 32.76,
}  # fmt: skip


@pytest.mark.parametrize("name", BILLIONS)
def test_public_models_have_their_published_size(name):
    count = sum(p.numel() for p in meta_model(known_config(name), name).parameters())
    assert round(count / 1e9, 2) == pytest.approx(BILLIONS[name], abs=0.0101)


def test_every_known_name_gives_a_plan():
    assert all(plan(name).total_bytes > 0 for name in KNOWN)


def test_the_terms_of_a_loaded_model(checkpoint):
    """What the model holds is what the plan says, to the byte."""
    found = {term.name: term.num_bytes for term in plan(str(checkpoint), r=4, compute_dtype="bfloat16").terms}
    model = onecard.load_model(str(checkpoint), compute_dtype=torch.bfloat16, device="cpu")
    quantized = [module for module in model.modules() if hasattr(module, "quant_state")]
    assert found["base, 4-bit codes"] == sum(module.weight.nbytes for module in quantized)
    assert found["base, scales"] == sum(module.state.nbytes for module in quantized)
    others = sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    assert found["embeddings, norms, head"] == others
    assert found["LoRA weights"] == sum(4 * 4 * (m.in_features + m.out_features) for m in quantized)


def test_the_article_s_bill():
    """A 7B model: 16 bytes a weight in full, two with LoRA, about half with QLoRA, in at most 6 GB at 512 tokens."""
    full, lora, qlora = (plan("llama-2-7b", method, max_seq_length=512).total_bytes for method in
                         ("full", "lora", "qlora"))  # fmt: skip
    assert 107e9 < full < 115e9
    assert 14e9 < lora < 24e9
    assert qlora <= 6e9


def test_what_fits():
    found = plan("llama-2-7b", device_memory_bytes=8 * 10**9)
    assert found.fits and found.largest_length and found.largest_batch
    at = plan("llama-2-7b", max_seq_length=found.largest_length)
    assert at.total_bytes <= 8 * 10**9 or found.largest_length == 4096
    more = plan("llama-2-7b", per_device_train_batch_size=found.largest_batch + 1)
    assert more.total_bytes > 8 * 10**9
    none = plan("llama-2-70b", device_memory_bytes=10**9)
    assert (none.fits, none.largest_length, none.largest_batch) == (False, 0, 0)


@pytest.mark.parametrize("fields", [{"model": "llama-2-7"}, {"model": "llama-2-7b", "method": "x"}, {"rr": 3}])
def test_mistakes(fields):
    with pytest.raises(UserError):
        plan(**{"model": "llama-2-7b", **fields})


def test_a_near_name_is_offered():
    with pytest.raises(UserError, match="llama-2-7b"):
        plan("llama-2-7")


@pytest.mark.parametrize("text, expected", [("24GiB", 24 << 30), ("6 GB", 6 * 10**9), ("1.5mb", 1_500_000), ("7", 7)])
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-3GB", "3 parsecs"])
def test_bad_sizes(text):
    with pytest.raises(UserError):
        parse_bytes(text)
