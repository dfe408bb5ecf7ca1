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

Exactly one BOS: the template's if it writes one, else the tokenizer's. Examples are never padded (packing
fills a row up with a document of its own, all masked), so no pad token takes an end token's place in labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from onecard.data.files import shown
from onecard.data.records import FIX, Record, strings_in
from onecard.errors import UserError

Span = tuple[int, int]  # characters: start, end
Turn = tuple[int, int, bool]  # start, end, and whether an end-of-turn token closes it
IGNORE = -100
LONGEST_TOKEN = 128  # characters, and to spare
MARK = "\u2042{}\u2042"  # around a number; a chat that holds it is refused where marks are needed
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
OPEN, CLOSE = "\u2042<\u2042", "\u2042>\u2042"
END_NAMES = (  # of tokens that end a turn, for templates whose special tokens do not tell it by their place
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eom_id|>",
    "<|return|>",
    "</s>",
    "<|END_OF_TURN_TOKEN|>",
)


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
        ids, labels = encode_pair(*alpaca_text(record), tokenizer, max_seq_length)
    elif record.text is not None:
        ids, labels = encode_pair("", record.text, tokenizer, max_seq_length)
    else:
        ids, labels = encode_pair(record.prompt or "", record.completion or "", tokenizer, max_seq_length)
    labels[0] = IGNORE  # nothing comes before it: the first token is never predicted
    truncated = len(ids) > max_seq_length
    return Example(ids[:max_seq_length], labels[:max_seq_length], record.where, truncated)


def refuse_control_tokens(record: Record, tokenizer: Any) -> None:
    """Raise UserError if a text holds a special token's spelling: it would become the control token."""
    pattern = specials_of(tokenizer)[1]
    for field, text in texts_of(record):
        match = pattern.search(text)
        if match is not None:
            raise UserError(
                "text must not hold the tokenizer's control tokens",
                f"{match.group()!r} at {match.start()}",
                FIX,
                f"{record.where}:{field}",
            )


def specials_of(tokenizer: Any) -> tuple[frozenset[str], re.Pattern[str]]:
    """The tokens that can end a turn (special ones and END_NAMES), and a pattern that finds special ones."""
    return cached_specials(tokenizer, len(tokenizer), tuple(tokenizer.all_special_tokens))


@lru_cache(maxsize=4)
def cached_specials(tokenizer: Any, size: int, named: tuple[str, ...]) -> tuple[frozenset[str], re.Pattern]:
    """specials_of; `size` and `named` tell a tokenizer that was changed from the one that is cached."""
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(named) - {""}
    longest_first = sorted(special, key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in longest_first) or "(?!)"
    return frozenset(special | set(END_NAMES) & {str(token) for token in added}), re.compile(pattern)


def texts_of(record: Record) -> Iterator[tuple[str, str]]:
    """(field, text) of everything in a record that becomes tokens, tool calls' names and arguments too."""
    for field in ("text", "prompt", "completion"):
        if getattr(record, field) is not None:
            yield field, getattr(record, field)
    for i, turn in enumerate(record.messages or ()):
        yield record.field_of(i), turn["content"]
        for key in turn:
            if key not in ("content", "role"):
                yield from strings_in(f"messages[{i}].{key}", turn[key])
    yield from strings_in("tools", record.tools)


def alpaca_text(record: Record) -> tuple[str, str]:
    """Prompt and answer for a tokenizer without a chat template: plain headings."""
    user, assistant = (turn["content"] for turn in record.messages or ())
    return f"### Instruction:\n{user}\n\n### Response:\n", assistant


def encode_pair(prompt: str, completion: str, tokenizer: Any, most: int) -> tuple[list[int], list[int]]:
    """BOS prompt completion EOS, each tokenized apart so that the boundary is exact; the prompt is masked.

    Of more than `most` tokens those behind may be missing.
    """
    before = bos(tokenizer) + plain_ids(head(prompt, most, tokenizer), tokenizer)
    learned = plain_ids(head(completion, most, tokenizer), tokenizer) + eos(tokenizer)
    return before + learned, [IGNORE] * len(before) + learned


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def head(text: str, most: int, tokenizer: Any) -> str:
    """A text, or so much of its beginning that it has more than `most` tokens: a line of 100 MB is not tokenized whole
    to be cut at once."""
    start = text[: LONGEST_TOKEN * (most + 1)]
    return start if start != text and len(plain_ids(start, tokenizer)) > most else text


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
    messages = [dict(turn) for turn in record.messages or ()]
    text = render(messages, tokenizer, record.where, record.tools)
    stops = specials_of(tokenizer)[0]
    turns = [
        close_turn(text, start, end, stops, tokenizer)
        for start, end in assistant_turns(record, messages, text, tokenizer)
    ]
    unended = messages[-1]["role"] == "assistant" and bool(turns) and not turns[-1][2]
    if unended:
        text = text[: turns[-1][1]]
    text = head(text, most, tokenizer)
    ids, offsets = encode_text(text, [], tokenizer)
    cuts = [
        start
        for i, (start, _, _) in zip(learned_turns(record), turns)
        if start < len(text)
        and any(a < start < b for a, b in offsets)
        and render(messages[:i], tokenizer, record.where, record.tools, add_generation_prompt=True) == text[:start]
    ]
    if cuts:
        ids, offsets = encode_text(text, cuts, tokenizer)
    learned = [False] * len(ids)
    for start, end, _ in turns:
        for i in tokens_within(offsets, start, end):
            learned[i] = True
    if unended:
        ids, learned = ids + eos(tokenizer), [*learned, True]
    first = missing_bos(text, tokenizer)
    ids, learned = first + ids, [False] * len(first) + learned
    return ids, [token if yes else IGNORE for token, yes in zip(ids, learned)]


def encode_text(text: str, cuts: list[int], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens and their character spans, with no token across a cut.

    The cuts are where generation begins: a tokenizer that would join the prompt's last characters with the answer's
    first ones must not, since the model never sees that token after a prompt.
    """
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        coded = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
        ids += coded["input_ids"]
        offsets += [(start + a, start + b) for a, b in coded["offset_mapping"]]
    return ids, offsets


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
    stops = specials_of(tokenizer)[0]
    return [name for name in (tokenizer.eos_token, *END_NAMES) if name in stops]


def missing_bos(text: str, tokenizer: Any) -> list[int]:
    """The BOS that the tokenizer would write, unless the rendered text begins with one."""
    if tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token):
        return []
    return bos(tokenizer)


def render(
    messages: list[dict[str, Any]], tokenizer: Any, where: str, tools: list[dict[str, Any]] | None, **kwargs: Any
) -> str:
    """The chat template's text; its refusal becomes a UserError of the row."""
    if not tokenizer.chat_template:
        raise UserError(
            "chats need a tokenizer with a chat template",
            "none",
            "use the instruct version of the model, or rows of prompt/completion",
            where,
        )
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        must = "the chat template must accept the messages"
        raise UserError(must, shown(reason), FIX, f"{where}:messages") from None


def assistant_turns(record: Record, messages: list[dict[str, Any]], text: str, tokenizer: Any) -> list[Span]:
    """Character spans of `text` that the learned assistant messages take; UserError where not certain."""
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    marked = generation_spans(messages, text, tokenizer, record)
    if marked is not None and len(marked) != len(turns):
        raise unfound(record, turns[0], tokenizer)
    spans: list[tuple[int, int]] = []
    for i in learned_turns(record):
        k = turns.index(i)
        span = marked[k] if marked is not None else turn_span(messages, i, text, tokenizer, record)
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
    shown_edges = render(messages, tokenizer, record.where, record.tools, chat_template=edged)
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


def turn_span(messages: list[dict[str, Any]], i: int, text: str, tokenizer: Any, record: Record) -> Span | None:
    """Characters of `text` that message i takes, its end of turn included; None if unsure."""
    before = render(messages[:i], tokenizer, record.where, record.tools)
    given = render(messages[:i], tokenizer, record.where, record.tools, add_generation_prompt=True)
    prompted = given != before and text.startswith(given)
    through = render(messages[: i + 1], tokenizer, record.where, record.tools) if i + 1 < len(messages) else text
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
    before, found, after = render(marked, tokenizer, record.where, record.tools).partition(mark)
    end = len(text) - len(after)
    if not found or mark in text or mark in after or len(before) > end:
        return None
    if not text.endswith(after) or not (calls or text.startswith(before)):
        return None
    tail = render(marked[: i + 1], tokenizer, record.where, record.tools).partition(mark)[2]
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
    if not tokenizer.chat_template:
        return text_ids(messages[-1]["content"], tokenizer)
    text = render(messages, tokenizer, "prompt", tools, add_generation_prompt=True)
    return missing_bos(text, tokenizer) + plain_ids(text, tokenizer)


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a text to go on with, with the tokenizer's BOS."""
    return bos(tokenizer) + plain_ids(text, tokenizer)
