"""Exact: in float32, an answer in a batch is the answer that its prompt gets alone."""

import pytest
import torch

from onecard.hf.load import load_model, load_tokenizer
from onecard.infer.batch import answer_all, takes_batches
from onecard.infer.generate import generate
from tests.conftest import make_checkpoint

TEXTS = ["how many mugs?", "two", "the lazy dog " * 6, "0123456789", "fox", "the quick brown fox jumps over"]


@pytest.mark.parametrize("family", ["llama", "gemma2", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_answers_are_those_of_each_prompt_alone(family, tmp_path):
    folder = str(make_checkpoint(tmp_path / "m", family))
    model, tokenizer = load_model(folder, compute_dtype=torch.float32, device="cpu"), load_tokenizer(folder)
    assert takes_batches(model)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    goes_on = [i % 2 == 0 for i in range(len(prompts))]
    with torch.no_grad():  # answers of different lengths: a frequent token becomes an end token
        ends = (int(model(torch.tensor([prompts[0]])).logits[0, -1].argmax()),)
    alone = [generate(model, tokenizer, ids, 12, goes_on=on, ends=ends) for ids, on in zip(prompts, goes_on)]
    assert len(set(alone)) > 3 and alone[0] == ""
    for size in (2, 3, 6):
        assert answer_all(model, tokenizer, prompts, 12, size, goes_on, ends) == alone


def test_a_model_that_ignores_the_mask_answers_one_by_one(tmp_path, monkeypatch):
    folder = str(make_checkpoint(tmp_path / "m"))
    model, tokenizer = load_model(folder, compute_dtype=torch.float32, device="cpu"), load_tokenizer(folder)
    whole = model.forward

    def without_mask(*args, attention_mask=None, **kwargs):
        return whole(*args, **kwargs)

    monkeypatch.setattr(model, "forward", without_mask)
    assert not takes_batches(model)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    monkeypatch.setattr("onecard.infer.batch.answer_batch", lambda *_: pytest.fail("in a batch"))
    assert len(answer_all(model, tokenizer, prompts, 4, 3, [False] * 6)) == 6
