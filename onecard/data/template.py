"""A record's tokens and labels: the tokenizer's own chat template, loss only on what the assistant writes.

The whole chat is rendered once and tokenized once; which of its characters the assistant writes is found so:

1. The template marks them with {% generation %}: taken as marked.
2. Else turn i is what lies between the rendering of messages[:i] with the generation prompt, which is what
   the model is given, and that of messages[:i+1], where both are prefixes of the whole.
3. Else (the template knows no generation prompt, or writes earlier turns otherwise than the last, as those
   do that cut old thoughts) the message's content is replaced by a mark in a second rendering; what stands
   around the mark must stand around the content in the whole.
4. Else the row is refused: never train on tokens that are only likely to be the assistant's.

A turn is learned up to and with its end-of-turn token, not the line break after it. Where the template ends
the last answer with no such token, the text is cut there and EOS appended, so that the model learns to stop.

Every token that the chat spells itself stays text (`control.py`); templates run with limits (`rendering.py`).

Exactly one BOS: the template's if it writes one, else the tokenizer's. Examples are never padded (packing
fills a row up with a document of its own, all masked), so no pad token takes an end token's place in labels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from onecard.data.control import (
    END_NAMES,
    as_text,
    encode_text,
    messages_as_text,
    refuse_control_tokens,
    specials_of,
)
from onecard.data.records import FIX, Record
from onecard.data.rendering import Renderings
from onecard.errors import UserError

Span = tuple[int, int]  # characters: start, end
Turn = tuple[int, int, bool]  # start, end, and whether an end-of-turn token closes it
IGNORE = -100
LONGEST_TOKEN = 128  # characters, and to spare
MARK = "\u2042{}\u2042"  # around a number; a chat that holds it is refused where marks are needed
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
OPEN, CLOSE = "\u2042<\u2042", "\u2042>\u2042"


@dataclass(frozen=True)
class Example:
    """One document: int tokens and labels of one length; labels[0] is always masked."""

    input_ids: list[int]
    labels: list[int]
    where: str
    truncated: bool = False

    @property
    def num_supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def encode(record: Record, tokenizer: Any, max_seq_length: int) -> Example:
    """Tokenize a record and mask what is not learned.

    Raises:
        UserError: no chat template for a chat; a template that refuses the chat; control tokens in the text;
            assistant words that cannot be found in the template's output.
    """
    refuse_control_tokens(record, tokenizer)
    if record.messages is not None and (tokenizer.chat_template or not record.alpaca):
        ids, labels = encode_chat(record, tokenizer, max_seq_length)
    elif record.messages is not None:
        ids, labels = encode_pair(*alpaca_text(record), tokenizer, record.where, max_seq_length)
    elif record.text is not None:
        ids, labels = encode_pair("", record.text, tokenizer, record.where, max_seq_length)
    else:
        prompt, completion = record.prompt or "", record.completion or ""
        ids, labels = encode_pair(prompt, completion, tokenizer, record.where, max_seq_length)
    labels[0] = IGNORE  # nothing comes before it: the first token is never predicted
    truncated = len(ids) > max_seq_length
    return Example(ids[:max_seq_length], labels[:max_seq_length], record.where, truncated)


def alpaca_text(record: Record) -> tuple[str, str]:
    """Prompt and answer for a tokenizer without a chat template: plain headings."""
    user, assistant = (turn["content"] for turn in record.messages or ())
    return f"### Instruction:\n{user}\n\n### Response:\n", assistant


def encode_pair(prompt: str, completion: str, tokenizer: Any, where: str, most: int) -> tuple[list[int], list[int]]:
    """BOS prompt completion EOS, each tokenized apart so that the boundary is exact; the prompt is masked.

    Of more than `most` tokens those behind may be missing.
    """
    before = text_ids(head(prompt, most, tokenizer, where), tokenizer, where)
    learned = encode_text(head(completion, most, tokenizer, where), tokenizer, where)[0] + eos(tokenizer)
    return before + learned, [IGNORE] * len(before) + learned


def text_ids(text: str, tokenizer: Any, where: str = "prompt") -> list[int]:
    """Tokens of a text that no template wraps, with the BOS that the tokenizer writes; all of it stays text."""
    return bos(tokenizer) + encode_text(as_text(text, tokenizer), tokenizer, where)[0]


def head(text: str, most: int, tokenizer: Any, where: str) -> str:
    """A text, or so much of its beginning that it has more than `most` tokens: a line of 100 MB is not tokenized whole
    to be cut at once."""
    start = text[: LONGEST_TOKEN * (most + 1)]
    return start if start != text and len(encode_text(start, tokenizer, where)[0]) > most else text


def bos(tokenizer: Any) -> list[int]:
    """The BOS that the tokenizer itself would write, as a list of one or none."""
    written = tokenizer("a")["input_ids"]
    return written[:1] if written and written[0] == tokenizer.bos_token_id else []


def eos(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        do = "set eos_token in tokenizer_config.json"
        raise UserError("the tokenizer must have an EOS token", "none", do)
    return [tokenizer.eos_token_id]


def encode_chat(record: Record, tokenizer: Any, most: int) -> tuple[list[int], list[int]]:
    """Tokens of the rendered chat, labels on the assistant's turns up to and with their end-of-turn token; of more
    than `most` tokens those behind may be missing."""
    messages = messages_as_text(list(record.messages or ()), tokenizer)
    wanted = [(k, prompted) for i in learned_turns(record) for k, prompted in ((i, False), (i, True), (i + 1, False))]
    chat = Renderings(messages, tokenizer, record.where, record.tools, wanted)
    text = chat.text(len(messages))
    stops = specials_of(tokenizer).names
    turns = [
        close_turn(text, start, end, stops, tokenizer)
        for start, end in assistant_turns(record, messages, chat, tokenizer)
    ]
    unended = messages[-1]["role"] == "assistant" and bool(turns) and not turns[-1][2]
    if unended:
        text = text[: turns[-1][1]]
    text = head(text, most, tokenizer, record.where)
    ids, offsets = encode_text(text, tokenizer, record.where)
    cuts = [
        start
        for i, (start, _, _) in zip(learned_turns(record), turns)
        if any(a < start < b for a, b in offsets) and start < len(text) and chat.text(i, prompted=True) == text[:start]
    ]
    if cuts:
        ids, offsets = encode_text(text, tokenizer, record.where, tuple(cuts))
    learned = [False] * len(ids)
    for start, end, _ in turns:
        for i in tokens_within(offsets, start, end):
            learned[i] = True
    if unended:
        ids, learned = ids + eos(tokenizer), [*learned, True]
    first = missing_bos(text, tokenizer)
    ids, learned = first + ids, [False] * len(first) + learned
    return ids, [token if yes else IGNORE for token, yes in zip(ids, learned)]


def tokens_within(offsets: list[tuple[int, int]], start: int, end: int) -> range:
    """The run of tokens that spell text[start:end].

    A run: tokenizers that trim offsets give tokens of nothing but spaces no width; those inside belong to it.
    """
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and (a < end or a == b == end)]
    return range(inside[0], inside[-1] + 1) if inside and start < end else range(0)


def close_turn(text: str, start: int, end: int, stops: frozenset[str], tokenizer: Any) -> Turn:
    """(start, end, ended): the turn with its end-of-turn token and without the white space after it."""
    turn = text[start:end].rstrip()
    if any(turn.endswith(stop) for stop in stops):
        return start, start + len(turn), True
    gap = len(text[end:]) - len(text[end:].lstrip())
    for name in turn_ends(tokenizer):  # a template may write it between turns instead of after each
        if text.startswith(name, end + gap):
            return start, end + gap + len(name), True
    return start, start + len(turn), False


def turn_ends(tokenizer: Any) -> list[str]:
    """The tokenizer's tokens that are known to end a turn."""
    return [name for name in (tokenizer.eos_token, *END_NAMES) if name in specials_of(tokenizer).names]


def missing_bos(text: str, tokenizer: Any) -> list[int]:
    """The BOS that the tokenizer would write, unless the rendered text begins with one."""
    if tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token):
        return []
    return bos(tokenizer)


def assistant_turns(record: Record, messages: list[dict[str, Any]], chat: Renderings, tokenizer: Any) -> list[Span]:
    """Character spans of the rendered chat that the learned assistant messages take; UserError where not certain."""
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    marked = generation_spans(messages, chat.text(len(messages)), tokenizer, record)
    if marked is not None and len(marked) != len(turns):
        raise unfound(record, turns[0], tokenizer)
    spans: list[tuple[int, int]] = []
    for i in learned_turns(record):
        k = turns.index(i)
        span = marked[k] if marked is not None else turn_span(messages, i, chat, tokenizer, record)
        if span is None or (spans and span[0] < spans[-1][1]):
            raise unfound(record, i, tokenizer)
        spans.append(span)
    return spans


def learned_turns(record: Record) -> list[int]:
    """Indices of the assistant's messages that are neither part of the prompt nor of weight 0."""
    turns = [i for i, turn in enumerate(record.messages or ()) if turn["role"] == "assistant"]
    return [i for i in turns if i >= record.num_prompt_messages and i not in record.unlearned]


def unfound(record: Record, i: int, tokenizer: Any) -> UserError:
    name = tokenizer.name_or_path or "the tokenizer"
    return UserError(
        "the assistant's words must be found in the chat template's output",
        f"message {i} is not there for certain in the chat template of {name}",
        "use a tokenizer whose chat template keeps them, or rows of prompt/completion",
        f"{record.where}:messages[{i}]",
    )


def generation_spans(
    messages: list[dict[str, Any]], text: str, tokenizer: Any, record: Record
) -> list[tuple[int, int]] | None:
    """Spans of the template's {% generation %} blocks; None if it has no such block, [] if they are unsure.

    The blocks' edges are written out as characters in a second rendering. transformers' own
    return_assistant_tokens_mask goes over token offsets: where an edge falls on a space whose offset the
    tokenizer trims, its mask breaks off.
    """
    template = tokenizer.get_chat_template()
    if not GENERATION.search(template):
        return None
    edged = GENERATION.sub(write_edge, template)
    shown_edges = Renderings(messages, tokenizer, record.where, record.tools, chat_template=edged).text(len(messages))
    parts = re.split(f"({OPEN}|{CLOSE})", shown_edges)
    at, open_at, spans = 0, None, []
    for part in parts:
        if part == OPEN:
            open_at = at
        elif part == CLOSE and open_at is not None:
            spans.append((open_at, at))
            open_at = None
        else:
            at += len(part)
    return spans if re.sub(f"{OPEN}|{CLOSE}", "", shown_edges) == text else []


def write_edge(tag: re.Match[str]) -> str:
    """An edge of a generation block as a block that writes a mark; white space is trimmed as at the tag."""
    left, end, right = tag.groups()
    return f"{{%{left} if true %}}{{{{ '{CLOSE if end else OPEN}' }}}}{{% endif {right}%}}"


def turn_span(messages: list[dict[str, Any]], i: int, chat: Renderings, tokenizer: Any, record: Record) -> Span | None:
    """Characters of the rendered chat that message i takes, its end of turn included; None if unsure."""
    text, given, through = chat.text(len(messages)), chat.text(i, prompted=True), chat.text(i + 1)
    prompted = given != chat.text(i) and text.startswith(given)
    if prompted and text.startswith(through) and len(through) > len(given):
        return len(given), len(through)
    if messages[i].get("tool_calls") and not prompted:
        return None  # nothing tells the turn's header from the call
    span = content_span(messages, i, text, tokenizer, record)
    if span is None or not prompted:
        return span
    return (len(given), span[1]) if len(given) <= span[1] else None


def content_span(
    messages: list[dict[str, Any]], i: int, text: str, tokenizer: Any, record: Record
) -> tuple[int, int] | None:
    """Message i's content in `text` and what the template writes after it, found by a mark in its place.

    Where the message calls tools, the span is from the last call's name on.
    """
    mark, calls = MARK.format(i), messages[i].get("tool_calls")
    marked = [with_mark(turn, mark) if k == i else turn for k, turn in enumerate(messages)]
    chat = Renderings(marked, tokenizer, record.where, record.tools, [(i + 1, False)])
    before, found, after = chat.text(len(marked)).partition(mark)
    end = len(text) - len(after)
    if not found or mark in text or mark in after or len(before) > end:
        return None
    if not text.endswith(after) or not (calls or text.startswith(before)):
        return None
    tail = chat.text(i + 1).partition(mark)[2]
    whole = text.startswith(tail, end)
    if not calls:  # some templates write the next turn's header after every turn
        ends = [tail.find(name) + len(name) for name in turn_ends(tokenizer) if name in tail]
        tail = tail[: min(ends, default=len(tail))]
    if calls and not whole:
        return None  # the call's arguments come after the mark: their end must be known
    return len(before), end + (len(tail) if whole else 0)


def with_mark(turn: dict[str, Any], mark: str) -> dict[str, Any]:
    """The message with a mark for its content, or for its last tool call's name."""
    if not turn.get("tool_calls"):
        return {**turn, "content": mark}
    *calls, last = turn["tool_calls"]
    return {**turn, "tool_calls": [*calls, {**last, "function": {**last["function"], "name": mark}}]}


def prompt_ids(messages: list[dict[str, Any]], tokenizer: Any, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """Tokens that ask for the assistant's next message, with exactly one BOS.

    A tokenizer without a chat template gets the last message's text as it is.
    """
    try:
        if not tokenizer.chat_template:
            return text_ids(messages[-1]["content"], tokenizer)
        asked = (len(messages), True)
        text = Renderings(messages_as_text(messages, tokenizer), tokenizer, "prompt", tools, [asked]).text(*asked)
        return missing_bos(text, tokenizer) + encode_text(text, tokenizer, "prompt")[0]
    except UserError as error:
        if error.do != FIX:
            raise
        raise UserError(error.must, error.found, "say it otherwise") from None  # there is no row to correct
