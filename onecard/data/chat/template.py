"""Replace a tokenizer's chat template by the user's, or give the template's variables other defaults.

The defaults are written into the template, in front of its text. So whoever renders it later, also another tool, writes
what training saw, and can still pass another value: `{% set thinking = thinking if thinking is defined else false %}`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from onecard.errors import UserError, did_you_mean

VARIABLE = re.compile(r"[A-Za-z_]\w*")
GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})  # given by whoever renders a chat


def set_template(tokenizer: Any, path: str | None, variables: dict[str, Any]) -> bool:
    """Set the tokenizer's chat template from a file, and the defaults of its variables. Return whether it changed.

    Raises:
        UserError: a file that cannot be read or has nothing to render; a variable that the template does not name.
    """
    if path is not None:
        tokenizer.chat_template = read_template(Path(path))
    if variables:
        found = tokenizer.chat_template
        if not found:
            do = "pass --chat-template FILE, or leave the variables out"
            raise UserError("chat_template_kwargs need a chat template", "none in the tokenizer", do)
        if isinstance(found, dict):
            tokenizer.chat_template = {name: with_defaults(text, variables) for name, text in found.items()}
        else:
            tokenizer.chat_template = with_defaults(found, variables)
    return path is not None or bool(variables)


def read_template(path: Path) -> str:
    """Read a template's file. Raises UserError."""
    must, do = "a chat template must be a UTF-8 file of Jinja", "name another file"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(must, str(error), do, str(path)) from None
    if "{" not in text:  # a template that writes no message is refused with the first row
        raise UserError(must, "a file without a block or a variable", do, str(path))
    return text


def with_defaults(template: str, variables: dict[str, Any]) -> str:
    """Return the template with other defaults of its variables."""
    lines = []
    names = set(VARIABLE.findall(template)) - GIVEN
    for name, value in variables.items():
        if name not in names:
            must = "chat_template_kwargs must be variables of the chat template"
            found = f'"{name}"' + ("" if name in GIVEN else did_you_mean(name, sorted(names)))
            raise UserError(must, found, "correct the name, or leave it out", "chat_template_kwargs")
        lines.append(f"{{% set {name} = {name} if {name} is defined else {literal(name, value)} %}}\n")
    return "".join(lines) + template  # templates are rendered with trim_blocks, which removes the line breaks


def literal(name: str, value: Any) -> str:
    """Write a plain value in Jinja, which knows JSON except for null."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {literal(name, each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(literal(name, each) for each in value) + "]"
    if value is None:
        return "none"
    return json.dumps(value, allow_nan=False)
