"""The reference pages of docs/, from the code: `python -m tests.reference` writes them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin
from unittest.mock import patch

from pydantic import BaseModel

import onecard
from onecard import api, config
from onecard.cli import app
from onecard.terminal import alternatives
from onecard.train.result import Result

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- Written by `python -m tests.reference` from the code. Change the code, not this page. -->\n"
KINDS = {
    "Training: `onecard train`, `onecard.TrainConfig`": config.TrainConfig,
    "Export: `onecard export`, `onecard.ExportConfig`": config.ExportConfig,
    "Server: `onecard serve`": config.ServeConfig,
}
CALLS = ("train", "plan", "load_model", "merge", "export", "quantize_4bit", "dequantize_4bit")
CLASSES = {"TrainConfig": None, "ExportConfig": None, "Result": Result, "Exported": api.Exported,
           "BitsAndBytesConfig": None, "QuantState": None, "UserError": None}  # fmt: skip
SYMBOLS = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}


def commands_page() -> str:
    """Every command and its flags, as cyclopts writes them."""
    with patch("sys.argv", ["onecard"]):
        text = app.generate_docs(output_format="markdown")
    text = re.sub(r"## Table of Contents\n.*?(?=\*\*Commands)", "", text, flags=re.DOTALL)
    return text.replace("# onecard\n", f"# Commands\n\n{NOTE}", 1).rstrip() + "\n"


def settings_page() -> str:
    """Every field of the configs, under the class that defines it."""
    parts = [f"# Settings\n\n{NOTE}\n{SETTINGS_INTRO}\n"]
    for heading, kind in KINDS.items():
        parts.append(f"## {heading}\n")
        for home in reversed(kind.__mro__):
            names = [name for name in vars(home).get("__annotations__", {}) if name in kind.model_fields]
            if names:
                title = (home.__doc__ or "").splitlines()[0].rstrip(".")
                parts.append(f"### {title}\n\n| field | values | default | |\n|---|---|---|---|")
                parts += [field_row(kind, name) for name in names]
                parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def field_row(kind: type[BaseModel], name: str) -> str:
    """A line of a table."""
    info = kind.model_fields[name]
    bounds = [
        f"{SYMBOLS[type(m).__name__]} {next(iter(vars_of(m)))}" for m in info.metadata if type(m).__name__ in SYMBOLS
    ]
    values = ", ".join([type_name(info.annotation), *bounds])
    default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
    cells = (f"`{name}`", values, default if info.is_required() else f"`{default}`", info.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def vars_of(bound: Any) -> list[Any]:
    return [getattr(bound, name) for name in ("ge", "gt", "le", "lt") if hasattr(bound, name)]


def type_name(annotation: Any) -> str:
    """`int`, `str or None`, `"nf4", "fp4" or "int4"`."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return " or ".join(dict.fromkeys(map(type_name, alternatives(annotation))))
    if get_origin(annotation) in (list, dict):
        return f"{get_origin(annotation).__name__}[{', '.join(map(type_name, get_args(annotation)))}]"
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    text = re.sub(r"typing\.|NoneType", lambda found: "None" if found.group() == "NoneType" else "", text)
    text = re.sub(r"Literal\[(.*?)\]", lambda found: found.group(1).replace("'", ""), text)
    return re.sub(r"Optional\[(.*)\]", r"\1 | None", text).replace(" | ", " or ")


def api_page() -> str:
    """The public calls with their docstrings."""
    parts = [f"# Python API\n\n{NOTE}\n{API_INTRO}\n\n## Calls\n"]
    for name in CALLS:
        call = getattr(api, name, None) or getattr(onecard, name)
        parts.append(f"### onecard.{name}\n\n```python\n{signature(name, call)}\n```\n\n{docstring(call)}\n")
    parts.append("## Classes\n")
    for name, kind in CLASSES.items():
        kind = kind or getattr(onecard, name)
        members = [f"- `{key}`: {inspect.getdoc(value)}" for key, value in vars(kind).items()
                   if isinstance(value, property) and inspect.getdoc(value)]  # fmt: skip
        parts.append(f"### {name}\n\n{docstring(kind)}\n")
        parts += ["Properties:\n\n" + "\n".join(members) + "\n"] if members else []
        parts += ["Its fields are in [Settings](settings.md).\n"] if issubclass(kind, BaseModel) else []
    return "\n".join(parts).rstrip() + "\n"


SETTINGS_INTRO = """A field has one name everywhere. `learning_rate` is the flag `--learning-rate`, a key of the YAML
file that `--config` names, and an argument of `onecard.TrainConfig`."""

API_INTRO = """Each call raises `onecard.UserError` for a mistake in the input. Heavy libraries load at the
first use of a name.

```python
import onecard
from onecard import TrainConfig

model = "HuggingFaceTB/SmolLM2-135M-Instruct"
result = onecard.train(TrainConfig(model=model, data="chats.jsonl", output="run"))
print(result.adapter, result.metrics[-1]["loss"], result.report_path)
folder = onecard.merge(model, str(result.adapter), "merged")
```"""


def signature(name: str, call: Any) -> str:
    """The call with a line for each argument."""
    lines, found = [], inspect.signature(call)
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in lines:
            lines.append("*")
        stars = {parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    return f"onecard.{name}(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {found.return_annotation}"


def docstring(of: Any) -> str:
    """A docstring as Markdown: the entries of its sections become lists."""
    lines, section = [], ""
    for line in (inspect.getdoc(of) or "").splitlines():
        heading = re.fullmatch(r"(Args|Attributes|Returns|Raises):", line)
        section = heading[1] if heading else section
        entry = re.fullmatch(r"    (\w[\w, ]*): (.*)", line) if section not in ("", "Returns") else None
        if heading:
            lines.append(f"**{heading[1]}**\n")
        elif entry:
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.strip() if section else line)
    return "\n".join(lines)


PAGES = {"commands.md": commands_page, "settings.md": settings_page, "api.md": api_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
