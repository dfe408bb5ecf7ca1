"""The one exception for the user's mistakes: what must hold, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in the input, told in three parts; the command line prints them and exits with 2.

    Attributes:
        must: what must hold.
        found: what was found instead.
        do: what to do about it.
        where: file, file:line:field, tensor or key; None where the message names it already.
    """

    def __init__(self, must: str, found: str, do: str, where: str | None = None):
        self.must, self.found, self.do, self.where = must, found, do, where
        super().__init__(must, found, do, where)

    def __str__(self) -> str:
        head = f"{self.where}: " if self.where else ""
        return f"{head}{self.must}\n  found: {self.found}\n  do:    {self.do}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean "blocksize"?)' or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
