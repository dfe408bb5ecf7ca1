"""Exact: examples that go through processes and a mapped file are those made here, and a changed input is read anew."""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from onecard.adapter.form import form_of
from onecard.config import DataConfig
from onecard.data import examples as examples_module
from onecard.data import store, workers
from onecard.data.chat.mask import IGNORE, Example
from onecard.data.examples import Examples
from onecard.data.load import load_dataset
from onecard.data.store import ENTRY, FILE, SUMMARY, TEMPORARY
from onecard.errors import UserError
from tests.conftest import CHATML, chat_rows, make_tokenizer, write_rows
from tests.forks import Forked

LONG_AGO = 1_700_000_000


def old(path: Path) -> Path:
    """The file, with a time at which it was not changed just now."""
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


@pytest.fixture
def small(monkeypatch):
    """Few tokens and few rows are already many."""
    monkeypatch.setattr(examples_module, "BATCH_TOKENS", 150)
    monkeypatch.setattr(workers, "FEW", 5)
    monkeypatch.setattr(workers, "CHUNK", 3)
    monkeypatch.setattr(workers, "num_cores", lambda: 3)


def rows_of(dataset):
    return [replace(example, notes=()) for example in dataset.examples], list(dataset.records)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def test_examples_are_what_they_were_made_of():
    rng = random.Random(0)
    made = []
    for i in range(300):
        length = rng.randint(2, 40)
        ids = [rng.randint(0, 2**32 - 1) for _ in range(length)]
        labels = [token if rng.random() < 0.5 and k else IGNORE for k, token in enumerate(ids)]
        made.append(Example(ids, labels, f"f:{i}", i % 3 == 0, i % 6 == 0, (), i % 2 and length // 2, i % 5 > 0))
    stored = Examples.of(made)
    assert list(stored) == made and stored[-1] == made[-1] and list(stored[3:9]) == made[3:9]
    order = [rng.randrange(300) for _ in range(400)]
    chosen = stored.take(order).take(range(399, -1, -1))
    expected = [made[i] for i in reversed(order)]
    assert list(chosen) == expected
    assert chosen.lengths.tolist() == [len(each.input_ids) for each in expected]
    assert chosen.num_supervised.tolist() == [each.num_supervised for each in expected]
    assert chosen.longest_documents.tolist() == [max(each.lengths) for each in expected]
    joined = Examples.joined([chosen[:7], stored.take([1, 0])])
    assert list(joined) == [*expected[:7], made[1], made[0]]
    with pytest.raises(IndexError):
        stored[300]


def test_turns_are_the_runs_of_learned_tokens(small):
    rng = random.Random(1)
    made, ends, inside = [], Counter(), set()
    for i in range(200):
        ids = [rng.randrange(50) for _ in range(rng.randint(1, 12))]
        learned = [k > 0 and rng.random() < 0.6 for k in range(len(ids))]
        made.append(Example(ids, [t if yes else IGNORE for t, yes in zip(ids, learned)], f"f:{i}", rng.random() < 0.5))
        for k, token in enumerate(ids):
            if learned[k] and (made[-1].truncated if k + 1 == len(ids) else learned[k + 1]):
                inside.add(token)
            elif learned[k]:
                ends[token] += 1
    turns = Examples.of(made).turns
    assert turns.ends == ends and turns.inside == inside


def test_many_examples_are_tokenized_once_and_equal(tmp_path, small, monkeypatch):
    rows = [*chat_rows(60), {"messages": [{"role": "user", "content": "no answer"}]}]
    path, tokenizer = old(write_rows(tmp_path / "d.jsonl", rows)), make_tokenizer()
    config = DataConfig(data_cache=str(tmp_path / "cache"), on_bad_rows="skip", max_seq_length=48)
    first = load_dataset(str(path), tokenizer, config)
    (entry,) = entries(tmp_path / "cache")
    assert {each.name for each in entry.iterdir()} == {FILE, SUMMARY}
    monkeypatch.undo()
    plain = load_dataset(str(path), tokenizer, config.model_copy(update={"data_cache": str(tmp_path / "none")}))
    assert entries(tmp_path / "none") == []  # few tokens stay in memory
    monkeypatch.setattr("onecard.data.load.open_records", None)
    again = load_dataset(str(path), tokenizer, config)
    assert again.notices == [*plain.notices, f"tokenized before, read from {entry}"]
    for found in (first, again):
        assert rows_of(found) == rows_of(plain) and found.summary() == plain.summary()
        assert [error.args for error in found.bad] == [error.args for error in plain.bad]
        assert found.fingerprint() == plain.fingerprint()
        assert form_of(found, tokenizer, None) == form_of(plain, tokenizer, None)
        for side, expected in zip(found.split(0.2, 3), plain.split(0.2, 3)):
            assert rows_of(side) == rows_of(expected) and side.fingerprint() == expected.fingerprint()


def test_what_changes_the_tokens_makes_another_entry(tmp_path, small):
    path, cache = old(write_rows(tmp_path / "d.jsonl", chat_rows(40))), tmp_path / "cache"
    config = DataConfig(data_cache=str(cache))
    load_dataset(str(path), make_tokenizer(), config)
    assert len(entries(cache)) == 1
    for number, (tokenizer, changed) in enumerate(
        [
            (make_tokenizer("{{ ' ' }}" + CHATML), {}),
            (make_tokenizer(specials=("<|more|>",)), {}),
            (make_tokenizer(), {"train_on": "all"}),
            (make_tokenizer(), {"max_seq_length": 40}),
        ]
    ):
        load_dataset(str(path), tokenizer, config.model_copy(update=changed))
        assert len(entries(cache)) == number + 2
    for kept in ({"packing": False}, {"seed": 3}):
        load_dataset(str(path), make_tokenizer(), config.model_copy(update=kept))
    assert len(entries(cache)) == 5
    write_rows(path, chat_rows(41)[1:])
    changed = load_dataset(str(path), make_tokenizer(), config)
    assert changed.records.__next__().messages[1]["content"].startswith("1 blue")
    assert len(entries(cache)) == 5  # the file has changed just now: it could change again at the same time
    old(path)
    load_dataset(str(path), make_tokenizer(), config)
    assert len(entries(cache)) == 6


def test_a_damaged_entry_is_made_again(tmp_path, small):
    path, cache = old(write_rows(tmp_path / "d.jsonl", chat_rows(40))), tmp_path / "cache"
    config, tokenizer = DataConfig(data_cache=str(cache)), make_tokenizer()
    expected = rows_of(load_dataset(str(path), tokenizer, config))
    (entry,) = entries(cache)
    whole = (entry / FILE).read_bytes()
    summary = (entry / SUMMARY).read_text()
    damages = [
        lambda: (entry / FILE).write_bytes(whole[:-1]),
        lambda: (entry / SUMMARY).write_text(summary[:-1]),
        lambda: (entry / SUMMARY).write_text(json.dumps({**json.loads(summary), "ends": 3})),
        lambda: (entry / FILE).unlink(),
    ]
    for damage in damages:
        damage()
        found = load_dataset(str(path), tokenizer, config)
        assert rows_of(found) == expected and (entry / FILE).read_bytes() == whole
        assert found.notices[-1].startswith("tokenized data is kept in")


def load_and_die(path: Path, cache: Path, module: str, name: str, call: int) -> None:
    """Load, and be killed just before a call of a function."""
    examples_module.BATCH_TOKENS, workers.FEW, workers.CHUNK = 150, 5, 3
    place = import_module(module)
    whole, count = getattr(place, name), [0]

    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), 9)
        return whole(*args, **kwargs)

    setattr(place, name, counted)
    load_dataset(str(path), make_tokenizer(), DataConfig(data_cache=str(cache)))


@pytest.mark.parametrize(
    "module, name, call",
    [
        ("onecard.data.examples", "record_batch", 4),
        pytest.param("onecard.data.store", "sync", 1, marks=pytest.mark.slow),  # the file is written
        ("onecard.data.store", "write_synced", 1),  # before the summary
        pytest.param("onecard.data.store", "sync_folder", 1, marks=pytest.mark.slow),  # behind it
        ("os", "rename", 1),
    ],
)
def test_what_a_killed_run_leaves_is_removed_and_never_read(tmp_path, small, module, name, call):
    path, cache = old(write_rows(tmp_path / "d.jsonl", chat_rows(40))), tmp_path / "cache"
    code, _, err = Forked(load_and_die, path, cache, module, name, call).wait()
    assert code == -9, err
    (left,) = entries(cache)
    assert left.name.startswith(TEMPORARY)
    found = load_dataset(str(path), make_tokenizer(), DataConfig(data_cache=str(cache)))
    (entry,) = entries(cache)
    assert ENTRY.fullmatch(entry.name) and found.notices[-1] == f"tokenized data is kept in {entry}"
    whole = load_dataset(str(path), make_tokenizer(), DataConfig(data_cache=str(tmp_path / "other")))
    assert rows_of(found) == rows_of(whole) and found.fingerprint() == whole.fingerprint()


def load_and_wait(path: Path, cache: Path, seconds: float, **settings) -> None:
    """Load, print what was told last, and wait."""
    examples_module.BATCH_TOKENS, workers.FEW, workers.CHUNK = 150, 5, 3
    print(load_dataset(str(path), make_tokenizer(), DataConfig(data_cache=str(cache), **settings)).notices[-1])
    sys.stdout.flush()
    time.sleep(seconds)


def load_each(paths: list[Path], cache: Path, size: str) -> None:
    for path in paths:
        store.used.clear()  # this process stands for several
        load_and_wait(path, cache, 0, data_cache_size=size)


def test_the_cache_keeps_its_size_and_what_is_used(tmp_path):
    paths = [old(write_rows(tmp_path / f"{name}.jsonl", chat_rows(40))) for name in "abcde"]
    cache = tmp_path / "cache"
    (cache / "own").mkdir(parents=True)  # another folder there is none of the cache's
    (cache / "own" / "file").write_text("x" * 10**6)

    def done(*arguments) -> list[str]:
        code, out, err = Forked(*arguments).wait()
        assert code == 0, err
        return out.splitlines()

    kept = [Path(line.split()[-1]) for line in done(load_each, paths[:3], cache, "1GB")]
    size = sum(file.stat().st_size for file in kept[0].iterdir())
    assert entries(cache) == sorted([*kept, cache / "own"])
    for number, entry in enumerate(kept):
        os.utime(entry, (LONG_AGO + number, LONG_AGO + number))
    reader = Forked(load_and_wait, paths[0], cache, 300)  # it has the first one, which becomes the last that was read
    reader.until(lambda: "tokenized before" in reader.out)
    assert kept[0].stat().st_mtime > LONG_AGO + 3
    (told,) = done(load_each, paths[3:4], cache, f"{3 * size + 500}B")
    assert told == f"removed 1 entry that was read least recently from {cache}, to keep within --data-cache-size"
    assert not kept[1].exists() and kept[2].is_dir() and kept[0].is_dir()
    os.utime(kept[0], (LONG_AGO, LONG_AGO))
    (told,) = done(load_each, paths[4:5], cache, "1B")  # what another process reads and the new entry stay
    assert told.startswith("removed 2 entries that were read")
    assert kept[0] in entries(cache) and len(entries(cache)) == 3
    reader.send(signal.SIGKILL)
    reader.wait()
    (told,) = done(load_each, paths[3:4], cache, "1B")
    assert told.startswith("removed 2 entries that were read") and len(entries(cache)) == 2


def test_refused_rows_leave_nothing(tmp_path, small):
    path, cache = old(write_rows(tmp_path / "d.jsonl", [*chat_rows(40), {"messages": []}])), tmp_path / "cache"
    with pytest.raises(UserError, match=r"d\.jsonl:41:messages"):
        load_dataset(str(path), make_tokenizer(), DataConfig(data_cache=str(cache)))
    assert entries(cache) == []


def test_a_cache_without_room_is_a_clear_error(tmp_path, small):
    path = old(write_rows(tmp_path / "d.jsonl", chat_rows(40)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data-cache"):
        load_dataset(str(path), make_tokenizer(), DataConfig(data_cache=str(tmp_path / "file" / "cache")))


def test_a_lost_process_is_a_clear_error():
    def work(item):
        if item == workers.FEW + 100:
            os.kill(os.getpid(), 9)
        return item

    with pytest.raises(UserError, match="processes that tokenize"):
        list(workers.in_processes(work, range(workers.FEW + 1000), lambda: None, 2))
    many = workers.in_processes(lambda item: item, iter(range(10**12)), lambda: None, 2)
    assert [next(many) for _ in range(3000)] == list(range(3000))  # the rest is not drawn
    many.close()
