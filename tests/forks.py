"""Processes that begin with the libraries loaded: they are forked from one that imported them, which takes five seconds
of CPU, once. Each has its own signals, limits, standard streams and exit status, as any process has."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tests.conftest", "onecard.cli", "onecard.train.session", "onecard.adapter.load", "matplotlib.pyplot"]
)


class Done(NamedTuple):
    """How a process ended; negative for a signal's number."""

    code: int
    out: str
    err: str


class Forked:
    """A function in a process of its own. What it prints goes into files, which `out` and `err` read."""

    def __init__(self, function: Callable[..., object], *args: Any, stdin: str = "", **variables: str):
        self.kept = TemporaryDirectory()
        self.folder = Path(self.kept.name)
        for name, text in (("in", stdin), ("out", ""), ("err", "")):
            (self.folder / name).write_text(text, encoding="utf-8")
        arguments = (self.folder, variables, function, *args)
        self.process = FORKS.Process(target=begin, args=arguments, daemon=True)  # a test that fails leaves none behind
        self.process.start()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")

    def until(self, holds: Callable[[], bool], seconds: float = 300) -> None:
        """Wait for what the process does; at its end there is nothing more to wait for."""
        end = time.monotonic() + seconds
        while self.process.is_alive() and not holds():
            assert time.monotonic() < end, self.err
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        """A signal, which does nothing where the process has ended before: see `wait` for how it ended."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = 300) -> Done:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"it did not end in {seconds} s: {self.err}")
        assert self.process.exitcode is not None
        return Done(self.process.exitcode, self.out, self.err)


def begin(folder: Path, variables: dict[str, str], function: Callable[..., object], *args: Any) -> None:
    """In the process: the streams of a shell's redirections, then the function."""
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
        os.dup2(os.open(folder / name, flags | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(variables)
    function(*args)


def ranks(count: int, function: Callable[..., object], *args: Any, **variables: str) -> list[Forked]:
    """A function in each of `count` processes that torch.distributed connects, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    same = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    same |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    numbers = [{"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(count)]
    return [Forked(on_one_thread, function, *args, **same, **own, **variables) for own in numbers]


def on_one_thread(function: Callable[..., object], *args: Any) -> None:
    import torch

    torch.set_num_threads(1)
    function(*args)


def command_line(*words: Any) -> None:
    """What a shell runs for `onecard WORDS`."""
    from onecard.cli import main

    sys.argv = ["onecard", *map(str, words)]
    main()


def onecard(*words: Any, stdin: str = "", **variables: str) -> Done:
    """The command's exit status and what it prints."""
    return Forked(command_line, *words, stdin=stdin, **variables).wait()
