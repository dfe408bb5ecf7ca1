"""A chat in the terminal: streaming answers, /reset, /quit; Ctrl-C stops an answer, not the session."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from onecard.data.template import prompt_ids
from onecard.infer.generate import generate


def chat(model: Any, tokenizer: Any, console: Console, max_new_tokens: int, temperature: float) -> None:
    """Talk until /quit or the end of the input."""
    messages: list[dict[str, str]] = []
    console.print("/reset forgets the talk, /quit ends it, Ctrl-C stops an answer", style="dim", markup=False)
    while True:
        try:
            text = console.input("[bold]you[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            messages.clear()
        elif text:
            messages.append({"role": "user", "content": text})
            answer(model, tokenizer, console, messages, max_new_tokens, temperature)


def answer(
    model: Any,
    tokenizer: Any,
    console: Console,
    messages: list[dict[str, str]],
    max_new_tokens: int,
    temperature: float,
) -> None:
    """Stream one answer and keep what was said of it."""
    said: list[str] = []

    def show(text: str) -> None:
        said.append(text)
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    ids = prompt_ids(messages, tokenizer)
    try:
        generate(model, tokenizer, ids, max_new_tokens, temperature, show)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    console.print()
    messages.append({"role": "assistant", "content": "".join(said)})
