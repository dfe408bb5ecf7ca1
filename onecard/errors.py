"""The one exception for the user's mistakes: what must hold, what was found, what to do.

Names, keys and values come from files of other people. A terminal obeys some of their characters and a long one hides
the rest of the message: `printable` escapes the first and `shortened` cuts the second. An error does both by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

# Control characters but for tab and newline, ends of lines of Unicode, what turns the direction of text, halves of
# surrogate pairs.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
MOST_CHARACTERS = 400  # of a line of an error
MOST_LINES = 24  # of what was found


class UserError(ValueError):
    """A mistake in the input, told in three parts; the command line prints them and exits with 2.

    Attributes:
        must: what must hold.
        found: what was found instead.
        do: what to do about it.
        where: file, file:line:field, tensor or key; None where the message names it already.
        exit_code: of the command line.
    """

    exit_code = 2

    def __init__(self, must: str, found: str, do: str, where: str | None = None):
        self.must, self.found, self.do, self.where = must, found, do, where
        super().__init__(must, found, do, where)

    def __str__(self) -> str:
        head = f"{one_line(self.where)}: " if self.where else ""
        first, *more = self.found.split("\n")  # a list of bad rows has a line for each
        lines = [one_line(first), *(f"    {one_line(line.strip())}" for line in more[:MOST_LINES])]
        found = "\n".join(lines)
        return f"{head}{one_line(self.must)}\n  found: {found}\n  do:    {one_line(self.do)}"


def printable(text: str) -> str:
    """Text for a terminal: characters that it would obey, as their escapes; tabs and newlines stay."""
    return OBEYED.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode(), text)


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """A long text without its middle."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 3 :]}"


def one_line(text: str) -> str:
    """A text from a file as a part of a line."""
    return shortened(printable(shortened(text)).replace("\n", "\\n").replace("\t", "\\t"))


class Stopped(UserError):
    """A signal ended the run; the command line exits with 128 and the signal's number, as a shell counts it."""

    def __init__(self, number: int, found: str, do: str, where: str | None = None):
        super().__init__("the run was stopped before its end", found, do, where)
        self.exit_code = 128 + number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean "blocksize"?)' or an empty string."""
    close = get_close_matches(word[:MOST_CHARACTERS], list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, on one line."""
    return " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__
