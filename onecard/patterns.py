"""Check regular expressions from settings and files: their syntax, and their time on a model's names.

The time of a match may double with each character of a name, as with `(a+)+b`, and nothing in the process can stop it.
So a separate process with a time limit tries the expressions first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import TypeVar

from onecard.errors import UserError, shortened

T = TypeVar("T")
PLAIN = re.compile(r"[\w.-]*")
MAX_CHARACTERS = 20_000  # of all expressions together: a megabyte takes minutes to compile
MAX_SECONDS = 5
TRY = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for expression in map(re.compile, expressions):
    for name in names:
        expression.match(name), expression.fullmatch(name)
"""


def is_plain(text: str) -> bool:
    """Whether a text is a plain name. The time of its match grows only linearly with the length of the other text."""
    return PLAIN.fullmatch(text) is not None


def check_syntax(expressions: list[str]) -> None:
    """Raise ValueError for an invalid regular expression, or if all together have more than MAX_CHARACTERS."""
    total = sum(map(len, expressions))
    if total > MAX_CHARACTERS:
        raise ValueError(f"regular expressions must have {MAX_CHARACTERS:,} characters at most, not {total:,}")
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"must be a regular expression, not {shortened(expression, 100)!r}: {error}") from None


def first_match(values: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first expression that matches the end of a module's name after a dot, or the whole name:
    peft's rule for rank_pattern and alpha_pattern."""
    found = (value for expression, value in values.items() if re.match(rf"(.*\.)?({expression})$", name))
    return next(found, default)


def check_time(expressions: list[str], names: Iterable[str], where: str) -> None:
    """Raise UserError if matching the expressions with these names takes more than MAX_SECONDS.

    Args:
        expressions: with Python's syntax (check_syntax).
    """
    names = list(names)
    if not expressions or not names:
        return
    command = [sys.executable, "-I", "-S", "-c", TRY]
    given = json.dumps([expressions, names])
    try:
        subprocess.run(command, input=given, text=True, capture_output=True, timeout=MAX_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        must = f"regular expressions must match the model's names within {MAX_SECONDS} s"
        why = error.strerror if isinstance(error, OSError) else "not done by then"
        found = f"{', '.join(shortened(expression, 60) for expression in expressions[:4])}: {why}"
        raise UserError(must, found, "write them without a repeat in a repeat, or list the names", where) from None
