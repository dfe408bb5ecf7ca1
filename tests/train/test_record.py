"""Behaviour: run.json tells which process runs a run, its settings and plan, and how it ended."""

import os
import signal

import psutil
import pytest

from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from onecard.train.ranks import Ranks
from onecard.train.record import FILE, end_of_record, read_record
from tests.train.test_loop import run


@pytest.fixture
def record(checkpoint, chats, tmp_path):
    output = tmp_path / "o"
    run(checkpoint, chats, output, max_steps=2, r=4)
    found = read_record(output)
    assert found is not None
    return output, found


def rewritten(output, found, **fields):
    (output / FILE).write_text(found.model_copy(update=fields).model_dump_json())
    return read_record(output)


def test_a_run_tells_of_itself(record):
    output, found = record
    assert (found.state, found.num_steps, found.first_step) == ("finished", 2, 0)
    assert found.pid == os.getpid() and not found.is_running, "this process lives on, the run has ended"
    config = make_config(TrainConfig, found.config)
    assert config.r == 4 and config.output == str(output)
    assert found.planned_bytes == sum(num_bytes for _, num_bytes, _ in found.plan)


def test_only_the_same_process_counts_as_running(record):
    output, found = record
    assert rewritten(output, found, state="running").is_running
    assert not rewritten(output, found, state="running", process_started=found.process_started - 5).is_running
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(2**22 + 1)
    assert not rewritten(output, found, state="running", pid=2**22 + 1).is_running


@pytest.mark.parametrize(
    "error, state, message",
    [
        (KeyboardInterrupt(signal.SIGTERM), "stopped", None),
        (UserError("the loss must be finite", "nan", "lower it"), "failed", "the loss must be finite"),
        (RuntimeError("out of it"), "failed", "out of it"),
    ],
)
def test_it_tells_how_the_run_ended(record, error, state, message):
    output, found = record
    rewritten(output, found, state="running")
    with pytest.raises(type(error)), end_of_record(output, Ranks()):
        raise error
    ended = read_record(output)
    assert ended.state == state and (message is None or message in ended.message)
    rewritten(output, found, state="running", pid=1)
    with end_of_record(output, Ranks()):
        pass
    assert read_record(output).state == "running", "the record of another process is left alone"


def test_a_damaged_record_is_told(record):
    output, _ = record
    for text in ("{", "[]", '{"state": "running"}'):
        (output / FILE).write_text(text)
        with pytest.raises(UserError, match=FILE):
            read_record(output)
    (output / FILE).unlink()
    assert read_record(output) is None
