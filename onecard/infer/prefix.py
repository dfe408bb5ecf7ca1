"""Keys and values of earlier prompts and answers. A request that begins with the same tokens computes only the others.

A system message, the earlier turns of a talk, and the prompt of several choices are computed once. The keys and values
depend on the adapter, so an entry serves its own adapter only. The least recently used entries are dropped first.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onecard.infer.decoding import CachedContext, shared_prefix

MIN_SHARED_TOKENS = 8  # fewer are computed faster than copied


@dataclass(frozen=True, eq=False)
class Entry:
    adapter: str | None
    tokens: list[int]
    layers: list[tuple[Tensor, Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for pair in self.layers for x in pair)


class PrefixCache:
    """The entries, the least recently used first. One thread uses it."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.entries: list[Entry] = []

    def fill(self, context: CachedContext, adapter: str | None, ids: list[int]) -> int:
        """Put the longest known beginning of a prompt into an empty context. Return its number of tokens."""
        best, most = None, MIN_SHARED_TOKENS - 1
        for entry in self.entries:
            if entry.adapter == adapter and (shared := shared_prefix(entry.tokens, ids[:-1])) > most:
                best, most = entry, shared
        if best is None:
            return 0
        context.restore(ids[:most], best.layers)
        self.entries.remove(best)
        self.entries.append(best)
        return most

    def keep(self, context: CachedContext, adapter: str | None) -> None:
        """Remember a context's tokens, unless an entry begins with them. Entries that they begin with are dropped."""
        tokens = context.tokens
        same = [entry for entry in self.entries if entry.adapter == adapter]
        known = any(entry.tokens[: len(tokens)] == tokens for entry in same)
        if not self.max_bytes or len(tokens) < MIN_SHARED_TOKENS or known or (layers := context.prefix()) is None:
            return
        self.entries = [e for e in self.entries if e.adapter != adapter or tokens[: len(e.tokens)] != e.tokens]
        self.entries.append(Entry(adapter, list(tokens), layers))
        while sum(entry.num_bytes for entry in self.entries) > self.max_bytes:
            self.entries.pop(0)

    def clear(self) -> None:
        self.entries = []
