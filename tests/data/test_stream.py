"""Exact: a stream gives each row once a pass, in the same micro-batches wherever it is resumed, and names bad rows."""

import json
from collections import Counter

import pytest

from onecard.config import TrainConfig, make_config
from onecard.data import stream as stream_module
from onecard.data.stream import Stream, StreamLoader
from onecard.errors import UserError
from tests.conftest import make_tokenizer, write_rows


def texts(count):
    return [{"text": f"how many {i}" + " the" * (i % 5)} for i in range(count)]


def settings(path, **more):
    fields = {"model": "m", "data": str(path), "streaming": True, "max_steps": 9, "max_seq_length": 32, **more}
    return make_config(TrainConfig, fields)


def opened(path, seed=0, packing=True, **more):
    stream = Stream(settings(path, **more), make_tokenizer(), (None, None))
    return stream, StreamLoader(stream, 32, packing, 1, seed)


def read(loader, count):
    """The next micro-batches as plain values, each with the position before it."""
    found = []
    for _ in range(count):
        state, batch = loader.state_dict(), loader.next_batch()
        found.append((state, batch["input_ids"].tolist(), batch["labels"].tolist(), batch["cu_seqlens"]))
    return found


def test_each_row_once_a_pass(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"text": f"how many {i}"} for i in range(47)])
    stream, loader = opened(path, packing=False, buffer_size=10)
    tokenizer, seen = stream.tokenizer, []
    while loader.epoch < 2:
        seen.append(tokenizer.decode(loader.next_batch()["input_ids"][0], skip_special_tokens=True))
    first, second = seen[:47], seen[47:94]
    assert Counter(first) == Counter(second) and len(set(first)) == 47
    assert first != second and first != sorted(first)
    assert set(first[:10]) == {f"how many {i}" for i in range(10)}, "a buffer is shuffled by itself"
    assert loader.num_batches_done == 95 and loader.num_epochs_done == 2
    assert stream.summary()["examples"] == 47


def test_the_same_micro_batches_from_any_position(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", texts(53))
    whole = read(opened(path, buffer_size=11)[1], 80)
    assert whole[-1][0]["epoch"] > 0 and len({str(ids) for _, ids, *_ in whole}) > 20
    for at in range(0, 78):
        loader = opened(path, buffer_size=11)[1]
        loader.load_state_dict(whole[at][0])
        assert read(loader, 2) == whole[at : at + 2]
        assert loader.num_batches_done == at + 2
    assert read(opened(path, seed=1, buffer_size=11)[1], 3) != whole[:3]


def test_back_to_an_earlier_buffer(tmp_path):
    loader = opened(write_rows(tmp_path / "d.jsonl", texts(40)), buffer_size=7)[1]
    whole = read(loader, 30)
    for at in (20, 3, 29, 0):
        loader.load_state_dict(whole[at][0])
        assert read(loader, 1) == whole[at : at + 1]


def test_held_rows_are_not_trained(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"text": f"how many {i}"} for i in range(30)])
    stream, loader = opened(path, packing=False, buffer_size=20, validation_split=0.25)
    assert stream.held is not None and len(stream.held.examples) == 5
    held = {example.where for example in stream.held.examples}
    trained = set()
    while loader.epoch < 2:
        batch = loader.next_batch()
        trained |= {loader.examples[index].where for index in batch["indices"]}
    assert not held & trained and len(held | trained) == 30


def test_a_bad_row_behind_the_first_buffer_is_named(tmp_path):
    rows = [{"text": f"how many {i}"} for i in range(30)]
    rows[25] = {"text": 5}
    path = write_rows(tmp_path / "d.jsonl", rows)
    loader = opened(path, packing=False, buffer_size=10)[1]
    with pytest.raises(UserError, match=r"d\.jsonl:26:text"):
        read(loader, 30)
    stream, loader = opened(path, packing=False, buffer_size=10, on_bad_rows="skip")
    read(loader, 30)
    assert stream.summary()["bad rows skipped"] == 1 and stream.summary()["examples"] == 29


def test_a_buffer_of_long_rows_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "MOST_CHARACTERS", 100)
    path = write_rows(tmp_path / "d.jsonl", [{"text": "how many the " * 3} for _ in range(20)])
    stream, loader = opened(path, packing=False)
    assert stream.first[1] == 3
    read(loader, 20)
    assert sorted(stream.counts) == list(range(0, 20, 3))


def test_a_shorter_file_is_told(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", texts(30))
    state = read(opened(path, buffer_size=10)[1], 12)[-1][0]
    assert state["row"] > 9
    write_rows(path, texts(10))
    loader = opened(path, buffer_size=10)[1]
    with pytest.raises(UserError, match="the data it began with"):
        loader.load_state_dict({**state, "row": 20})


def test_the_fingerprint_follows_rows_and_size(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", texts(30))
    first = opened(path, buffer_size=10)[0].fingerprint()
    assert opened(path, buffer_size=10)[0].fingerprint() == first
    path.write_text(path.read_text() + json.dumps({"text": "how"}) + "\n")
    assert opened(path, buffer_size=10)[0].fingerprint() != first


@pytest.mark.parametrize(
    "more, match",
    [
        ({"max_steps": None}, "needs max_steps"),
        ({"data": ["a.jsonl", "b.jsonl"]}, "one source"),
        ({"loss": "dpo"}, "loss sft"),
        ({"save_strategy": "epoch"}, "end of an epoch"),
    ],
)
def test_what_a_stream_cannot_know_is_refused(more, match):
    with pytest.raises(UserError, match=match):
        settings("d.jsonl", **more)
