"""One thread that owns the model and runs a forward pass for each request in turn.

The answers of a round run one after the other, each with its own KV cache, so the other requests do not change an
answer's bits. A round is sorted by adapter: at most one switch per adapter and round. Text goes out through a callback
that must not block. A slow reader's text collects in its own queue, bounded by max_new_tokens. A finished answer frees
its place in the round, read or not.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from onecard.adapter.load import use_adapter
from onecard.config import SamplingConfig
from onecard.infer.decoding import Answer
from onecard.infer.graphs import make_context
from onecard.kernels.cpu.contention import sharing_cores


@dataclass(frozen=True)
class TextChunk:
    """New text of an answer. The last chunk has a finish_reason or, after a failure, an error."""

    text: str
    num_tokens: int  # of the answer so far
    finish_reason: str | None = None
    error: str | None = None


@dataclass(eq=False)
class GenerationRequest:
    """A request. The engine's thread calls `emit` with each TextChunk. Any thread may set `cancelled`.

    Attributes:
        goes_on, ends: same as in `Answer`.
    """

    input_ids: list[int]
    max_new_tokens: int
    sampling: SamplingConfig
    adapter: str | None
    tokenizer: Any
    emit: Callable[[TextChunk], None]
    goes_on: bool = False
    ends: tuple[int, ...] = ()
    cancelled: bool = False
    answer: Answer | None = field(default=None, init=False)

    def advance(self, model: Any) -> bool:
        """Run one forward pass. Return whether more passes follow. An error ends only this request."""
        try:
            if self.answer is None:
                asked = (self.input_ids, self.max_new_tokens, self.sampling, make_context(model), self.goes_on)
                self.answer = Answer(model, self.tokenizer, *asked, self.ends)
            text = self.answer.advance()
            if text or self.answer.finish_reason:
                self.emit(TextChunk(text, self.answer.num_tokens, self.answer.finish_reason))
            if self.answer.finish_reason is None:
                return True
        except Exception as error:
            self.emit(TextChunk("", 0, error=f"{type(error).__name__}: {error}"))
        if self.answer is not None:
            self.answer.context.clear()  # frees the cache: the client may read for long
        return False


class Engine:
    """Runs requests until it is closed."""

    def __init__(self, model: Any, max_active: int, max_queued: int):
        self.model, self.max_active, self.max_queued = model, max_active, max_queued
        self.waiting: deque[GenerationRequest] = deque()
        self.active: list[GenerationRequest] = []
        self.changed = threading.Condition()
        self.closed = False
        self.adapter: str | None = None
        use_adapter(model, None)
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, work: GenerationRequest) -> bool:
        """Queue a request, first come first served. Return False if too many wait or the engine is closed."""
        with self.changed:
            self.waiting = deque(each for each in self.waiting if not each.cancelled)
            free = self.max_active - len(self.active)  # places that the next round fills
            if self.closed or len(self.waiting) >= self.max_queued + free:
                return False
            self.waiting.append(work)
            self.changed.notify()
        return True

    def run(self) -> None:
        with sharing_cores():
            while self.admit():
                going_on = []
                for name, group in groupby(self.active, key=lambda work: work.adapter):
                    if name != self.adapter:
                        use_adapter(self.model, name)
                        self.adapter = name
                    going_on += [work for work in group if work.advance(self.model)]
                self.active = going_on

    def admit(self) -> bool:
        """Drop cancelled requests and fill the free places. Wait while there are none. Return False when closed."""
        with self.changed:
            while not self.closed:
                going_on = [work for work in self.active if not work.cancelled]
                while self.waiting and len(going_on) < self.max_active:
                    if not (work := self.waiting.popleft()).cancelled:
                        going_on.append(work)
                self.active = sorted(going_on, key=lambda work: work.adapter or "")
                if self.active:
                    return True
                self.changed.wait()
        for work in (*self.active, *self.waiting):
            work.emit(TextChunk("", 0, error="the server is shutting down"))
        return False

    def close(self) -> None:
        """Stop after the current round."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()
