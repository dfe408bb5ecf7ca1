"""No worse than plain: sentence-transformers' embeddings on a 4-bit model are those of the dequantized weights, in
float32. Behaviour: its trainer trains an adapter on it. Skipped where sentence-transformers is not installed."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from onecard.nn.linear import Linear4bit

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
SAID = ("two blue mugs", "a lazy dog", "a quick fox", "the brown one")
PAIRS = [{"anchor": f"{SAID[i % 4]} {i}", "positive": f"how many? {i}"} for i in range(8)]


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "embeddings.py"
    spec = importlib.util.spec_from_file_location("embeddings_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_embeddings_are_the_last_hidden_states(example, checkpoint):
    embedder = example.load_embedder(str(checkpoint), dtype="float32")
    decoder, tokenizer = embedder[0].auto_model, embedder[0].tokenizer
    plain = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    replaced = 0
    for path, module in decoder.named_modules():
        if isinstance(module, Linear4bit):
            plain.get_submodule(path).weight.data = module.dequantize()
            replaced += 1
    assert replaced == 14
    found = embedder.encode([row["anchor"] for row in PAIRS])  # in batches with padding
    with torch.no_grad():
        ids = [tokenizer(row["anchor"], return_tensors="pt").input_ids for row in PAIRS]
        hidden = torch.cat([plain(input_ids=each).last_hidden_state[:, -1] for each in ids])
    expected = torch.nn.functional.normalize(hidden).numpy()
    assert np.abs(found - expected).max() <= 1e-5  # of vectors of length 1
    assert np.abs(found @ found.T - np.eye(len(found))).max() > 1e-2  # they differ, but not at random


def test_its_trainer_trains_an_adapter(example, checkpoint, tmp_path):
    embedder = example.load_embedder(str(checkpoint), dtype="float32")
    before = embedder.encode([row["anchor"] for row in PAIRS])
    how = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    losses = example.train(embedder, PAIRS, str(tmp_path / "out"), use_cpu=True, bf16=False, disable_tqdm=True, **how)
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0], losses
    after = embedder.encode([row["anchor"] for row in PAIRS])
    again = example.load_embedder(str(checkpoint), str(tmp_path / "out" / "adapter"), dtype="float32")
    assert np.abs(again.encode([row["anchor"] for row in PAIRS]) - after).max() <= 1e-6
    assert np.abs(after - before).max() > 1e-2
    assert example.share_first(embedder, PAIRS) >= example.share_first(example.load_embedder(str(checkpoint)), PAIRS)
