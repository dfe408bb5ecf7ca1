"""Exact: what the demo ships is whole, small, and keeps its held-out customers out of training."""

import json
from pathlib import Path

import pytest

from onecard.config import DataConfig, TrainConfig, make_config
from onecard.data.chat.mask import prompt_ids
from onecard.data.load import load_dataset
from onecard.demo.run import FOLDER, SETTINGS, read_rows
from onecard.hf.load import load_tokenizer

LARGEST_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SETTINGS["model"])


def customers(name):
    rows = read_rows(FOLDER / "data" / name)
    return [json.loads(row["messages"][1]["content"])["customer"] for row in rows]


def test_size():
    files = [path for part in ("base", "data") for path in (FOLDER / part).iterdir()]
    assert sum(path.stat().st_size for path in files) <= LARGEST_BYTES


def test_heldout_customers_are_in_no_training_row():
    train, heldout = customers("train.jsonl"), customers("heldout.jsonl")
    assert len(train) == 1000 and len(heldout) == 128
    assert not set(train) & set(heldout)


def test_every_row_is_read_and_generation_starts_where_learning_does(tokenizer):
    config = DataConfig()
    dataset = load_dataset(SETTINGS["eval_data"], tokenizer, config)
    assert len(dataset.examples) == 128 and not dataset.bad
    for example, row in zip(dataset.examples, read_rows(Path(SETTINGS["eval_data"]))):
        prompt = prompt_ids(row["messages"][:-1], tokenizer)
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels[: len(prompt)] == [-100] * len(prompt)
        assert example.labels[len(prompt)] == example.input_ids[len(prompt)]


def test_pad_is_never_learned(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_settings_are_valid():
    make_config(TrainConfig, {**SETTINGS, "output": "-"}, "demo")
