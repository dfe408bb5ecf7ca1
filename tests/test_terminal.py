"""Exact: a terminal obeys nothing that a file's names and texts hold, and a flag takes each choice of its field."""

import io
from typing import Annotated, Literal, get_args, get_origin

import pytest
from cyclopts import App
from rich.console import Console
from rich.table import Table

from onecard.cli.app import flags
from onecard.config import ExportConfig, PlanConfig, QuantizeConfig, ServeConfig, StudioConfig, TrainConfig
from onecard.errors import UserError, printable
from onecard.terminal import alternatives, given, make_console, partial

OBEYED = "\x1b[2J\x1b]0;title\x07\r\x9b\u202e\u2028\ud800"


def test_an_error_escapes_and_cuts_what_it_names():
    found = f"{OBEYED}\n  do:    run this\n" + "x" * 10_000 + "\nlast" * 1000
    text = str(UserError(f"must {OBEYED}", found, f"do {OBEYED}", f"folder/{OBEYED}{'y' * 10_000}.safetensors"))
    assert printable(text) == text and "\\x1b[2J" in text and "\\u202e" in text
    assert len(text) < 3000 and ".safetensors: must" in text
    assert text.encode()  # no half of a surrogate pair
    lines = text.split("\n")
    assert [line for line in lines if line.startswith("  do:")] == lines[-1:]  # the forged one is part of the list


def test_letters_of_any_language_stay():
    text = "größe 模型 นี่ می‌خواهم 👩‍👩‍👧\tx\n"
    assert printable(text) == text


def test_all_that_a_console_prints_is_escaped(monkeypatch):
    out = io.StringIO()
    console = make_console()
    monkeypatch.setattr(console, "file", out)
    table = Table("a column")
    table.add_row(OBEYED)
    for shown in (OBEYED, table):
        console.print(shown, markup=False)
    console.print("kept", style="bold")
    text = out.getvalue()
    assert printable(text) == text and text.count("\\x1b[2J") == 2 and "kept" in text


def test_rich_s_own_codes_stay():
    out = io.StringIO()
    console = make_console()
    coloured = Console(file=out, force_terminal=True, color_system="standard")
    for hook in console._render_hooks:
        coloured.push_render_hook(hook)
    coloured.print("red \x1b[2J", style="red", highlight=False)
    assert out.getvalue() == "\x1b[31mred \\x1b[2J\x1b[0m\n"


@pytest.mark.parametrize("kind", [ExportConfig, PlanConfig, QuantizeConfig, ServeConfig, StudioConfig, TrainConfig])
def test_every_choice_can_be_a_flag(kind):
    app, fields = App(), Annotated[partial(kind) | None, flags]

    @app.default
    def command(read: fields = None):  # type: ignore
        return given(read)

    for name, info in kind.model_fields.items():
        choices = [c for each in alternatives(info.annotation) if get_origin(each) is Literal for c in get_args(each)]
        for choice in choices:
            call, bound, _ = app.parse_args([f"--{name.replace('_', '-')}", str(choice)])
            assert call(*bound.args, **bound.kwargs) == {name: choice}, name
