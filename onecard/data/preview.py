"""Show before training what will be learned: supervised and masked tokens in different colours."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onecard.data.chat.mask import IGNORE, Example
from onecard.data.dataset import Dataset
from onecard.data.files import shown
from onecard.data.packing import pack

SHOWN_TOKENS = 400
SHOWN_BAD = 10


def render_example(example: Example, tokenizer: Any, colour: bool) -> list[Text]:
    """Render each document of an example, under its place in the file."""
    if not example.second:
        verdict = "" if example.label else ", undesirable"
        title = Text(f"\n{example.where}{verdict}", style="underline")
        return [title, render_document(example.input_ids, example.labels, tokenizer, colour)]
    shown_texts = []
    for name, part in (("chosen", slice(example.second)), ("rejected", slice(example.second, None))):
        shown_texts.append(Text(f"\n{example.where}, {name}", style="underline"))
        shown_texts.append(render_document(example.input_ids[part], example.labels[part], tokenizer, colour))
    return shown_texts


def render_document(input_ids: list[int], labels: list[int], tokenizer: Any, colour: bool) -> Text:
    """Render tokens: supervised ones bold green, or in double brackets without colour; masked ones dim."""
    text = Text()
    for start, end, learned in runs(labels[:SHOWN_TOKENS]):
        piece = tokenizer.decode(input_ids[start:end], skip_special_tokens=False)
        piece = piece.replace("\n", "↵\n").replace("\t", "→\t")
        piece = "".join(c if c in "\n\t" else shown(c) for c in piece)
        if not colour and learned:
            piece = f"[[{piece}]]"
        text.append(piece, style="bold green" if learned else "dim")
    rest = len(input_ids) - SHOWN_TOKENS
    if rest > 0:
        text.append(f" … {rest} tokens more", style="italic")
    return text


def runs(labels: list[int]) -> list[tuple[int, int, bool]]:
    """Return (start, end, learned) of each run of labels that are all supervised or all masked."""
    found: list[tuple[int, int, bool]] = []
    for i, label in enumerate(labels):
        learned = label != IGNORE
        if found and found[-1][2] == learned:
            found[-1] = (found[-1][0], i + 1, learned)
        else:
            found.append((i, i + 1, learned))
    return found


def render_counts(dataset: Dataset, packing: bool) -> Table:
    """Render the dataset's counts and shares."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    tokens = dataset.num_tokens
    for name, value in dataset.summary().items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else shown(value))
    table.add_row("share supervised", f"{dataset.num_supervised_tokens / tokens:.1%}")
    table.add_row(
        "share truncated", f"{dataset.num_truncated / (len(dataset.examples) + dataset.num_unsupervised):.1%}"
    )
    if packing:
        rows = int(pack(dataset.stored.lengths, dataset.row_tokens).max()) + 1
        table.add_row("packed rows", f"{rows:,}, {tokens / (rows * dataset.row_tokens):.1%} full")
    return table


def render_sources(dataset: Dataset) -> list[RenderableType]:
    """Render the table of a mixture's sources; nothing if there is one source."""
    if not dataset.shares:
        return []
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in dataset.shares[0].cells():
        if name in ("source", "format", "columns"):
            table.add_column(name, overflow="fold", header_style="dim")
        else:
            table.add_column(name, justify="right", no_wrap=True, header_style="dim")
    for share in dataset.shares:
        table.add_row(*map(Text, map(shown, share.cells().values())))
    return [table]


def render_notices(dataset: Dataset) -> list[RenderableType]:
    """Render the notices about how the rows were read."""
    return [Text(f"note: {shown(notice)}", style="yellow") for notice in dataset.notices]


def render_preview(dataset: Dataset, tokenizer: Any, packing: bool, num_examples: int, colour: bool) -> RenderableType:
    """Render the sources, the counts, the notices, some examples, and the skipped bad rows."""
    parts: list[RenderableType] = [*render_sources(dataset), render_counts(dataset, packing)]
    parts += render_notices(dataset)
    for example in dataset.first(num_examples):
        parts += render_example(example, tokenizer, colour)
    for error in dataset.bad[:SHOWN_BAD]:
        parts.append(Text(f"skipped {error.where}: {error.must}; found {error.found}", style="yellow"))
    if len(dataset.bad) > SHOWN_BAD:
        parts.append(Text(f"and {len(dataset.bad) - SHOWN_BAD} more", style="yellow"))
    return Group(*parts)
