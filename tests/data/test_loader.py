"""Exact: packing's invariants; the stream after any resume is the stream without it."""

import random

import pytest
import torch

from onecard.config import DataConfig
from onecard.data.chat.mask import Example
from onecard.data.load import load_dataset
from onecard.data.loader import Loader
from onecard.data.packing import collate, packed
from onecard.data.preview import render_preview
from tests.conftest import make_tokenizer


def examples(count, seed=0):
    rng = random.Random(seed)
    made = []
    for i in range(count):
        ids = [rng.randint(5, 99) for _ in range(rng.randint(2, 30))]
        made.append(Example(ids, [-100, *ids[1:]], f"f:{i}"))
    return made


@pytest.mark.parametrize("seed", range(20))
def test_first_fit(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 64) for _ in range(rng.randint(1, 200))]
    free, expected = [], []
    for i, length in enumerate(lengths):
        row = next((r for r, left in enumerate(free) if left >= length), None)
        if row is None:
            row = len(free)
            free.append(64)
            expected.append([])
        free[row] -= length
        expected[row].append(i)
    assert packed(lengths, 64) == expected


def test_rows_restart_positions_and_mask_first_tokens():
    parts = examples(5)
    batch = collate(parts)
    ends = batch["cu_seqlens"]
    assert batch["input_ids"].shape == (1, ends[-1]) and ends[0] == 0
    for part, start, end in zip(parts, ends, ends[1:]):
        assert batch["input_ids"][0, start:end].tolist() == part.input_ids
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
        assert batch["labels"][0, start] == -100


@pytest.mark.parametrize("packing", [True, False])
def test_resume_at_every_position(packing):
    make = lambda: Loader(examples(13), 64, packing, 2, seed=3)  # noqa: E731
    straight, states = make(), []
    stream = []
    for _ in range(20):
        states.append(straight.state_dict())
        stream.append(straight.next_batch())
    for k, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(state)
        for expected in stream[k:]:
            found = resumed.next_batch()
            assert all(torch.equal(found[key], expected[key]) for key in ("input_ids", "labels", "position_ids"))


def test_an_epoch_has_every_example_once_and_epochs_differ():
    loader = Loader(examples(13), 64, True, 2, seed=3)
    seen = [sorted(i for batch in loader.batches(epoch) for i in batch) for epoch in (0, 1)]
    assert seen == [list(range(13))] * 2
    assert loader.batches(0) != loader.batches(1)


def test_preview_shows_what_is_learned(chats):
    from rich.console import Console

    tokenizer = make_tokenizer()
    dataset = load_dataset(str(chats), tokenizer, DataConfig())
    console = Console(width=100, color_system=None, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_preview(dataset, tokenizer, True, 2, colour=False))
    text = console.export_text()
    assert "[[0 blue mugs, please<|im_end|>]]" in text
    assert "share supervised" in text and "packed rows" in text
