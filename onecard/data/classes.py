"""The classes of labelled rows: their names, as the rows' labels tell, and their order."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from onecard.data.files import BadRow, describe

MUST = "label must be a text or an integer"


def read_class(field: str, value: Any) -> str:
    """Return the name of a row's class: a text without the spaces around it, or an integer's digits. Raises BadRow."""
    must = f"{field}{MUST.removeprefix('label')}"
    if isinstance(value, bool) or not isinstance(value, int | str):
        do = "round numbers to classes, and give truth values names, such as yes and no"
        raise BadRow(field, must, describe(value), do)
    name = str(value).strip()
    if not name:
        raise BadRow(field, f"{field} must name the row's class", "an empty text")
    if is_fraction(name):
        raise BadRow(field, must, describe(value), "round numbers to classes: each different number would be a class")
    return name


def is_fraction(text: str) -> bool:
    """Whether a text is a number, infinite or NaN, but not an integer's digits."""
    with suppress(ValueError):
        int(text)
        return False
    with suppress(ValueError):
        float(text)
        return True
    return False


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Return the different names of classes in their order: integers by value, other names by their characters."""
    found = set(names)
    with suppress(ValueError):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))
