"""Exact: a run that is killed at any moment and resumed ends in the bytes of one that is not."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from onecard.config import TrainConfig, make_config
from onecard.data import examples
from onecard.data.store import ENTRY, TEMPORARY
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from onecard.memory.inputs import PlanInputs
from onecard.memory.strategy import choose_strategy, total_bytes
from tests.forks import Forked, command_line
from tests.train.test_loop import adapter_bytes, fields

LARGE_BYTES = 12_000_000


def on_one_thread(*words):
    torch.set_num_threads(1)
    command_line(*words)


def on_few_tokens(*words):
    """Few tokens are already many, so that they are stored on the disk."""
    examples.BATCH_TOKENS = 300
    on_one_thread(*words)


def train(config_path, *more, begin=on_one_thread):
    """`onecard train` in a process of its own."""
    return Forked(begin, "train", "--config", config_path, *more)


def kill_and_resume(checkpoint, chats, tmp_path, times, rng, begin=on_one_thread, **more):
    """The adapter's bytes after up to `times` kills at random moments, and how often it was killed."""
    output = tmp_path / f"killed-{rng.random()}"
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(fields(checkpoint, chats, output, num_train_epochs=4, save_total_limit=2, **more)))
    kills = end_with_kills(lambda: train(path, "--resume", begin=begin), output, times, rng)
    return adapter_bytes(output), kills


def end_with_kills(begin, output, times, rng):
    """Kill -9, up to `times`, and begin again until the run ends; how often it was killed. A run that was done before
    the first of them starts anew."""
    kills = 0
    while True:
        process = begin()
        if kills < times:
            # Let it come as far as the loop, then strike anywhere in it.
            before = count_lines(output)
            process.until(lambda before=before: count_lines(output) > before)
            time.sleep(rng.random() * 0.4)
            process.send(signal.SIGKILL)
        code, _, err = process.wait()
        if code == 0 and kills:
            return kills
        if code == 0:
            shutil.rmtree(output)
        else:
            assert code == -signal.SIGKILL, err
            kills += 1


def count_lines(output):
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def straight_bytes(checkpoint, chats, tmp_path, **more):
    output, path = tmp_path / "straight", tmp_path / "straight.yaml"
    path.write_text(json.dumps(fields(checkpoint, chats, output, num_train_epochs=4, save_total_limit=2, **more)))
    code, _, err = train(path).wait()
    assert code == 0, err
    return adapter_bytes(output)


def all_paged(checkpoint, chats, tmp_path):
    """Settings of a run in the least memory there can be: base and states paged, inputs outside."""
    config = make_config(TrainConfig, fields(checkpoint, chats, tmp_path / "o", optim="paged_adamw_32bit"))
    inputs = PlanInputs(read_model(inspect_checkpoint(checkpoint)), config, torch.float32)
    strategy = choose_strategy(inputs, 1)
    assert (
        strategy.weights_budget
        and strategy.offload_optimizer_states
        and strategy.num_offloaded == strategy.num_recomputed == 2
    )
    return {"optim": config.optim, "device_memory": str(total_bytes(inputs, strategy))}


@pytest.fixture(scope="module")
def straight(checkpoint, chats, tmp_path_factory):
    """The folder of a run that was not killed, and its adapter's bytes, for each of two settings."""
    found = {}

    def run(**more):
        key = bool(more)
        if key not in found:
            folder = tmp_path_factory.mktemp("straight")
            found[key] = folder / "straight", straight_bytes(checkpoint, chats, folder, **more)
        return found[key]

    return run


HOW = {"paged": 2, "cached": 1, "streaming": 1, "plain": 2}  # and how often it is killed


@pytest.mark.parametrize("how", ["paged", "cached", "streaming", pytest.param("plain", marks=pytest.mark.slow)])
def test_kill_9(how, straight, checkpoint, chats, tmp_path):
    """Paged, stored, streamed or not, killed or not, the same bytes; and nothing of what was paged out or stored stays
    behind but the one entry of the cache."""
    every = {"streaming": True, "buffer_size": 7, "max_steps": 12} if how == "streaming" else {}
    whole, expected = straight(**every)
    more = every | (all_paged(checkpoint, chats, tmp_path) if how == "paged" else {})
    if how == "cached":
        os.utime(chats, (1_700_000_000, 1_700_000_000))  # a file that has changed just now is not kept
        more |= {"data_cache": str(tmp_path / "cache"), "begin": on_few_tokens}
    found, kills = kill_and_resume(checkpoint, chats, tmp_path, HOW[how], random.Random(0), **more)
    assert found == expected and kills
    if how == "cached":
        (entry,) = (tmp_path / "cache").iterdir()
        assert ENTRY.fullmatch(entry.name) and len(list(entry.iterdir())) == 2
    (output,) = tmp_path.glob("killed-*")
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_kill_9_with_large_data(checkpoint, tmp_path):
    """Killed while millions of tokens are stored, and later: the same bytes as in memory, and one entry."""
    data, cache, rng = tmp_path / "d.jsonl", tmp_path / "cache", random.Random(0)
    with data.open("w") as file:
        while file.tell() < LARGE_BYTES:
            words = rng.choices(["how", "many", "mugs", "fox", "lazy", "dog", "blue"], k=400)
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    os.utime(data, (1_700_000_000, 1_700_000_000))
    more = {"max_steps": 8, "data_cache": str(cache)}
    expected = straight_bytes(checkpoint, data, tmp_path, **more)
    (whole,) = cache.iterdir()
    shutil.rmtree(whole)
    path = tmp_path / "torn.yaml"
    path.write_text(json.dumps(fields(checkpoint, data, tmp_path / "torn", **more)))
    for _ in range(3):
        process = train(path)
        process.until(lambda: cache.is_dir() and any(cache.iterdir()))
        time.sleep(rng.random())
        process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
        assert all(left.name.startswith(TEMPORARY) for left in cache.iterdir())
    found, _ = kill_and_resume(checkpoint, data, tmp_path, 3, rng, **more)
    assert found == expected
    assert [entry.name for entry in cache.iterdir()] == [whole.name]


@pytest.mark.slow
def test_kill_9_at_twenty_moments(checkpoint, chats, tmp_path):
    expected, total, seed = straight_bytes(checkpoint, chats, tmp_path), 0, 1
    while total < 20:
        found, kills = kill_and_resume(checkpoint, chats, tmp_path, 4, random.Random(seed))
        assert found == expected
        total, seed = total + kills, seed + 1
