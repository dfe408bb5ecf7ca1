"""A YAML document of a config: every field with its value, under its description. It reads back as the same config."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from pydantic import BaseModel

WIDTH = 100  # of a line of a description


def config_yaml(kind: type[BaseModel], fields: dict[str, Any]) -> str:
    """Return all fields of `kind`, those of a class together, with the values of `fields` or else their defaults.

    A required field without a value is a comment, so that reading the document names it as missing.
    """
    parts: list[str] = []
    for home in dict.fromkeys([kind, *reversed(kind.__mro__)]):  # what every run must set comes first
        names = [name for name in vars(home).get("__annotations__", {}) if name in kind.model_fields]
        if names:
            parts.append(f"# ---- {(home.__doc__ or '').splitlines()[0].rstrip('.')} ----\n")
            parts += [field_yaml(kind, name, fields) for name in names]
    return "\n".join(parts)


def field_yaml(kind: type[BaseModel], name: str, fields: dict[str, Any]) -> str:
    """Return the lines of one field."""
    info = kind.model_fields[name]
    lines = [f"# {line}" for line in wrap(info.description or "", WIDTH)]
    if info.is_required() and name not in fields:
        return "\n".join([*lines, f"# {name}: (required)"]) + "\n"
    value = fields.get(name, info.get_default(call_default_factory=True))
    return "\n".join([*lines, value_yaml(name, value)]) + "\n"


def value_yaml(name: str, value: Any) -> str:
    """Return `name: value` on one line."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 20)
    end_mark = "...\n"  # after a text or a number alone
    return f"{name}: {text.removesuffix(end_mark).rstrip()}"
