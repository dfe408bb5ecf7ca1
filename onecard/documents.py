"""Read documents from files strictly: JSON and YAML with limits on size, depth and numbers, and with each key once.

Other people's files may be damaged or malicious, and Python's readers accept much of this: a repeated key, NaN, an
integer of thousands of digits that cannot be printed, too many levels for a recursion, references that expand
exponentially. Here each of them is a ValueError of one line. Then the document's pydantic model, in the module that
reads it, checks the rest: `Foreign` for other tools' formats, which may have more fields than we read, `Own` for ours.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from onecard.errors import UserError

MAX_BYTES = 4 << 20
MAX_YAML_BYTES = 256 << 10  # PyYAML reads about 100 KB a second
MAX_DEPTH = 64
MAX_DIGITS = 40  # tokenizer_config.json has an integer of 31 digits
YAML_TAG = "tag:yaml.org,2002:"
YAML_KINDS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")
AGAIN = "fetch the file again"
T = TypeVar("T", bound=BaseModel)
BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother, BRIEF.maxlong = 3, 100, 100, MAX_DIGITS + 5


class Foreign(BaseModel):
    """The fields that we read from another tool's document. No type is converted. No number is NaN or infinite."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Own(Foreign):
    """A document of ours. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


def parse_json(raw: bytes, infinities: bool = False, max_bytes: int = MAX_BYTES) -> Any:
    """Parse JSON. Raises ValueError, whose text says what is wrong.

    Args:
        infinities: accept NaN and Infinity, as Python writes them. The document's model may still refuse them.
    """
    check_size(len(raw), max_bytes)

    def constant(text: str) -> float:
        if not infinities:
            raise ValueError(f"{text}, which is no number of JSON")
        return float(text)

    def number(text: str) -> float:
        return finite(float(text), text)

    try:
        content = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=each_once,
            parse_constant=constant,
            parse_int=integer,
            parse_float=number,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{raw[error.start]:02x} at {error.start}, which is not UTF-8") from None
    except RecursionError:
        raise too_deep() from None
    check_depth(content)
    if b"\\u" in raw:  # may be half of a surrogate pair, which UTF-8 cannot encode
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair in a text") from None
    return content


def parse_yaml(raw: bytes) -> Any:
    """Parse plain YAML, without references and named tags. Raises ValueError, whose text says what is wrong."""
    import yaml

    class Loader(yaml.SafeLoader):
        def fetch_flow_collection_start(self, kind: Any) -> None:
            """Stop where check_nodes would refuse: PyYAML's time grows with the square of the open brackets."""
            if self.flow_level > MAX_DEPTH:
                raise too_deep()
            super().fetch_flow_collection_start(kind)

    check_size(len(raw), MAX_YAML_BYTES)
    try:
        loader = Loader(raw.decode("utf-8"))
        root = loader.get_single_node()
        check_nodes(root)
        content = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or error.context}{at}") from None
    except RecursionError:
        raise too_deep() from None
    except (yaml.YAMLError, UnicodeDecodeError, OverflowError, TypeError, LookupError) as error:
        raise ValueError(" ".join(str(error).split())) from None  # also of dates, tags and keys that are not text
    check_depth(content)
    for value in leaves(content):
        if isinstance(value, int):
            if abs(value) >= 10**MAX_DIGITS:
                raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
        elif isinstance(value, float):
            finite(value, str(value))
    return content


def check_nodes(root: Any) -> None:
    """Raise ValueError for references, tags, repeated keys and too many levels, before values are made of the nodes."""
    seen, level = set(), [] if root is None else [root]
    for _ in range(MAX_DEPTH + 1):
        below = []
        for node in level:
            at = f"line {node.start_mark.line + 1}"
            if id(node) in seen:
                raise ValueError(f"a reference to {at}: write the value itself")
            if node.tag.removeprefix(YAML_TAG) not in YAML_KINDS:
                raise ValueError(f"the tag {node.tag}, {at}: write the value without it")
            seen.add(id(node))
            pairs = node.value if node.tag == f"{YAML_TAG}map" else ()
            each_once([(key.value, value) for key, value in pairs if isinstance(key.value, str)])
            below += node.value if node.tag == f"{YAML_TAG}seq" else [part for pair in pairs for part in pair]
        level = below
        if not level:
            return
    raise too_deep()


def check_size(num_bytes: int, most: int) -> None:
    if num_bytes > most:
        raise ValueError(f"{num_bytes:,} bytes, of {most:,} at most")


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object. Raises ValueError for a repeated key, of which json.loads would silently keep the last value."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f'"{twice}" twice')
    return made


def integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text):,} digits")
    return int(text)


def finite(value: float, text: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{text[:MAX_DIGITS]}, which no float holds")
    return value


def check_depth(content: Any) -> None:
    """Raise ValueError for more levels than any document needs, because later recursions could fail on them."""
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        level = [child for value in level for child in children(value)]
        if not level:
            return
    raise too_deep()


def children(value: Any) -> list[Any]:
    """Return the objects and lists directly inside an object or list."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return [child for child in inside if isinstance(child, dict | list | tuple | set)]


def leaves(content: Any) -> list[Any]:
    """Return all values and keys that are neither object nor list."""
    found, waiting = [], [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        else:
            found.append(value)
    return found


def too_deep() -> ValueError:
    return ValueError(f"more than {MAX_DEPTH} levels, one in the other")


def read_object(
    path: Path, do: str = AGAIN, missing: str | None = None, infinities: bool = False, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        do: what the user should do about an error.
        missing: the same if there is no such file; None: `do`.

    Raises:
        UserError: the file does not exist or is not readable, or is not a JSON object.
    """
    try:
        check_size(path.stat().st_size, max_bytes)
        content = parse_json(path.read_bytes(), infinities, max_bytes)
    except FileNotFoundError:
        raise UserError("this file must exist", "no such file", missing or do, str(path)) from None
    except OSError as error:
        raise UserError("the file must be readable", error.strerror or str(error), do, str(path)) from None
    except ValueError as error:
        raise UserError("the file must be JSON", str(error), do, str(path)) from None
    if not isinstance(content, dict):
        raise UserError("the file must hold a JSON object", type(content).__name__, do, str(path))
    return content


def hold(kind: type[T], content: Any, where: str, do: str = AGAIN) -> T:
    """Validate a document as a `kind`. Raises UserError for the first field that does not fit."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        must, found = first_mistake(error)
        raise UserError(must, found, do, where) from None


def first_mistake(error: ValidationError) -> tuple[str, str]:
    """Return, for the first mistake, what must hold, with the field's name, and what was found."""
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    value = "nothing" if first["type"] == "missing" else brief(first["input"])
    return f"{name}: {message}" if name else message, value


def brief(value: Any) -> str:
    """Return a shortened repr of a document's value."""
    try:
        return BRIEF.repr(value)
    except ValueError:  # an integer of thousands of digits
        return type(value).__name__


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping of fields. Raises UserError for anything else."""
    try:
        fields = parse_yaml(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            "the config must be a readable YAML file", str(error), "check the path and the syntax", str(path)
        ) from None
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UserError(
            "the config must be a mapping of field: value",
            f"a {type(fields).__name__}",
            "write lines such as `learning_rate: 2.0e-4`",
            str(path),
        )
    return {str(key): value for key, value in fields.items()}
