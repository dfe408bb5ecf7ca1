"""The base of all settings: a wrong value raises UserError, from Python, a file or the command line."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from onecard.documents import first_mistake
from onecard.errors import UserError, did_you_mean

T = TypeVar("T", bound="Strict")


class Strict(BaseModel):
    """Base class of settings. A wrong value raises UserError, from Python, a file or the command line."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    if not TYPE_CHECKING:  # so that editors still complete the fields

        def __init__(self, /, **fields: Any):
            check_keys(type(self), fields)
            try:
                super().__init__(**fields)
            except ValidationError as error:
                must, found = first_mistake(error)
                if not error.errors()[0]["loc"]:
                    must, found = f"config: {must}", "a combination that contradicts itself"
                raise UserError(must, found, "correct the value", type(self).__name__) from None


def check_keys(kind: type[BaseModel], fields: dict[str, Any]) -> None:
    """Raise UserError, with a similar name, for a key that is not a field of `kind`, and for a truth value of a number,
    of which pydantic makes 1 or 0."""
    for key, value in fields.items():
        if key not in kind.model_fields:
            raise UserError(
                "every key must be a field of the config",
                f'"{key}"{did_you_mean(key, kind.model_fields)}',
                "`onecard train --help` lists the fields",
                kind.__name__,
            )
        if isinstance(value, bool) and is_number(kind.model_fields[key].annotation):
            raise UserError(f"{key}: must be a number", str(value).lower(), "correct the value", kind.__name__)


def is_number(annotation: Any) -> bool:
    """Whether a field takes numbers, and no truth values."""
    parts, rest = set(), [annotation]
    while rest:
        parts.add(rest[-1])
        rest += get_args(rest.pop())
    return bool not in parts and not parts.isdisjoint((int, float))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_config(kind: type[T], fields: dict[str, Any], source: str = "config") -> T:
    """Make a `kind` from `fields`. Raises UserError that names `source` for the first mistake."""
    try:
        return kind(**fields)
    except UserError as error:
        raise UserError(error.must, error.found, error.do, source) from None


def parse_bytes(text: str) -> int:
    """Convert "24GiB", "6 GB" or "1500MB" to bytes, in any letter case. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise UserError("a size must be a number and a unit", repr(text), "write it like 24GiB or 6GB", "size")
    number, letter, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(letter or " "))
