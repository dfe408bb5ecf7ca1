"""A chat in the terminal. Answers stream. Ctrl-C stops an answer and keeps its text. /adapter switches the adapter.

The KV cache is kept between turns, so a turn computes only its own tokens. A talk that exceeds the model's context
drops its oldest messages at once, down to half the context. So the next turns can use the cache again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from onecard.adapter.form import NAMES, difference, form_ids
from onecard.adapter.load import use_adapter
from onecard.adapter.origin import Form
from onecard.config import SamplingConfig
from onecard.errors import UserError, printable
from onecard.infer.decoding import Answer, context_length, room_for
from onecard.infer.graphs import make_context

HELP = {
    "/reset": "forget the talk",
    "/system TEXT": "begin anew with this system message; without a text, with none",
    "/adapter on|off": "answer as tuned, or as the base does; the talk stays",
    "/again": "answer the last message once more",
    "/save FILE": "append the talk to a file, a row of training data",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}


def chat(
    model: Any,
    tokenizer: Any,
    console: Console,
    max_new_tokens: int,
    sampling: SamplingConfig,
    form: Form | None = None,
) -> None:
    """Talk until /quit or the end of the input.

    Args:
        form: the form of the adapter's prompts; None if its folder does not say.
    """
    talk = Talk(model, tokenizer, console, max_new_tokens, sampling, form)
    if note := difference(form, tokenizer):
        talk.note(note)
    if form and form.prompt != "chat":
        talk.note(f"the adapter was trained on {NAMES[form.prompt]}: it reads each message alone, in this form")
    talk.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the talk")
    while True:
        try:
            text = read_message(console)
        except EOFError:
            return console.print()
        except KeyboardInterrupt:
            console.print()
            talk.note("Ctrl-D or /quit ends the talk")
            continue
        if text == "/quit":
            return
        if text:
            talk.take(text)


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append a row of JSONL, completely or not at all. Raises OSError."""
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    with path.open("ab", buffering=0) as out:
        size = out.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[out.write(line) :]
        except OSError:
            with suppress(OSError):
                out.truncate(size)
            raise


def read_message(console: Console) -> str:
    """Read a line, or a paste of several lines. With readline, the input can be edited and has a history."""
    if not sys.stdin.isatty():
        return console.input("[bold]you[/bold] ").encode("utf-8", "replace").decode("utf-8").strip()
    try:
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # the lines of a paste are one input
    except ImportError:
        pass
    return input("\001\033[1m\002you\001\033[0m\002 ").strip()  # 001 and 002 enclose characters without width


class Talk:
    """The messages so far, and the model's cache of them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        console: Console,
        max_new_tokens: int,
        sampling: SamplingConfig,
        form: Form | None = None,
    ):
        self.model, self.tokenizer, self.console, self.form = model, tokenizer, console, form
        self.max_new_tokens = room_for(model, 1, max_new_tokens)
        self.sampling = sampling
        self.max_tokens = context_length(model)
        self.context = make_context(model)
        self.system: list[dict[str, str]] = []
        self.messages: list[dict[str, str]] = []
        self.first = 0  # the messages before this index are left out
        self.tuned = hasattr(model, "peft_config")

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    def take(self, text: str) -> None:
        """Run a command, or answer a message."""
        word, _, rest = text.partition(" ")
        commands = {
            "/help": self.help,
            "/reset": self.reset,
            "/system": self.set_system,
            "/adapter": self.set_adapter,
            "/again": self.again,
            "/save": self.save,
        }
        try:
            if word in commands:
                commands[word](rest.strip())
            elif re.fullmatch(r"/\w+", word):
                self.note(f"no command {word}; /help lists them")
            else:
                self.messages.append({"role": "user", "content": text})
                self.answer()
        except UserError as error:
            self.note(f"{error}")

    def help(self, _: str) -> None:
        for command, does in HELP.items():
            self.note(f"{command:16s} {does}")

    def reset(self, _: str) -> None:
        self.messages, self.first = [], 0
        self.note("forgotten")

    def set_system(self, text: str) -> None:
        self.system = [{"role": "system", "content": text}] if text else []
        self.reset("")

    def set_adapter(self, state: str) -> None:
        names = getattr(self.model, "peft_config", None)
        if names is None or state not in ("on", "off"):
            found = "no adapter" if names is None else repr(state)
            raise UserError("/adapter takes on or off, with an adapter loaded", found, "start with --adapter DIR")
        self.tuned = state == "on"
        use_adapter(self.model, next(iter(names)) if self.tuned else None)
        self.context.clear()
        self.note(f"adapter {state}; /again answers the last message so")

    def again(self, _: str) -> None:
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            raise UserError("/again needs a message to answer", "none", "say something first")
        self.answer()

    def save(self, file: str) -> None:
        if not file or not self.messages:
            found = "no file" if not file else "nothing said yet"
            raise UserError("/save needs a file and a talk", found, "write /save talks.jsonl")
        try:
            append_line(Path(file).expanduser(), {"messages": self.system + self.messages})
        except OSError as error:
            raise UserError("the file must be writable", f"{error}; it is as it was", "choose another", file) from None
        self.note(f"appended to {file}")

    def answer(self) -> None:
        """Stream an answer to the last message. Its text is kept, also if Ctrl-C stops it."""
        try:
            ids = self.prompt()
        except UserError:
            self.messages.pop()
            raise
        ends = self.form.end_tokens if self.form else ()
        how = (self.max_new_tokens, self.sampling, self.context)
        answer = Answer(self.model, self.tokenizer, ids, *how, ends=ends)
        if hasattr(self.model, "peft_config"):
            self.note("tuned" if self.tuned else "base")
        started = time.perf_counter()
        said = self.stream(answer)
        self.messages.append({"role": "assistant", "content": said})
        seconds = time.perf_counter() - started
        ended = {None: ", stopped", "length": ", cut at its most tokens"}.get(answer.finish_reason, "")
        self.note(f"\n{answer.num_tokens} tokens, {answer.num_tokens / seconds:.1f} tok/s{ended}")

    def stream(self, answer: Answer) -> str:
        """Show the answer until its end or Ctrl-C. It stops only between tokens, so that the cache stays consistent."""
        stopped: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
        said = []
        try:
            while answer.finish_reason is None and not stopped:
                said.append(answer.advance())
                self.console.print(printable(said[-1]), end="", markup=False, highlight=False, soft_wrap=True)
        finally:
            signal.signal(signal.SIGINT, before)
        return "".join(said)

    def prompt(self) -> list[int]:
        """Return the talk's tokens, with room for an answer. The oldest messages are left out if there is no room.

        For an adapter that was trained on single prompts, only the last message is used.
        """
        if self.form and self.form.prompt != "chat":
            self.first = len(self.messages) - 1
        most = self.max_tokens - min(self.max_new_tokens, self.max_tokens // 4)
        ids = form_ids(self.system + self.messages[self.first :], self.tokenizer, self.form)
        if len(ids) <= most:
            return ids
        before = self.first
        users = [i for i, turn in enumerate(self.messages) if turn["role"] == "user" and i > before]
        for self.first in users:
            ids = form_ids(self.system + self.messages[self.first :], self.tokenizer, self.form)
            if len(ids) <= most // 2:
                break
        if len(ids) > most:
            self.first = before
            raise UserError(
                "a message must leave room for an answer",
                f"{len(ids)} tokens, of {self.max_tokens} that the model takes",
                "shorten it",
            )
        self.note(f"the oldest {self.first} messages are left out: the model takes {self.max_tokens} tokens")
        return ids
