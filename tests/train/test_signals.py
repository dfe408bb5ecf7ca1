"""Behaviour: what a signal does to a run, by its exit status, its words and what is on the disk."""

import json
import signal
import time
from io import StringIO

import pytest
from rich.console import Console

from onecard.config import TrainConfig, make_config
from onecard.train import session, show, signals
from onecard.train.checkpoint import load_newest
from tests.forks import Forked
from tests.train.test_kill import count_lines, on_one_thread
from tests.train.test_loop import fields, run

SLOW = pytest.mark.slow


def slow_to_load(*words):
    """The command, whose model takes a minute."""

    def load_model(*args):
        print("loading", flush=True)
        time.sleep(60)

    session.load_model = load_model
    on_one_thread(*words)


def start(checkpoint, chats, tmp_path, command=on_one_thread, **more):
    """`onecard train` in a process of its own."""
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(fields(checkpoint, chats, tmp_path / "o", **more)))
    return Forked(command, "train", "--config", path)


@pytest.mark.parametrize(
    "name, status", [("SIGTERM", 143), pytest.param("SIGHUP", 129, marks=SLOW), pytest.param("SIGINT", 130, marks=SLOW)]
)
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(name, status, checkpoint, chats, tmp_path):
    output = tmp_path / "o"
    process = start(checkpoint, chats, tmp_path, max_steps=100_000, save_steps=100_000)
    process.until(lambda: count_lines(output) >= 2)
    process.send(getattr(signal, name))
    code, _, err = process.wait()
    assert code == status and "Traceback" not in err, err
    state = load_newest(output / "checkpoints")
    assert state is not None and state.step == count_lines(output) >= 2
    assert f"step {state.step} of 100000 is saved" in err and "--resume" in err


@pytest.mark.parametrize("name, status", [pytest.param("SIGTERM", 143, marks=SLOW), ("SIGINT", 130)])
def test_a_signal_before_the_first_step_says_that_nothing_is_kept(name, status, checkpoint, chats, tmp_path):
    process = start(checkpoint, chats, tmp_path, slow_to_load)
    process.until(lambda: "loading" in process.out)
    process.send(getattr(signal, name))
    code, _, err = process.wait()
    assert code == status and "nothing is kept" in err and "Traceback" not in err, err
    assert not (tmp_path / "o").exists()


@pytest.fixture
def not_ignored():
    """As in a terminal, also where the suite itself was started to ignore a hangup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_the_first_is_noted_and_the_second_raises(not_ignored):
    before = {name: signal.getsignal(getattr(signal, name)) for name in signals.NAMES}
    with pytest.raises(KeyboardInterrupt), signals.noted() as seen:
        signal.raise_signal(signal.SIGHUP)
        assert seen == [signal.SIGHUP]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends the process
        signal.raise_signal(signal.SIGINT)
    assert {name: signal.getsignal(getattr(signal, name)) for name in signals.NAMES} == before


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup starts a process."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raised(), signals.noted() as seen:
            signal.raise_signal(signal.SIGHUP)
        assert not seen
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_instructions_are_told_when_a_run_is_resumed(checkpoint, chats, tmp_path, monkeypatch):
    run(checkpoint, chats, tmp_path / "o", max_steps=2)
    for there, told in ((None, False), ("neon, torch NO AVX", True)):
        if there is not None:
            monkeypatch.setattr(show, "arithmetic", lambda device, there=there: there)
        config = make_config(TrainConfig, fields(checkpoint, chats, tmp_path / "o", max_steps=2))
        said = StringIO()
        session.run_training(config, True, Console(file=said, width=200))
        assert ("now neon, torch NO AVX: equal to rounding" in said.getvalue()) == told
