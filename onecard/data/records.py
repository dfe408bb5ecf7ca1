"""Convert a source's rows to records, each with its file and line. An error names a bad row as file:line:field.

The keys of the rows show the format (`columns.py`): chat `messages` (OpenAI), `prompt`/`completion`, alpaca
(`instruction`, `input`, `output`, and question/answer pairs with other names), ShareGPT `conversations`, plain `text`,
preferences (`chosen` and `rejected`, or an answer with a `label`), and labelled texts. `sources.py` finds and reads the
files, `turns.py` reads the turns of a chat, and `preference.py` the parts of a preference.

Nothing in a row is silently dropped. A column or a turn's key is read, or refused if it changes the meaning of the row,
or named in `notices` with its count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from onecard.config import Source
from onecard.data.calls import check_text, check_tools, is_absent, without_united_nulls
from onecard.data.classes import read_class
from onecard.data.columns import KEYS, VERDICTS, Layout, absent, layout_of, renamed
from onecard.data.files import BadRow, Reading, describe, is_arrow, raise_bad_rows, row_error, shown
from onecard.data.preference import as_messages, read_answer, read_label, read_pair, read_prompt
from onecard.data.sources import rows_of
from onecard.data.turns import MEDIA, Chat, question_turns, read_chat, role_of, system_of
from onecard.errors import UserError

USED = {  # columns that are read in addition to a format's own keys
    "messages": ("tools", "functions", "system", "system_prompt"),
    "sharegpt": ("tools", "functions", "system", "system_prompt"),
    "alpaca": ("input", "context", "system", "system_prompt", "history"),
    "prompt_completion": ("tools", "functions", "system", "system_prompt"),
    "text": (),
    "preference": ("prompt", "tools", "functions", "system", "system_prompt"),
    "unpaired_preference": ("tools", "functions", "system", "system_prompt"),
    "classification": ("tools", "functions", "system", "system_prompt"),
}
FIRST_ROWS = 1000  # rows that show the format


@dataclass(frozen=True)
class Record:
    """One example before tokenization: `messages` for a chat, else `prompt` and `completion`, or `text`.

    Attributes:
        line: 1-based line of the file; the row's number in Parquet, Arrow and JSON arrays.
        num_prompt_messages: number of first messages that are never learned: a prompt of messages, as in trl.
        unlearned: indices of the assistant's messages with weight 0, which are read but not learned.
        tools: tools that the assistant may call, for the chat template.
        fields: our name of each message's content, for errors; empty if it is messages[i].content.
        rejected: of a row of preferences: the same prompt with the rejected answer. This record has the chosen one.
        label: of an answer by itself: whether it is desirable.
        templated: whether the chat template wrote the text, so that its control tokens are meant.
        class_name, is_pooled: its class, and whether a classification head reads it.
    """

    file: str
    line: int
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    alpaca: bool = False
    num_prompt_messages: int = 0
    unlearned: tuple[int, ...] = ()
    tools: list[dict[str, Any]] | None = None
    fields: tuple[str, ...] = ()
    rejected: Record | None = None
    label: bool = True
    templated: bool = False
    class_name: str | None = None
    is_pooled: bool = False

    @property
    def kind(self) -> str:
        """Return "chat", "completion" or "text"."""
        if self.messages is not None:
            return "chat"
        return "text" if self.text is not None else "completion"

    def field_of(self, i: int) -> str:
        """Return the file's name of message i's content."""
        return self.fields[i] if self.fields else f"messages[{i}].content"

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Records:
    """The good rows of a source, how they are read, the errors of the bad rows, and notices.

    `bad`, `files` and `notices` are complete once `records` were read to their end.
    """

    records: Iterable[Record]
    layout: Layout
    bad: list[UserError] = field(default_factory=list)
    source: str = ""
    files: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def format(self) -> str:
        return self.layout.format

    @property
    def num_skipped(self) -> int:
        return len(self.bad)

    def sort_bad(self, bad: list[UserError]) -> None:
        """Sort errors of bad rows in place, in the order of the files and their lines."""
        numbers = {file: number for number, file in enumerate(self.files)}

        def place(error: UserError) -> tuple[int, int]:
            where = error.where or ""
            file = next(file for file in self.files if where.startswith(f"{file}:"))
            return numbers[file], int(where.removeprefix(f"{file}:").split(":")[0])

        bad.sort(key=place)


def read_records(
    source: str | Path | Source,
    on_bad_rows: str = "error",
    formats: Sequence[str] = tuple(KEYS),
    reading: Reading | None = None,
) -> Records:
    """Read the rows of a source.

    Args:
        source: a path, or a source whose settings are complete, as of sources.sources_of.
        formats: the formats that may be recognised.
        on_bad_rows: "error" raises one UserError that lists the bad rows; "skip" leaves them in `bad`.

    Raises:
        UserError: file missing, empty, of another kind or of no known format; bad rows.
    """
    found = open_records(source, formats, reading)
    found.records = list(found.records)
    found.sort_bad(found.bad)
    if on_bad_rows == "error" or not found.records:
        raise_bad_rows(found.bad)
    return found


def open_records(
    source: str | Path | Source, formats: Sequence[str] = tuple(KEYS), reading: Reading | None = None
) -> Records:
    """Begin to read the rows of a source. Its first rows show the format; the rest are read as `records` is.

    Raises:
        UserError: same as `read_records`, but not for bad rows, which `bad` lists.
    """
    source = source if isinstance(source, Source) else Source(path=str(source))
    reading = reading or Reading(source.encoding, split=source.split)
    layout, rows = begin_rows(source, formats, reading)
    found = Records([], layout, source=source.path)
    found.records = converted(rows, found, reading)
    return found


def begin_rows(
    source: Source, formats: Sequence[str], reading: Reading
) -> tuple[Layout, Iterator[tuple[str, int, Any]]]:
    """Return how the first rows of a source are read, and all its rows. Raises UserError, same as `open_records`."""
    rows, first, good = rows_of(source, reading), [], []
    for row in rows:
        first.append(row)
        good += [] if isinstance(row[2], BadRow) else [row[2]]
        if len(good) == FIRST_ROWS:
            break
    if not first:
        raise UserError("the data file must have rows", "none", "check the file", source.path)
    layout = Layout(source.format or "auto", ())
    if good:
        missing = {column for column in (source.columns or {}).values() if not any(column in row for row in good)}
        if missing and len(good) == FIRST_ROWS:
            missing = absent(missing, rows_of(source, replace(reading, told=Counter())))
        layout = layout_of(good, source.format or "auto", source.columns, source.path, formats, missing)
    return layout, chain(first, rows)


def converted(rows: Iterable[tuple[str, int, Any]], found: Records, reading: Reading) -> Iterator[Record]:
    """Yield the rows as records, and complete `found`."""
    unused, num_nulls, files = Counter[str](), 0, dict[str, bool]()
    for file, line, row in rows:
        if file not in files:
            files[file] = is_arrow(Path(file))
            found.files = list(files)
        try:
            if isinstance(row, BadRow):
                raise row
            row, taken = without_united_nulls(row) if files[file] else (row, 0)
            num_nulls += taken > 0
            record, rest = to_record(found.layout, row, file, line)
        except BadRow as error:
            found.bad.append(row_error(file, line, error))
            continue
        unused.update(rest)
        yield record
    found.notices += tell(found, reading, unused, num_nulls)


def tell(found: Records, reading: Reading, unused: Counter[str], num_nulls: int) -> list[str]:
    """Return the notices about how the rows were read, one line each."""
    num_files = len(found.files)
    lines = [text + f": {count:,} of {num_files:,} files" * (num_files > 1) for text, count in reading.told.items()]
    lines += found.layout.told
    if num_nulls:
        rows = counted(num_nulls)
        lines.append(f"left out null arguments of calls, which Arrow writes where a row has none: {rows}")
    for name, count in sorted(unused.items()):
        lines.append(f'"{shown(name)[:60]}" is not used: {counted(count)}')
    return lines


def counted(count: int) -> str:
    return f"{count:,} row{'s' if count != 1 else ''}"


def to_record(layout: Layout, row: dict[str, Any], file: str, line: int) -> tuple[Record, Counter[str]]:
    """Check one row and convert it to a Record. Also return its unused columns and keys.

    Raises:
        BadRow: the row cannot be used. Its field has the file's name.
        UserError: a column is mapped onto another one.
    """
    row = renamed(row, layout.columns, f"{file}:{line}")
    try:
        record, rest = as_format(layout.format, layout.keys, row, file, line)
    except BadRow as error:
        name = layout.in_file(error.field)
        must = name + error.must.removeprefix(error.field) if error.must.startswith(error.field) else error.must
        raise BadRow(name, must, error.found, error.do) from None
    return record, rest


def as_format(
    format: str, keys: tuple[str, ...], row: dict[str, Any], file: str, line: int
) -> tuple[Record, Counter[str]]:
    """Convert a row with our names to a Record, and return what is not used. Raises BadRow."""
    for key in keys:
        if key not in row:
            found = f"keys {', '.join(list(row)[:12]) or 'none'}"
            raise BadRow(key, f'a row of format {format} must have "{key}"', found)
    refuse_changed_meaning(row, format)
    record, chat = READERS[format](keys, row, file, line)
    known = {*keys, *USED[format], *MEDIA, *VERDICTS}
    unused = Counter({key: 1 for key, value in row.items() if key not in known and not is_absent(value)})
    unused.update(chat.unused if chat else ())
    return record, unused


def refuse_changed_meaning(row: dict[str, Any], format: str) -> None:
    """Raise BadRow for a column that changes the meaning of the row: media, or a verdict that the answer is bad."""
    for key in MEDIA:
        if not is_absent(row.get(key)) and format != "text":
            raise BadRow(key, "rows must be text: images, videos and audio are not learned", f"a column {key}")
    for key in () if format in ("unpaired_preference", "classification") else VERDICTS:
        if row.get(key) in (False, 0) and row.get(key) is not None:
            must = f"{key} must be true: training learns every answer, and false marks a bad one"
            raise BadRow(key, must, describe(row[key]), "leave the bad answers out, or learn from them with --loss kto")


def text_record(keys: tuple[str, ...], row: dict[str, Any], file: str, line: int) -> tuple[Record, None]:
    return Record(file, line, text=check_text("text", row["text"])), None


def chat_record(
    keys: tuple[str, ...], row: dict[str, Any], file: str, line: int, learned: bool = True
) -> tuple[Record, Chat]:
    """Read messages or conversations, with the system message of the row's own column before them."""
    chat = read_chat(keys[0], row[keys[0]], learned=learned)
    record = Record(file, line, messages=chat.messages, unlearned=chat.unlearned, tools=check_tools(row))
    fields = () if keys == ("messages",) and all(name.endswith(".content") for name in chat.fields) else chat.fields
    key, system = system_of(row)
    given = [turn["content"] for turn in chat.messages if turn["role"] in ("system", "developer")]
    if not system or given == [system]:
        return replace(record, fields=fields), chat
    if given:
        raise BadRow(key, "a row must have one system message", f"a column and one in {keys[0]}")
    messages = ({"role": "system", "content": system}, *chat.messages)
    fields = (key, *(fields or (f"messages[{i}].content" for i in range(len(chat.messages)))))
    unlearned = tuple(i + 1 for i in chat.unlearned)
    return replace(record, messages=messages, fields=fields, unlearned=unlearned), chat


def pair_record(keys: tuple[str, ...], row: dict[str, Any], file: str, line: int) -> tuple[Record, Chat | None]:
    """Read prompt and completion: two strings, or two lists of messages. Only the completion is learned."""
    return answered(row["prompt"], row["completion"], "completion", row, file, line)


def answered(
    prompt: Any,
    completion: Any,
    key: str,
    row: dict[str, Any],
    file: str,
    line: int,
    asked: Sequence[str] = (),
    implicit: int | None = None,
) -> tuple[Record, Chat | None]:
    """Make the record of a prompt and its answer, a column `key`, of which the first `implicit` messages are the
    prompt. `asked` are the file's names of the prompt's messages."""
    columns = [key for key in USED["prompt_completion"] if not is_absent(row.get(key))]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        prompt, completion = check_text("prompt", prompt, empty=True), check_text(key, completion)
        if columns:
            raise BadRow(
                columns[0], "a row with a text prompt must have no other input columns", f"a column {columns[0]}"
            )
        return Record(file, line, prompt=prompt, completion=completion), None
    if "assistant" not in map(role_of, completion):
        raise BadRow(key, f"a {key} must have an assistant message", describe(completion))
    names = list(asked) or [f"{'prompt' if implicit is None else key}[{i}]" for i in range(len(prompt))]
    column, system = system_of(row)
    given = [turn.get("content", turn.get("value")) for turn in prompt if role_of(turn) in ("system", "developer")]
    if system and given not in ([], [system]):
        raise BadRow(column, "a row must have one system message", f"a column and one in {names[0].split('[')[0]}")
    if system and not given:
        prompt, names = [{"role": "system", "content": system}, *prompt], [column, *names]
    names += [f"{key}[{(implicit or 0) + i}]" for i in range(len(completion))]
    chat = read_chat("prompt", prompt + completion, names)
    if all(i in chat.unlearned for i in range(len(prompt), len(names)) if chat.messages[i]["role"] == "assistant"):
        raise BadRow(key, "an assistant message must have a weight other than 0", "all are 0")
    fields = tuple(field if name.count("[") == 1 else name for name, field in zip(names, chat.fields, strict=True))
    more = {"unlearned": chat.unlearned, "fields": fields, "tools": check_tools(row)}
    return Record(file, line, messages=chat.messages, num_prompt_messages=len(prompt), **more), chat


def alpaca_record(keys: tuple[str, ...], row: dict[str, Any], file: str, line: int) -> tuple[Record, None]:
    """Read one question and answer, with the row's system message and the earlier questions and answers before them."""
    asking, answering = keys
    turns, fields = question_turns(row, asking, keys)
    turns.append({"role": "assistant", "content": check_text(answering, row[answering])})
    return Record(file, line, messages=tuple(turns), alpaca=True, fields=(*fields, answering)), None


def preference_record(keys: tuple[str, ...], row: dict[str, Any], file: str, line: int) -> tuple[Record, Chat | None]:
    """Read a prompt with its chosen and its rejected answer."""
    pair = read_pair(row, keys)
    chosen, chat = answered(pair.prompt, pair.chosen, "chosen", row, file, line, pair.names, pair.implicit)
    rejected, other = answered(pair.prompt, pair.rejected, "rejected", row, file, line, pair.names, pair.implicit)
    if chat and other:
        chat = replace(chat, unused=chat.unused | other.unused)
    if keys[0] not in ("prompt", "chosen") and pair.is_own:  # the answers hold the prompt that is in this column, too
        chat = chat or Chat(())
        chat.unused[keys[0]] += 1
    return replace(chosen, rejected=rejected), chat


def judged_record(keys: tuple[str, ...], row: dict[str, Any], file: str, line: int) -> tuple[Record, Chat | None]:
    """Read a prompt with one answer and its label. Two keys are a chat, whose last message is the answer, and its
    label."""
    label = read_label(keys[-1], row[keys[-1]])
    if len(keys) == 2:
        chat = read_answer(keys[0], row[keys[0]])
        if not isinstance(chat, list) or len(chat) < 2 or role_of(chat[-1]) != "assistant":
            raise BadRow(keys[0], f"{keys[0]} must end with the answer that is judged", describe(chat))
        names = [f"{keys[0]}[{i}]" for i in range(len(chat) - 1)]
        record, said = answered(chat[:-1], chat[-1:], keys[0], row, file, line, names, len(chat) - 1)
        return replace(record, label=label), said
    (prompt, names), answer = read_prompt(row, keys), read_answer(keys[1], row[keys[1]])
    if isinstance(prompt, list) != isinstance(answer, list):
        prompt, answer = as_messages(prompt), as_messages(answer, "assistant")
    record, said = answered(prompt, answer, keys[1], row, file, line, names)
    return replace(record, label=label), said


def labelled_record(keys: tuple[str, ...], row: dict[str, Any], file: str, line: int) -> tuple[Record, Chat | None]:
    """Read a text, or a chat of any messages, and its class."""
    key, name = keys[0], read_class(keys[1], row[keys[1]])
    said = row[key] if key == "text" else read_answer(key, row[key])
    if not isinstance(said, str):
        record, chat = chat_record((key,), {**row, key: said}, file, line, learned=False)
        return replace(record, class_name=name), chat
    for column in USED["classification"]:
        if not is_absent(row.get(column)):
            raise BadRow(column, "a row with a text must have no other input columns", f"a column {column}")
    return Record(file, line, text=check_text(key, said), class_name=name), None


READERS: dict[str, Callable[..., tuple[Record, Chat | None]]] = {
    "messages": chat_record,
    "sharegpt": chat_record,
    "alpaca": alpaca_record,
    "prompt_completion": pair_record,
    "text": text_record,
    "preference": preference_record,
    "unpaired_preference": judged_record,
    "classification": labelled_record,
}
