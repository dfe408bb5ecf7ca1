"""Exact to rounding: NEFTune's noise is transformers' for one document, and each packed document's own."""

import pytest
import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from onecard.train.noise import EmbeddingNoise
from tests.train.test_loop import adapter_bytes, copy_at, run


class Model:
    def __init__(self):
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)

    def get_input_embeddings(self):
        return self.embedding


def test_one_document_is_as_in_transformers():
    """The same random numbers, scaled before or after they are drawn: within two roundings of float32."""
    model, ids = Model(), torch.randint(50, (1, 37))
    plain = model.embedding(ids)
    noise = EmbeddingNoise(model, 5.0)
    noise.cu_seqlens = [0, 37]
    torch.manual_seed(1)
    found = model.embedding(ids)
    noise.remove()
    model.embedding.neftune_noise_alpha = 5.0
    torch.manual_seed(1)
    expected = neftune_post_forward_hook(model.embedding, (ids,), plain)
    size = 5.0 / (37 * 16) ** 0.5
    assert (expected - plain).abs().max() > 0.9 * size
    assert (found - expected).abs().max() <= 4 * 2**-24 * (plain.abs().max() + size)
    model.embedding.eval()
    noise = EmbeddingNoise(model, 5.0)
    assert torch.equal(model.embedding(ids), plain)


def test_a_packed_document_has_the_noise_of_its_own_length():
    model, ids = Model(), torch.randint(50, (1, 1004))
    plain = model.embedding(ids)
    noise = EmbeddingNoise(model, 5.0)
    noise.cu_seqlens = [0, 4, 1004]
    added = model.embedding(ids) - plain
    # Of 64 uniform numbers the largest is above half the bound but for one in 2^64; rounding as above.
    for begin, end in ((0, 4), (4, 1004)):
        size, largest = 5.0 / ((end - begin) * 16) ** 0.5, added[0, begin:end].abs().max()
        assert 0.5 * size < largest <= size * (1 + 2**-20) + 2**-22 * plain.abs().max()


@pytest.mark.parametrize("more", [{"neftune_noise_alpha": 5.0, "loraplus_lr_ratio": 4.0}], ids=str)
def test_a_run_with_noise_resumes_to_the_bit_and_evaluates_without(more, checkpoint, chats, tmp_path):
    settings = {"max_steps": 4, "validation_split": 0.2, "eval_steps": 2, **more}
    first = run(checkpoint, chats, tmp_path / "a", **settings)
    plain = run(checkpoint, chats, tmp_path / "plain", max_steps=4, validation_split=0.2, eval_steps=2)
    assert first.report.loss_before == plain.report.loss_before
    assert first.report.metrics[0]["loss"] != plain.report.metrics[0]["loss"]
    copy_at(tmp_path / "a", tmp_path / "b", 2)
    run(checkpoint, chats, tmp_path / "b", resuming=True, **settings)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
