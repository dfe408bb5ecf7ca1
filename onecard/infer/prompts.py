"""Answers to a file of prompts, several at a time, as lines of JSON in the order of the prompts.

Answers go into OUTPUT.part as they end. Its first line has the settings. The same command goes on where an earlier one
ended. Another one is refused, so that no file has the answers of two settings. A whole file has no first line of
settings, and is never written over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onecard.adapter.form import ask, form_ids
from onecard.adapter.load import WEIGHTS
from onecard.adapter.origin import Form
from onecard.config import SamplingConfig
from onecard.data.chat.mask import prompt_ids
from onecard.data.files import BadRow, Reading
from onecard.data.objects import jsonl
from onecard.data.texts import text_file
from onecard.documents import first_mistake
from onecard.errors import UserError
from onecard.faults import as_user_error
from onecard.files import locked, sha256, sync_folder
from onecard.infer.decoding import room_for
from onecard.infer.engine import Engine, GenerationRequest, TextChunk
from onecard.infer.protocol import Message, Tool
from onecard.infer.sampling import Sampler

READERS = {".jsonl": jsonl, ".txt": text_file}
ADDED = ("answer", "finish_reason")  # keys of an answer's line
PREFIX_BYTES = 64 << 20  # keys and values of beginnings that prompts share, such as a system message
DO = "correct the line"
Tokens = tuple[list[int], bool]  # of a prompt, and whether the answer goes on from its text


class Prompt(BaseModel):
    """A line of the file: a prompt, or messages with tools. Its other keys go into the answer's line."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] = Field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A line of the file, as it is and as what is asked. `where` is file:line."""

    where: str
    content: dict[str, Any]
    asked: Prompt


def read_prompts(path: str) -> list[Row]:
    """Read prompts: the objects of a .jsonl file, or the lines of a .txt file. Blank lines are no prompts.

    Raises:
        UserError: the file is of another kind, cannot be read, or has no prompts; a line is not a prompt.
    """
    file = Path(path)
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        found = file.suffix or "no suffix"
        raise UserError("prompts must be a .jsonl or .txt file", found, "rename or convert the file", path)
    rows = []
    with as_user_error(file, lambda: ("nothing was written", "correct it")):
        if not file.is_file():
            raise UserError("the file of prompts must exist", "no such file", "correct the path", path)
        for number, row in reader(file, Reading(sample_by="line")):
            where = f"{path}:{number}"
            if isinstance(row, BadRow):
                raise UserError(row.must, row.found, DO, f"{where}:{row.field}")
            rows.append(checked({"prompt": row["text"]} if reader is text_file else row, where))
    if not rows:
        raise UserError("there must be a prompt", "none", "write one a line", path)
    return rows


def checked(row: dict[str, Any], where: str) -> Row:
    """Return a line that can be answered. Raises UserError."""
    if taken := [name for name in ADDED if name in row]:
        raise UserError(f'a prompt must not have "{taken[0]}"', "it has", "rename the key", f"{where}:{taken[0]}")
    try:
        json.dumps(row, allow_nan=False)
        asked = Prompt.model_validate(row)
    except ValidationError as error:
        raise UserError(*first_mistake(error), DO, where) from None
    except ValueError:
        raise UserError("a number must be one that JSON has", "NaN or Infinity", DO, where) from None
    if (asked.prompt is None) == (asked.messages is None):
        found = "neither" if asked.prompt is None else "both"
        raise UserError('a line must have "prompt" or "messages"', found, DO, where)
    if asked.tools and asked.messages is None:
        raise UserError("tools are for messages", "a prompt with tools", "write messages", f"{where}:tools")
    if asked.messages and asked.messages[-1].role == "assistant":
        do = "leave the answer out, so that the last message is the user's"
        raise UserError("the last message must ask for an answer", "one of the assistant", do, f"{where}:messages")
    return Row(where, row, asked)


def encode(
    rows: list[Row], tokenizer: Any, form: Form | None, raw: bool | None, system: str | None
) -> tuple[list[Tokens], set[str]]:
    """Return the tokens of each prompt, and notes about their form.

    Args:
        raw, system: same as in `ask`. Messages that begin with a system message keep it.

    Raises:
        UserError: same as `ask`, with the line.
    """
    found: list[Tokens] = []
    notes: set[str] = set()
    for row in rows:
        try:
            if row.asked.messages is None:
                assert row.asked.prompt is not None
                ids, goes_on, note = ask(row.asked.prompt, tokenizer, form, raw, system)
                notes |= {note} if note else set()
            else:
                ids, goes_on = chat_ids(row.asked, tokenizer, form, raw, system), False
        except UserError as error:
            raise UserError(error.must, error.found, error.do, row.where) from None
        found.append((ids, goes_on))
    return found, notes


def chat_ids(asked: Prompt, tokenizer: Any, form: Form | None, raw: bool | None, system: str | None) -> list[int]:
    """Return the tokens of messages. Raises UserError, same as `form_ids`."""
    if raw:
        raise UserError("messages need a chat template", "--raw", "write a prompt, or leave --raw out", "messages")
    turns = [message.turn() for message in asked.messages or ()]
    if system is not None and turns[0]["role"] not in ("system", "developer"):
        turns.insert(0, {"role": "system", "content": system})
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools] or None
    return prompt_ids(turns, tokenizer, tools) if raw is False else form_ids(turns, tokenizer, form, tools)


def check_room(model: Any, rows: list[Row], prompts: list[Tokens], max_new_tokens: int) -> None:
    """Raise UserError for the first prompt that leaves no room for an answer."""
    for row, (ids, _) in zip(rows, prompts):
        try:
            room_for(model, len(ids), max_new_tokens)
        except UserError as error:
            raise UserError(error.must, error.found, error.do, error.where if not ids else row.where) from None


def answers(
    model: Any,
    tokenizer: Any,
    prompts: list[Tokens],
    max_new_tokens: int,
    sampling: SamplingConfig,
    ends: tuple[int, ...],
    batch_size: int,
    first: int = 0,
) -> Iterator[TextChunk]:
    """Yield the whole answer to each prompt from `first` on, in order. Each draws with a seed of its own.

    Args:
        ends: same as in `Answer`.
        batch_size: answers at a time; one forward pass gives a token to each.

    Raises:
        UserError: a setting is invalid; an answer could not be computed.
    """
    Sampler(model, sampling)  # a wrong setting raises here, and not in the engine's thread
    queue: SimpleQueue[tuple[int, TextChunk]] = SimpleQueue()
    said, ended = {i: "" for i in range(first, len(prompts))}, {}
    adapter = model.active_adapter if hasattr(model, "peft_config") else None
    with closing(Engine(model, batch_size, len(prompts), PREFIX_BYTES)) as engine:
        works = [
            GenerationRequest(
                prompts[i][0], max_new_tokens, seeded(sampling, i), adapter, tokenizer, putter(queue, i),
                goes_on=prompts[i][1], ends=ends,
            )
            for i in said
        ]  # fmt: skip
        assert engine.submit(*works), "the queue has room for all"
        for i in range(first, len(prompts)):
            while i not in ended:
                at, piece = queue.get()
                if piece.error:
                    do = "pass a smaller --batch-size; the same command goes on"
                    raise UserError("an answer must be computed", piece.error, do, f"prompt {at + 1}")
                said[at] += piece.text
                if piece.finish_reason:
                    ended[at] = TextChunk(said.pop(at), piece.num_tokens, piece.finish_reason)
            yield ended.pop(i)


def seeded(sampling: SamplingConfig, number: int) -> SamplingConfig:
    seed = None if sampling.seed is None else (sampling.seed + number) % (1 << 64)
    return sampling.model_copy(update={"seed": seed})


def putter(queue: SimpleQueue[tuple[int, TextChunk]], number: int) -> Callable[[TextChunk], None]:
    return lambda piece: queue.put((number, piece))


def line_of(row: Row, answer: TextChunk, ascii_only: bool = False) -> str:
    content = {**row.content, "answer": answer.text, "finish_reason": answer.finish_reason}
    return json.dumps(content, ensure_ascii=ascii_only)


class Output:
    """The file of answers, while it grows.

    Args:
        settings: all that an answer depends on.
        most: number of prompts.

    Attributes:
        done: number of answers that are there.

    Raises:
        UserError: the file is there; OUTPUT.part is of other settings or prompts, or another process writes to it; a
            system fault.
    """

    def __init__(self, path: str, settings: dict[str, Any], most: int):
        self.path, self.part = Path(path), Path(f"{path}.part")
        self.stack = ExitStack()
        if os.path.lexists(self.path):
            must, do = "a file of answers is never written over", "choose another --output, or remove the file"
            raise UserError(must, "it is there", do, path)
        with self.told():
            self.file = self.stack.enter_context(self.part.open("a+b"))
            if self.stack.enter_context(locked(self.part)) is False:
                do = "wait for it, or choose another --output"
                raise UserError("one process at a time may write answers", "another one does", do, str(self.part))
            self.file.seek(0)
            *lines, _ = self.file.read().split(b"\n")  # what stands after the last line end was cut
            head = json.dumps(settings, sort_keys=True).encode()
            if lines[:1] not in ([], [head]) or len(lines) > most + 1:
                do = f"give the settings of that command, or remove {self.part.name}"
                raise UserError("the answers must all be of the same settings", "others", do, str(self.part))
            self.done = max(0, len(lines) - 1)
            self.file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self.write(head.decode())

    def told(self) -> Any:
        return as_user_error(self.part, lambda: (f"{self.part.name} keeps the answers", "give the same command again"))

    def write(self, line: str) -> None:
        with self.told():
            self.file.write(line.encode() + b"\n")
            self.file.flush()

    def finish(self) -> None:
        """Give the whole file its name, without the settings."""
        with self.told():
            temporary = self.part.with_name(f"{self.part.name}.tmp")
            with self.part.open("rb") as part, temporary.open("wb") as whole:
                part.readline()
                for line in part:
                    whole.write(line)
                whole.flush()
                os.fsync(whole.fileno())
            os.replace(temporary, self.path)
            self.part.unlink()
            sync_folder(self.path.absolute().parent)

    def close(self) -> None:
        self.stack.close()


def settings_of(prompts: str, model: str, adapter: str | None, **more: Any) -> dict[str, Any]:
    """Return all that the answers depend on, as JSON has it."""
    weights = None if adapter is None else Path(adapter) / WEIGHTS
    known = sha256(weights) if weights is not None and weights.is_file() else None
    return {"prompts": sha256(Path(prompts)), "model": model, "adapter": adapter, "weights": known, **more}
