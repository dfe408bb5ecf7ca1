"""Exact: packing's invariants on random lengths, the loader's order, and what the preview shows.

The one bound is on time: 100,000 documents in 10 seconds is ten times what a slow core needs, and far below what
a search over all rows takes.
"""

import itertools
import random
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from onecard.config import DataConfig
from onecard.data.chat.mask import Example
from onecard.data.load import load_dataset
from onecard.data.loader import Loader
from onecard.data.packing import collate, first_fit, pack, packed
from onecard.data.preview import render_preview
from tests.conftest import chat_rows, make_tokenizer, write_rows
from tests.forks import Forked


def make_examples(lengths):
    rng = random.Random(len(lengths))
    made = []
    for i, length in enumerate(lengths):
        ids = [rng.randint(1, 99) for _ in range(length)]
        made.append(Example(ids, [-100, *ids[1:]], f"f:{i}"))
    return made


@pytest.mark.parametrize("seed", range(30))
def test_pack_keeps_its_invariants(seed):
    rng = random.Random(seed)
    room = rng.choice([1, 8, 100, 4096])
    lengths = [rng.randint(1, room) for _ in range(rng.choice([0, 1, 2, 63, 64, 65, 500]))]
    rows = packed(lengths, room)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))  # each document once
    fills = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < fill <= room for fill in fills)
    assert all(row == sorted(row) for row in rows)  # in order of arrival
    assert sum(2 * fill <= room for fill in fills) <= 1  # two half-empty rows would have been one
    slow = first_fit(np.array(lengths, np.int32), room, 1 << max(0, len(lengths) - 1).bit_length())
    assert slow.tolist() == pack(np.array(lengths, np.int32), room).tolist()


def test_pack_is_fast():
    rng = random.Random(0)
    lengths = np.array([rng.randint(1, 600) for _ in range(100_000)], np.int32)
    start = time.process_time()
    first_fit(lengths, 4096, 1 << 17)
    assert time.process_time() - start < 10


def test_no_document_predicts_the_next_ones_first_token():
    careless = [Example([5, 6], [5, 6], "f:1"), Example([7, 8], [7, 8], "f:2")]
    batch = collate(careless, 64)
    assert batch["labels"][0, :4].tolist() == [-100, 6, -100, 8] and set(batch["labels"][0, 4:].tolist()) == {-100}
    assert {name: batch[name].dtype for name in ("input_ids", "labels", "position_ids")} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), torch.int64
    )
    assert batch["cu_seqlens"] == [0, 2, 4, 64] and all(type(end) is int for end in batch["cu_seqlens"])
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1, *range(60)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_stream_after_a_resume_is_the_stream(packing, batch_size):
    examples = make_examples([3, 9, 14, 2, 8, 5, 16, 4, 4, 7, 11])
    straight = Loader(examples, 16, packing, batch_size, seed=7)
    epochs = sum(straight.num_batches(epoch) for epoch in range(3))
    states, stream = [], []
    for _ in range(epochs + 1):  # past the end of the third epoch
        states.append(straight.state_dict())
        stream.append(straight.next_batch())
    assert {"epoch": 0, "batch": straight.num_batches(0)} in states  # exactly at an epoch's end
    for k, state in enumerate(states):
        resumed = Loader(examples, 16, packing, batch_size, seed=7)
        torch.rand(k)  # the global generator has no say
        resumed.load_state_dict(state)
        for expected, found in zip(stream[k:], resumed):
            assert all(torch.equal(found[name], expected[name]) for name in ("input_ids", "labels", "position_ids"))
            assert found["cu_seqlens"] == expected["cu_seqlens"]


def test_each_epoch_holds_each_example_once_and_seeds_matter():
    examples = make_examples([3, 9, 14, 2, 8, 5, 16, 4])
    loader = Loader(examples, 16, True, 2, seed=0)
    for epoch in range(3):
        assert sorted(itertools.chain(*loader.batches(epoch))) == list(range(8))
    assert list(loader.batches(0)) != list(Loader(examples, 16, True, 2, seed=1).batches(0))
    Loader(examples, 16, True, 2, seed=10**30).next_batch()  # any seed that the config takes


def print_fingerprint(path):
    print(load_dataset(str(path), make_tokenizer(), DataConfig()).fingerprint())


def test_the_fingerprint_is_the_same_in_another_process_and_tells_a_change(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", chat_rows(5))
    dataset = load_dataset(str(path), make_tokenizer(), DataConfig())
    code, out, err = Forked(print_fingerprint, path).wait()  # texts have other hashes there
    assert code == 0 and out.strip() == dataset.fingerprint(), err
    first = dataset.examples[0]
    changed = [replace(first, labels=[-100] * len(first.labels)), *dataset.examples[1:]]
    assert replace(dataset, examples=list(dataset.examples)).fingerprint() == dataset.fingerprint()
    assert replace(dataset, examples=changed).fingerprint() != dataset.fingerprint()


def test_a_split_parts_the_examples_the_same_way_each_time(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", chat_rows(20))
    dataset = load_dataset(str(path), make_tokenizer(), DataConfig())
    training, held = dataset.split(0.25, seed=3)
    assert (len(training.examples), len(held.examples)) == (15, 5)
    places = [example.where for example in [*training.examples, *held.examples]]
    assert sorted(places) == sorted(example.where for example in dataset.examples)
    assert dataset.split(0.25, seed=3)[1].fingerprint() == held.fingerprint()
    assert dataset.split(0.25, seed=4)[1].fingerprint() != held.fingerprint()


def printed(dataset, tokenizer, colour=False):
    console = Console(width=120, color_system="truecolor" if colour else None, force_terminal=colour)
    with console.capture() as captured:
        console.print(render_preview(dataset, tokenizer, True, 1, colour))
    return captured.get()


def test_the_preview_takes_no_orders_from_the_data(tmp_path):
    turns = [{"role": "user", "content": "[red]how?[/red] \x1b[31m"}, {"role": "assistant", "content": "two\nmugs"}]
    path = write_rows(tmp_path / "d.jsonl", [{"messages": turns}, {"messages": []}, {"text": "a"}])
    tokenizer = make_tokenizer()
    text = printed(load_dataset(str(path), tokenizer, DataConfig(on_bad_rows="skip")), tokenizer)
    assert "[red]how?[/red] \\x1b[31m" in text and "\x1b" not in text
    assert "[[two↵\nmugs<|im_end|>]]" in text
    assert "d.jsonl:2:messages" in text and "d.jsonl:3:messages" in text


def test_the_preview_colours_what_is_learned(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", chat_rows(1))
    tokenizer = make_tokenizer()
    text = printed(load_dataset(str(path), tokenizer, DataConfig()), tokenizer, colour=True)
    assert "\x1b[1;32m0 blue mugs, please<|im_end|>" in text and "[[" not in text


def test_the_share_of_truncated_counts_the_dropped_too(tmp_path):
    rows = [{"prompt": "the lazy dog " * 20, "completion": "mugs"}, {"prompt": "two", "completion": "the fox " * 30}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    tokenizer = make_tokenizer()
    shown = printed(load_dataset(str(path), tokenizer, DataConfig(max_seq_length=16)), tokenizer)
    assert re.search(r"share truncated +100\.0%", shown)
