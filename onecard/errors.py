"""The exception for the user's mistakes: what must hold, what was found, what to do.

Names, keys and values come from files of other people. Some of their characters control a terminal, and a long value
hides the rest of the message. `printable` escapes the first, `shortened` cuts the second, and a UserError does both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

# Control characters except tab and newline, Unicode line ends, characters that change the text direction, halves of
# surrogate pairs, and the byte order mark.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
MOST_CHARACTERS = 400  # in a line of an error
MOST_LINES = 24  # in what was found, after its first line


class UserError(ValueError):
    """A mistake in the input, in three parts. The command line prints them and exits with 2.

    Attributes:
        must: what must hold.
        found: what was found instead.
        do: what to do about it.
        where: file, file:line:field, tensor or key; None if the message already names it.
        exit_code: exit status of the command line.
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
    """Escape the characters that control a terminal. Tabs and newlines stay."""
    return OBEYED.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode(), text)


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Cut the middle out of a text that is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 3 :]}"


def one_line(text: str) -> str:
    """Shorten and escape a text from a file, so that it fits in a line."""
    return shortened(printable(shortened(text)).replace("\n", "\\n").replace("\t", "\\t"))


class Stopped(UserError):
    """A signal ended the run. The command line exits with 128 plus the signal's number, same as a shell."""

    def __init__(self, number: int, found: str, do: str, where: str | None = None):
        super().__init__("the run was stopped before its end", found, do, where)
        self.exit_code = 128 + number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean "blocksize"?)', or an empty string if no known word is similar."""
    close = get_close_matches(word[:MOST_CHARACTERS], list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


def first_line(error: BaseException) -> str:
    """Return the first paragraph of an exception's message on one line."""
    return " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__
