"""One thread that owns the model. Each round gives a token to each answer.

The answers of an adapter whose prompts are computed share one forward pass (together.py). A prompt is computed a piece
at a time, a piece in a round. A round is sorted by adapter: at most one switch per adapter and round. So a request
joins and leaves between any two tokens. Text goes out through a callback that must not block. A slow reader's text
collects in its own queue, bounded by max_new_tokens. A finished answer frees its place in the round, read or not.
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
from onecard.infer.grammar import Grammar
from onecard.infer.graphs import FixedContext, make_context
from onecard.infer.logprobs import TokenLogprob
from onecard.infer.prefix import PrefixCache
from onecard.infer.together import feed_together, takes_together
from onecard.kernels.cpu.contention import sharing_cores
from onecard.memory.measure import is_out_of_memory

MIN_TOGETHER = {False: 2, True: 4}  # answers in a shared pass; True: with CUDA graphs, which a shared pass has not


@dataclass(frozen=True)
class TextChunk:
    """New text of an answer. The last chunk has a finish_reason or, after a failure, an error."""

    text: str
    num_tokens: int  # of the answer so far
    finish_reason: str | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens of the text
    num_cached: int = 0  # tokens of the prompt that came from the prefix cache


@dataclass(eq=False)
class GenerationRequest:
    """A request. The engine's thread calls `emit` with each TextChunk. Any thread may set `cancelled`.

    Attributes:
        goes_on, ends, num_logprobs, grammar: same as in `Answer`.
    """

    input_ids: list[int]
    max_new_tokens: int
    sampling: SamplingConfig
    adapter: str | None
    tokenizer: Any
    emit: Callable[[TextChunk], None]
    goes_on: bool = False
    ends: tuple[int, ...] = ()
    num_logprobs: int | None = None
    grammar: Grammar | None = None
    cancelled: bool = False
    answer: Answer | None = field(default=None, init=False)
    num_cached: int = field(default=0, init=False)
    num_scored: int = field(default=0, init=False)  # logprobs that were emitted
    kept: bool = field(default=False, init=False)  # whether the prefix cache was given the prompt

    def begin(self, model: Any, prefixes: PrefixCache) -> Answer:
        context = make_context(model)
        self.num_cached = prefixes.fill(context, self.adapter, self.input_ids)
        asked = (self.input_ids, self.max_new_tokens, self.sampling, context, self.goes_on, self.ends)
        self.answer = Answer(model, self.tokenizer, *asked, self.num_logprobs, self.grammar)
        return self.answer

    @property
    def decodes(self) -> bool:
        """Whether the next pass feeds the last drawn token."""
        return self.answer is not None and self.answer.num_tokens > 0 and len(self.answer.rest) == 1

    @property
    def context(self) -> Any:
        return self.answer and self.answer.context

    def show(self, text: str) -> None:
        """Emit new text, with the logprobs of its tokens."""
        answer = self.answer
        assert answer is not None
        released = len(answer.logprobs)
        if answer.finish_reason is None:
            starts = [each.start for each in answer.logprobs]
            released = sum(start < answer.text.num_released for start in starts[self.num_scored :]) + self.num_scored
        scored, self.num_scored = tuple(answer.logprobs[self.num_scored : released]), released
        if text or scored or answer.finish_reason:
            shown = (text, answer.num_tokens, answer.finish_reason, None, scored, self.num_cached)
            self.emit(TextChunk(*shown))


class Engine:
    """Runs requests until it is closed.

    Attributes:
        batch_size: answers in the last shared pass.
        most_together: answers that may share a pass. It is halved when a shared pass fails.
    """

    def __init__(self, model: Any, max_active: int, max_queued: int, prefix_bytes: int = 0):
        self.model, self.max_active, self.max_queued = model, max_active, max_queued
        self.waiting: deque[GenerationRequest] = deque()
        self.active: list[GenerationRequest] = []
        self.prefixes = PrefixCache(prefix_bytes)
        self.batch_size, self.most_together = 0, max_active
        self.changed = threading.Condition()
        self.closed = False
        self.adapter: str | None = None
        use_adapter(model, None)
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, *works: GenerationRequest) -> bool:
        """Queue requests, first come first served. Return False if too many wait or the engine is closed."""
        with self.changed:
            self.waiting = deque(each for each in self.waiting if not each.cancelled)
            free = self.max_active - len(self.active)  # places that the next round fills
            if self.closed or len(self.waiting) + len(works) > self.max_queued + free:
                return False
            self.waiting.extend(works)
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
                    going_on += self.advance(list(group))
                self.active = going_on

    def advance(self, group: list[GenerationRequest]) -> list[GenerationRequest]:
        """Run a pass of each request of an adapter. Return those that go on."""
        together = [work for work in group if work.decodes]
        graphs = bool(together) and isinstance(together[0].context, FixedContext)
        if self.most_together == 1 or len(together) < MIN_TOGETHER[graphs]:
            together = []
        ended: set[GenerationRequest] = set()
        for start in range(0, len(together), self.most_together):
            ended |= self.advance_together(together[start : start + self.most_together])
        for work in group:
            if work not in together and not self.step(work, lambda work=work: self.advance_alone(work)):
                ended.add(work)
        return [work for work in group if work not in ended]

    def advance_alone(self, work: GenerationRequest) -> str:
        answer = work.answer or work.begin(self.model, self.prefixes)
        return answer.advance()

    def advance_together(self, works: list[GenerationRequest]) -> set[GenerationRequest]:
        """Run one pass for several requests. Return those that end. A failed pass costs its answers a new prefill."""
        answers = [work.answer for work in works if work.answer is not None]
        try:
            if not takes_together(self.model):
                self.most_together = 1
                return set()
            logits_BV = feed_together(
                self.model, [answer.context for answer in answers], [answer.rest[0] for answer in answers]
            )
        except Exception as error:
            if is_out_of_memory(error):
                self.prefixes.clear()
            self.most_together = max(1, len(works) // 2)
            for answer in answers:
                answer.restart()
            return set()
        self.batch_size = len(works)
        rows = zip(works, answers, logits_BV.split(1))
        return {w for w, answer, row in rows if not self.step(w, lambda answer=answer, row=row: answer.take(row))}

    def step(self, work: GenerationRequest, run: Callable[[], str]) -> bool:
        """Run a request's step and emit its text. Return whether more follow. An error ends only this request."""
        try:
            text, answer = run(), work.answer
            assert answer is not None
            work.show(text)
            if (answer.num_tokens == 1 and not work.kept) or answer.finish_reason:
                work.kept = True
                self.remember(answer, work.adapter)
            if answer.finish_reason is None:
                return True
        except Exception as error:
            work.emit(TextChunk("", 0, error=f"{type(error).__name__}: {error}"))
        if work.answer is not None:
            work.answer.context.clear()  # frees the cache: the client may read for long
        return False

    def remember(self, answer: Answer, adapter: str | None) -> None:
        try:
            self.prefixes.keep(answer.context, adapter)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.prefixes.clear()

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
