"""Ctrl-C, SIGTERM and SIGHUP. In its loop, a run finishes the step and writes a checkpoint. Elsewhere, it ends and says
what is kept. A second signal ends it at once. A signal that the process was started to ignore (nohup) stays ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Signalled(KeyboardInterrupt):
    """A signal arrived outside the loop."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def raised() -> Iterator[None]:
    """Raise Signalled when a signal arrives inside the block."""

    def stop(number: int) -> None:
        raise Signalled(number)

    with handled(stop):
        yield


@contextmanager
def noted() -> Iterator[list[int]]:
    """Append the number of the first signal inside the block to the list."""
    seen: list[int] = []
    with handled(seen.append):
        yield seen


@contextmanager
def handled(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` for the first signal inside the block. A second signal has its default effect."""
    before: dict[int, Any] = {}

    def first(number: int, frame: Any) -> None:
        for each in before:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
        act(number)

    try:
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, first)
    except ValueError:  # not the main thread, where Python allows no handlers
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
