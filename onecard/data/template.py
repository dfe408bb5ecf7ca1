"""A record's tokens and labels: the tokenizer's own chat template, loss on the assistant's words only.

The whole chat is rendered and tokenized once; which characters are the assistant's is found by rendering it again
with each assistant message replaced by a marker, so it works with templates that know nothing of training masks.
What follows the words up to and with the end-of-turn token is learned too, so that the model learns to stop.

Exactly one BOS: the template's if it writes one, else the tokenizer's. Rows are never padded, so no pad token can
take an end token's place in the labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onecard.data.records import FIX, Record
from onecard.errors import UserError

IGNORE = -100
MARK = "\u2042{}\u2042"  # around a number; no chat holds it, else it is refused


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
        ids, labels = encode_chat(record, tokenizer)
    elif record.messages is not None:
        ids, labels = encode_pair(*alpaca_text(record), tokenizer)
    elif record.text is not None:
        ids, labels = encode_pair("", record.text, tokenizer)
    else:
        ids, labels = encode_pair(record.prompt or "", record.completion or "", tokenizer)
    labels[0] = IGNORE  # nothing comes before it: the first token is never predicted
    truncated = len(ids) > max_seq_length
    return Example(ids[:max_seq_length], labels[:max_seq_length], record.where, truncated)


def refuse_control_tokens(record: Record, tokenizer: Any) -> None:
    """Raise UserError if a text holds a special token's spelling: it would become the control token."""
    texts: list[tuple[str, str | None]] = [
        ("text", record.text),
        ("prompt", record.prompt),
        ("completion", record.completion),
    ]
    for i, turn in enumerate(record.messages or ()):
        texts.append((f"messages[{i}].content", turn["content"]))
    specials = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials |= set(tokenizer.all_special_tokens)
    for field, text in texts:
        for special in specials:
            if text and special and special in text:
                raise UserError(
                    "text must not hold the tokenizer's control tokens",
                    f"{special!r} at {text.index(special)}",
                    FIX,
                    f"{record.where}:{field}",
                )


def alpaca_text(record: Record) -> tuple[str, str]:
    """Prompt and answer for a tokenizer without a chat template: plain headings."""
    user, assistant = (turn["content"] for turn in record.messages or ())
    return f"### Instruction:\n{user}\n\n### Response:\n", assistant


def encode_pair(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """BOS prompt completion EOS, each tokenized apart so that the boundary is exact; the prompt is masked."""
    before = bos(tokenizer) + plain_ids(prompt, tokenizer)
    learned = plain_ids(completion, tokenizer) + eos(tokenizer)
    return before + learned, [IGNORE] * len(before) + learned


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def bos(tokenizer: Any) -> list[int]:
    """The BOS that the tokenizer itself would write, as a list of one or none."""
    written = tokenizer("a")["input_ids"]
    return written[:1] if written and written[0] == tokenizer.bos_token_id else []


def eos(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer must have an EOS token", "none", "set eos_token in tokenizer_config.json")
    return [tokenizer.eos_token_id]


def encode_chat(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of the rendered chat, labels on the assistant's words and their end of turn."""
    messages = [dict(turn) for turn in record.messages or ()]
    text = render(messages, tokenizer, record.where)
    spans = assistant_spans(messages, text, tokenizer, record.where)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
    stops = end_token_ids(tokenizer)
    learned = [False] * len(ids)
    ended = True
    for start, end in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
        if not inside:
            continue
        for i in inside:
            learned[i] = True
        ended = learn_end(ids, inside[-1] + 1, stops, learned)
    if not ended:  # the template ends the last answer with nothing: the model must still learn to stop
        ids.append(eos(tokenizer)[0])
        learned.append(True)
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        added = bos(tokenizer)
        ids, learned = added + ids, [False] * len(added) + learned
    return ids, [token if yes else IGNORE for token, yes in zip(ids, learned)]


def learn_end(ids: list[int], at: int, stops: set[int], learned: list[bool]) -> bool:
    """Mark the end-of-turn token that follows within a few tokens, and what lies before it."""
    for i in range(at, min(at + 4, len(ids))):
        if ids[i] in stops:
            learned[at : i + 1] = [True] * (i + 1 - at)
            return True
    return False


def end_token_ids(tokenizer: Any) -> set[int]:
    """EOS and the special tokens that end a turn in the known templates."""
    names = (
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|eom_id|>",
        "<|return|>",
        "</s>",
        "<|END_OF_TURN_TOKEN|>",
    )
    found = {tokenizer.convert_tokens_to_ids(name) for name in names if name in tokenizer.get_added_vocab()}
    return found | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def render(messages: list[dict[str, Any]], tokenizer: Any, where: str, **kwargs: Any) -> str:
    """The chat template's text; its refusal becomes a UserError of the row."""
    if not tokenizer.chat_template:
        raise UserError(
            "chats need a tokenizer with a chat template",
            "none",
            "use the instruct version of the model, or rows of prompt/completion",
            where,
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError("the chat template must accept the messages", reason, FIX, f"{where}:messages") from None


def assistant_spans(messages: list[dict[str, Any]], text: str, tokenizer: Any, where: str) -> list[tuple[int, int]]:
    """Character spans of the assistant's words in `text`.

    Each assistant message in turn is replaced by a marker; the text before the marker and the text after it are
    the same as in the true rendering, and what lies between them there is the message's words. A template that
    changes more than that (it trims, or cuts an earlier turn's thoughts) leaves the words as it writes them.
    """
    spans, last = [], 0
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        mark = MARK.format(i)
        content = turn["content"]
        marked = [{**each, "content": mark} if k == i else each for k, each in enumerate(messages)]
        other = render(marked, tokenizer, where)
        at = other.find(mark)
        before, after = other[:at], other[at + len(mark) :]
        found = at >= 0 and text.startswith(before) and text.endswith(after)
        end = len(text) - len(after)
        if not found or mark in text or len(before) > end or len(before) < last:
            words = content.strip()
            start = text.find(words, last) if words else -1
            if start < 0 or text.count(words) > 1:
                raise UserError(
                    "the assistant's words must be found in the chat template's output",
                    f"message {i} is not there as it is",
                    "use a tokenizer whose chat template keeps them, or rows of prompt/completion",
                    f"{where}:messages[{i}]",
                )
            spans.append((start, start + len(words)))
        else:
            spans.append((len(before), end))
        last = spans[-1][1]
    return spans


def prompt_ids(messages: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    """Tokens that ask for the assistant's next message, with exactly one BOS.

    A tokenizer without a chat template gets the last message's text as it is.
    """
    if not tokenizer.chat_template:
        return bos(tokenizer) + plain_ids(messages[-1]["content"], tokenizer)
    text = render(messages, tokenizer, "prompt", add_generation_prompt=True)
    ids = plain_ids(text, tokenizer)
    return ids if ids[:1] == [tokenizer.bos_token_id] else bos(tokenizer) + ids
