"""Tokenize a record and set its labels: the tokenizer's own chat template, and loss only on the assistant's text.

The whole chat is rendered once and tokenized once. The assistant's characters in it are found in this order:

1. The template marks them with {% generation %}. The marks are used.
2. Else turn i is the text between two renderings: messages[:i] with the generation prompt, which is the model's
   input, and messages[:i+1]. Both must be prefixes of the whole rendering.
3. Else a mark replaces the message's content in a second rendering. The text around the mark must equal the text
   around the content in the whole. This is for templates without a generation prompt, and for templates that write
   earlier turns differently from the last turn, such as those that cut old thoughts.
4. Else the row is refused: never train on tokens that are only probably the assistant's.

The last turn follows the prompt that generation uses. If the template writes a different prompt before a known answer,
the generation prompt replaces it (`as_asked`). If that is not possible, the row gets a note. Every word of a row must
be in the rendering (`shapes.py`).

A turn is learned up to and including its end-of-turn token, without the line break after it. If the template ends the
last answer without such a token, the text is cut there and EOS is appended, so that the model learns to stop.

Control tokens that a message spells stay text (`control.py`). Templates run with limits (`rendering.py`).

There is exactly one BOS: the template's if it writes one, else the tokenizer's. Examples are never padded: packing
fills a row with a separate masked document. So no pad token replaces an end token in the labels.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from onecard.config import TrainOn
from onecard.data.chat.control import (
    BREAK,
    as_text,
    encode_ids,
    encode_text,
    messages_as_text,
    refuse_break,
    refuse_control_tokens,
    specials_of,
)
from onecard.data.chat.rendering import Renderings
from onecard.data.chat.spans import as_asked, assistant_turns, close_turn, learned_turns
from onecard.data.files import FIX, describe
from onecard.data.records import Record
from onecard.data.shapes import Missing, Shape, check_words, find_words, thought_and_answer, ways
from onecard.errors import UserError

Encoded = tuple[
    list[int], list[int], bool, tuple[str, ...]
]  # ids, labels, whether the missing end of the text is learned, notes
IGNORE = -100
LONGEST_TOKEN = 128  # characters, a generous bound
BREAKS = re.compile("object'? has no |can only concatenate|not iterable")  # jinja's words for a template's own faults
OTHER_PROMPT = "the chat template asks for an answer with another prompt than it writes before the learned one"
NO_NAMES = "the chat template leaves out the names of those who speak"
NO_THOUGHTS = "the chat template leaves out the thoughts of turns before the last, and they are not learned"
ALL_LEARNED = "all tokens of templated text are learned, those of the user too"
NO_CONTROL = "templated text has no control token of the tokenizer"


@dataclass(frozen=True)
class Example:
    """One document: int tokens and labels of equal length; labels[0] is always masked. A pair of answers is two
    documents, of which the second begins with a masked label, too.

    Attributes:
        second: the index at which the second document, with the rejected answer, begins; 0 if there is none.
        label: of an answer by itself: whether it is desirable.
        class_name: of a labelled document.
        truncated, answer_cut: whether it was cut to max_seq_length, and whether that removed supervised tokens.
        notes: what the user should know about it.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    truncated: bool = False
    answer_cut: bool = False
    notes: tuple[str, ...] = ()
    second: int = 0
    label: bool = True
    class_name: str | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return (self.second, len(self.input_ids) - self.second) if self.second else (len(self.input_ids),)

    @property
    def num_supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE)


def encode(record: Record, tokenizer: Any, max_seq_length: int, train_on: TrainOn = "completion") -> Example:
    """Tokenize a record, with its rejected answer if it has one, and mask what is not learned.

    A pair that has lost an answer, or the difference of its answers, by a cut has no supervised token.

    Raises:
        UserError: same as `encode_document`.
    """
    first = encode_document(record, tokenizer, max_seq_length, train_on)
    if record.rejected is None:
        return replace(first, label=record.label)
    second = encode_document(record.rejected, tokenizer, max_seq_length, train_on)
    labels = first.labels + second.labels
    if not (first.num_supervised and second.num_supervised) or first.input_ids == second.input_ids:
        labels = [IGNORE] * len(labels)
    return replace(
        first,
        input_ids=first.input_ids + second.input_ids,
        labels=labels,
        truncated=first.truncated or second.truncated,
        answer_cut=first.answer_cut or second.answer_cut,
        notes=tuple(dict.fromkeys(first.notes + second.notes)),
        second=len(first.input_ids),
    )


def encode_document(record: Record, tokenizer: Any, max_seq_length: int, train_on: TrainOn = "completion") -> Example:
    """Tokenize a record's prompt and its own answer, and mask what is not learned.

    Args:
        train_on: "completion": the completion, or the assistant's turns of a chat, are learned; "last": of these the
            last turn; "all": all tokens.

    Raises:
        UserError: no chat template for a chat; turns with weight 0 where all is learned; a template that refuses the
            chat; control tokens in the text; assistant words that cannot be found in the template's output.
    """
    refuse_control_tokens(record, tokenizer)
    if train_on == "last":
        record = replace(record, unlearned=(*record.unlearned, *learned_turns(record)[:-1]))
    if train_on == "all" and record.unlearned:
        must, do = "a row must have no turns of weight 0 where train_on is all", "leave the weight or train_on out"
        raise UserError(must, "one", do, f"{record.where}:messages[{record.unlearned[0]}]")
    chat = record.messages is not None and prompt_form(record, tokenizer) == "chat"
    how = encode_templated if record.templated else encode_chat if chat else encode_text_record
    ids, labels, cut, notes = how(record, tokenizer, max_seq_length)
    if train_on == "all":
        labels = list(ids)
    if labels:
        labels[0] = IGNORE  # the first token is never predicted: no token precedes it
    truncated = len(ids) > max_seq_length
    cut = truncated and (cut or any(label != IGNORE for label in labels[max_seq_length:]))
    return Example(ids[:max_seq_length], labels[:max_seq_length], record.where, truncated, cut, notes)


def prompt_form(record: Record, tokenizer: Any) -> str:
    """Return how a record's prompt is written: "chat" (by the chat template), "alpaca" (under headings),
    "completion" or "text" (unchanged)."""
    if record.messages is None:
        return "chat" if record.templated else record.kind
    return "alpaca" if record.alpaca and not tokenizer.chat_template else "chat"


def encode_text_record(record: Record, tokenizer: Any, most: int) -> Encoded:
    """Encode a record without a chat template."""
    if record.messages is not None:
        prompt, answer = alpaca_text(record)
    else:
        prompt, answer = record.prompt or "", record.completion or record.text or ""
    ids, labels = encode_pair(prompt, answer, tokenizer, record.where, most)
    return ids, labels, True, ()


def encode_templated(record: Record, tokenizer: Any, most: int) -> Encoded:
    """Encode text that the chat template wrote: its control tokens become tokens. Every token is learned.

    If the text ends with a control token, the white space after it is left out, else EOS is appended.
    """
    text, stops = record.text or "", specials_of(tokenizer)
    ended = text.rstrip().endswith(tuple(stops.names))
    text = text.rstrip() if ended else text
    ids = encode_ids(head(text, most, tokenizer, record.where), tokenizer, record.where)
    ids = missing_bos(text, tokenizer) + ids + ([] if ended else eos(tokenizer))
    notes = (ALL_LEARNED,) if stops.pattern.search(text) else (ALL_LEARNED, NO_CONTROL)
    return ids, list(ids), True, notes


def alpaca_text(record: Record) -> tuple[str, str]:
    """Return prompt and answer of a record for a tokenizer without a chat template. The prompt has plain headings."""
    *before, user, assistant = [turn["content"] for turn in record.messages or ()]
    if len(before) > 1:
        must = "a row with history needs a tokenizer with a chat template"
        raise UserError(
            must, "none", "use the instruct version of the model, or leave history out", f"{record.where}:history"
        )
    return alpaca_prompt(user, *before), assistant


def alpaca_prompt(user: str, system: str = "") -> str:
    """Write a question under alpaca's headings, same as in training without a chat template."""
    return f"{system}\n\n" * bool(system) + f"### Instruction:\n{user}\n\n### Response:\n"


def encode_pair(prompt: str, completion: str, tokenizer: Any, where: str, most: int) -> tuple[list[int], list[int]]:
    """Encode BOS prompt completion EOS, with the prompt masked. Each is tokenized separately for an exact boundary.

    Tokens after the first `most` may be missing.
    """
    before = text_ids(head(prompt, most, tokenizer, where), tokenizer, where)
    learned = encode_ids(head(completion, most, tokenizer, where), tokenizer, where) + eos(tokenizer)
    return before + learned, [IGNORE] * len(before) + learned


def text_ids(text: str, tokenizer: Any, where: str = "prompt") -> list[int]:
    """Tokenize a text without a template, after the BOS that the tokenizer writes. Control tokens in it stay text."""
    return bos(tokenizer) + encode_ids(as_text(text, tokenizer), tokenizer, where)


def head(text: str, most: int, tokenizer: Any, where: str) -> str:
    """Return the text, or a beginning of it that has more than `most` tokens. So a line of 100 MB that will be cut
    is not tokenized as a whole."""
    start = text[: LONGEST_TOKEN * (most + 1)]
    return start if start != text and len(encode_ids(start, tokenizer, where)) > most else text


def bos(tokenizer: Any) -> list[int]:
    """Return the BOS that the tokenizer itself writes, as a list of one or none."""
    written = tokenizer("a")["input_ids"]
    return written[:1] if written and written[0] == tokenizer.bos_token_id else []


def eos(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        do = "set eos_token in tokenizer_config.json"
        raise UserError("the tokenizer must have an EOS token", "none", do)
    return [tokenizer.eos_token_id]


def encode_chat(record: Record, tokenizer: Any, most: int) -> Encoded:
    """Encode a chat in the first of the `ways` in which the template keeps all of its words.

    The template may drop the thoughts of earlier turns if it writes those of a last turn, or if no way keeps them.
    """
    spoken = messages_as_text(list(record.messages or ()), tokenizer)
    refused: list[UserError] = []
    without_thoughts: Encoded | None = None
    for messages, shape in ways(spoken, record.tools, str(tokenizer.chat_template)):
        try:
            found = encode_shaped(record, messages, shape, tokenizer, most)
            if NO_THOUGHTS not in found[-1] or keeps_thoughts(messages, record.tools, shape, tokenizer, record.where):
                return found
            if without_thoughts is None:
                without_thoughts = found
                if shape.thoughts == "content":  # render without them: this removes their white space too
                    shape = replace(shape, last_thoughts=True)
                    without_thoughts = encode_shaped(record, messages, shape, tokenizer, most)
        except UserError as error:
            if not (error.where or "").startswith(f"{record.where}:"):
                raise
            refused.append(error)
    if without_thoughts is None:
        raise min(refused, key=how_telling)
    return without_thoughts


def keeps_thoughts(messages: list[dict[str, Any]], tools: Any, shape: Shape, tokenizer: Any, where: str) -> bool:
    """Whether the template writes the thoughts of the last message that has thoughts, if the chat ends with it."""
    last = max(i for i, turn in enumerate(messages) if thought_and_answer(turn)[0])
    chat = Renderings(messages[: last + 1], tokenizer, where, tools, shape=shape)
    text = chat.replies[last + 1, False].get("text", "")
    return find_words(text, thought_and_answer(messages[last])[0]) is not None


def how_telling(error: UserError) -> int:
    """Rank an error; lower is more useful: what the template leaves out (0), other errors (1), its own faults (2)."""
    if (error.where or "").endswith((".thoughts", ".tool_calls", ":tools")):
        return 0
    return 2 if BREAKS.search(error.found) else 1


def encode_shaped(record: Record, messages: list[dict[str, Any]], shape: Shape, tokenizer: Any, most: int) -> Encoded:
    """Encode the rendered chat, with labels on the assistant's turns up to and including their end-of-turn token.
    Tokens after the first `most` may be missing."""
    indices = learned_turns(record)
    wanted = [(k, prompted) for i in indices for k, prompted in ((i, False), (i, True), (i + 1, False))]
    chat = Renderings(messages, tokenizer, record.where, record.tools, wanted, shape=shape)
    text = chat.text(len(messages))
    try:
        spans = dict(zip(indices, assistant_turns(record, messages, chat, tokenizer)))
        text, spans, as_it_is_asked = as_asked(messages, chat, text, spans)
        cut_thoughts = check_words(text, messages, record.tools, spans)
    except Missing as missing:
        raise unwritten(record, missing, chat.template) from None
    notes = (OTHER_PROMPT,) * (not as_it_is_asked) + (NO_THOUGHTS,) * any(i in spans for i in cut_thoughts)
    named = [turn["name"] for turn in messages if turn["role"] != "tool" and "name" in turn]
    notes += (NO_NAMES,) * any(name not in text for name in named)
    stops = specials_of(tokenizer).names
    turns = [close_turn(text, start, end, stops, tokenizer) for start, end in spans.values()]
    unended = messages[-1]["role"] == "assistant" and bool(turns) and not turns[-1][2]
    if unended:
        text = text[: turns[-1][1]]
    text = head(text, most, tokenizer, record.where)
    ids, offsets = encode_text(text, tokenizer, record.where)
    cuts = [
        start
        for i, (start, _, _) in zip(indices, turns)
        if any(a < start < b for a, b in offsets) and start < len(text) and chat.prompt(i) == text[:start]
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
    labels = [token if yes else IGNORE for token, yes in zip(ids, learned)]
    return ids, labels, turns[-1][1] > len(text), notes


def unwritten(record: Record, missing: Missing, template: str) -> UserError:
    """Make the error for a row whose words the template leaves out."""
    what = {"thoughts": "thoughts", "tool_calls": "tool calls", "tools": "tools"}.get(missing.field, "words")
    do = {
        "thoughts": "use a model whose chat template writes thoughts, or leave them out of the rows",
        "tool_calls": "use a model whose chat template knows tools, or write the calls as text into the content",
        "tools": "use a model whose chat template knows tools, or leave the tools out of the rows",
    }.get(missing.field, "use a model whose chat template keeps them, or leave them out of the rows")
    where = record.field_of(missing.i) if missing.field == "content" else f"messages[{missing.i}].{missing.field}"
    where = "tools" if missing.field == "tools" else where
    must = f"{template} must write all {what} of a row"
    return UserError(must, f"it leaves out {describe(missing.words.replace(BREAK, ''))}", do, f"{record.where}:{where}")


def tokens_within(offsets: list[tuple[int, int]], start: int, end: int) -> range:
    """Return the run of tokens that spell text[start:end].

    Tokens of only spaces have no width in tokenizers that trim offsets. Inside the run, they belong to it.
    """
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and (a < end or a == b == end)]
    return range(inside[0], inside[-1] + 1) if inside and start < end else range(0)


def missing_bos(text: str, tokenizer: Any) -> list[int]:
    """Return the BOS that the tokenizer writes, or [] if the rendered text begins with one."""
    if tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token):
        return []
    return bos(tokenizer)


def prompt_ids(messages: list[dict[str, Any]], tokenizer: Any, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """Tokenize the prompt for the assistant's next message, with exactly one BOS.

    If the tokenizer has no chat template, the prompt is the last message's text, unchanged.
    """
    try:
        if not tokenizer.chat_template:
            return text_ids(messages[-1]["content"], tokenizer)
        refuse_break(tools, "tools")
        text = prompt_text(messages_as_text(messages, tokenizer), tokenizer, tools)
        return missing_bos(text, tokenizer) + encode_ids(text, tokenizer, "prompt")
    except UserError as error:
        if error.do != FIX:
            raise
        raise UserError(error.must, error.found, "say it otherwise") from None  # there is no row to correct


def prompt_text(messages: list[dict[str, Any]], tokenizer: Any, tools: list[dict[str, Any]] | None) -> str:
    """Render the prompt for the next message in the way that training finds; the usual way if none keeps all words."""
    asked, usual, without_thoughts = (len(messages), True), None, None
    for written, shape in ways(messages, tools, str(tokenizer.chat_template)):
        chat = Renderings(written, tokenizer, "prompt", tools, [asked], shape=shape)
        usual = usual or chat
        if (text := chat.prompt(len(messages))) is not None:
            with suppress(Missing):
                cut = check_words(text, [*written, {"role": "assistant", "content": ""}], tools, {})
                if not cut or keeps_thoughts(written, tools, shape, tokenizer, "prompt"):
                    return text
                without_thoughts = without_thoughts or text
    assert usual is not None  # there is always one way
    return without_thoughts or usual.text(*asked)
