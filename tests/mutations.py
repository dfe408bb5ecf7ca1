"""Damage to documents, drawn from a seed: to what a document says, and to the bytes that it is written in."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from random import Random
from typing import Any

RAW = {  # written in place of a text: json.dumps cannot write them
    "@digits": b"9" * 5000,
    "@deep": b"[" * 100_000 + b"]" * 100_000,
    "@deep objects": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "@unclosed": b"[" * 3000,
    "@float": b"1e999",
    "@hex": b"0x" + b"f" * 6000,
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 100, 2**31, 2**63, 2**64 + 1, 10**9, 10**12, 10**39, 10**400, -(10**400),
    0.0, -0.0, 0.5, 64.0, -1.5, 1e-45, 1e308, float("nan"), float("inf"), -float("inf"),
    "", "x", "64", "1e9", "nan", "true", "None", "float32", "bfloat16", "int8", "nf4", "auto", "../x", "/dev/null",
    "a\x00b", "\x1b[2J\x1b]0;t\x07", "\u202e\u2066", "\ud800", "\u0663", "\u00b2", "e\u0301" * 3000, "(", "(?P<a", "[",
    "a{99999999}", "\\",
    "2020-99-99", "{{ 1 }}", "{% raw %}",
    [], [None], [1, "a"], [[]], [-1], [2**70], [0.5], [""], [True], list(range(3000)), {}, {"": None}, {"a": {"b": []}},
    {"__float__": "Infinity"}, *RAW,
]  # fmt: skip

FRAGMENTS = [  # of a chat template
    "{% for i in range(10**9) %}", "{{ 'a' * 10**10 }}", "{% endfor %}", "{{ x.y.z }}", "{{ raise_exception('no') }}",
    "{%", "}}", "{{ ''.__class__ }}", "\U0001f600", "\x00", "\x1b[2J", "{% include 'x' %}", "{% generation %}",
    "{{ messages[9] }}", "{{ messages[9].content }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{# ",
    "{% set messages = [] %}", "{{ 1 / 0 }}", "{{ undefined() }}", "{{ raise_exception('\x1b[2J') }}",
]  # fmt: skip


def places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of all that a document holds."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        found += [(at, key) for key in keys]
        waiting += [at[key] for key in keys]
    return found


def change(random: Random, document: Any) -> Any:
    """A document with a value, key or element that is another, one more or one less."""
    found = places(document)
    if not found or random.random() < 0.02:
        return random.choice(VALUES)
    container, key = random.choice(found)
    kind = random.random()
    if kind < 0.6:
        container[key] = copy.deepcopy(random.choice(VALUES))
    elif kind < 0.7:
        del container[key]
    elif kind < 0.8 and isinstance(container[key], int | float) and not isinstance(container[key], bool):
        factor, more = random.choice([-1, 2, 1000, 10**9, 0.5]), random.choice([-1, 0, 1])
        with suppress(OverflowError):  # half of more than a float holds
            container[key] = factor * container[key] + more
    elif isinstance(container, dict):
        name = random.choice(
            [str(v) for v in VALUES if isinstance(v, str)] + [k for c, k in found if isinstance(k, str)]
        )
        container[name] = container[key] if random.random() < 0.5 else container.pop(key)
    else:
        container.insert(key, random.choice([container[key], random.choice(VALUES)]))
    return document


def written(random: Random, document: Any) -> bytes:
    """The document as JSON, here and there with an object's key twice."""
    text = json.dumps(document, ensure_ascii=random.random() < 0.5)
    if random.random() < 0.03:
        text = text.replace("{", '{"r": 1, "r": 2, ', 1)
    raw = text.encode("utf-8", "surrogatepass")
    for name, bytes_ in RAW.items():
        raw = raw.replace(f'"{name}"'.encode(), bytes_)
    return raw


def scratch(random: Random, raw: bytes) -> bytes:
    """Bytes with some that are others, lost, doubled, or in another encoding."""
    at, to = sorted(random.randrange(len(raw) + 1) for _ in range(2))
    kind = random.randrange(6)
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + raw[at:to] * 2 + raw[to:]
    if kind == 2:
        return raw[:at] + random.randbytes(random.randrange(1, 9)) + raw[at:]
    if kind == 3:
        return raw.decode("utf-8", "replace").encode(random.choice(["utf-16", "utf-8-sig", "utf-32-le"]))
    flipped = bytearray(raw)
    for _ in range(min(random.randrange(1, 4), len(raw))):
        flipped[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    return bytes(flipped)


def changed_text(random: Random, text: str) -> bytes:
    """A text with something put in, or with bytes that are others."""
    if random.random() < 0.5:
        return scratch(random, text.encode())
    at = random.randrange(len(text) + 1)
    return (text[:at] + random.choice(FRAGMENTS) + text[at:]).encode()


def mutated(random: Random, document: Any) -> bytes:
    """The bytes of a damaged document; of one that is text, not JSON, where it is a str."""
    if isinstance(document, str):
        return changed_text(random, document)
    document = copy.deepcopy(document)
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        document = change(random, document)
    raw = written(random, document)
    return scratch(random, raw) if random.random() < 0.15 else raw
