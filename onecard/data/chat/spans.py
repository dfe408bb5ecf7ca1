"""Find the assistant's turns in a rendered chat, and put the last one after the prompt that generation uses."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

from onecard.data.chat.control import END_NAMES, specials_of
from onecard.data.chat.rendering import Renderings
from onecard.data.records import Record
from onecard.data.shapes import Missing
from onecard.errors import UserError

Span = tuple[int, int]  # characters: start, end
Turn = tuple[int, int, bool]  # start, end, and whether an end-of-turn token closes it
MARK = "\u2042{}\u2042"  # around a number. A chat that contains it is refused where marks are needed
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
OPEN, CLOSE = "\u2042<\u2042", "\u2042>\u2042"


def assistant_turns(record: Record, messages: list[dict[str, Any]], chat: Renderings, tokenizer: Any) -> list[Span]:
    """Return the character spans of the learned assistant messages in the rendered chat.

    Raises:
        UserError: a span is not certain.
        Missing: the template leaves out a call.
    """
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    marked = generation_spans(messages, chat)
    if marked is not None and len(marked) > len(turns):
        marked = joined(marked)
    if marked is not None and len(marked) != len(turns):
        raise unfound(record, turns[0], tokenizer)
    spans: list[tuple[int, int]] = []
    for i in learned_turns(record):
        k = turns.index(i)
        span = marked[k] if marked is not None else turn_span(messages, i, chat)
        if span is None or (spans and span[0] < spans[-1][1]):
            raise unfound(record, i, tokenizer)
        spans.append(span)
    return spans


def learned_turns(record: Record) -> list[int]:
    """Return the indices of the assistant's messages that are not in the prompt and do not have weight 0."""
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


def generation_spans(messages: list[dict[str, Any]], chat: Renderings) -> list[Span] | None:
    """Return the spans of the template's {% generation %} blocks; None if it has no such block, [] if not certain.

    A second rendering writes the blocks' edges as characters. transformers' own return_assistant_tokens_mask uses
    token offsets. Its mask ends early where an edge is on a space whose offset the tokenizer trims.
    """
    template = chat.tokenizer.get_chat_template()
    if not GENERATION.search(template):
        return None
    edged = GENERATION.sub(write_edge, template)
    shown_edges = chat.again(messages, template=edged).text(len(messages))
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
    return spans if re.sub(f"{OPEN}|{CLOSE}", "", shown_edges) == chat.text(len(messages)) else []


def joined(spans: list[Span]) -> list[Span]:
    """Join adjacent blocks, which are parts of one turn, and drop empty blocks."""
    found: list[Span] = []
    for start, end in spans:
        goes_on = bool(found) and found[-1][1] == start
        if start < end:
            found.append((found.pop()[0] if goes_on else start, end))
    return found


def write_edge(tag: re.Match[str]) -> str:
    """Replace a generation block's tag by a block that writes a mark and trims white space in the same way."""
    left, end, right = tag.groups()
    return f"{{%{left} if true %}}{{{{ '{CLOSE if end else OPEN}' }}}}{{% endif {right}%}}"


def turn_span(messages: list[dict[str, Any]], i: int, chat: Renderings) -> Span | None:
    """Return the span of message i in the rendered chat, with its end of turn; None if not certain."""
    text, given, through = chat.text(len(messages)), chat.prompt(i), chat.text(i + 1)
    prompted = given is not None and text.startswith(given) and given != chat.text(i)
    if given and prompted and text.startswith(through) and len(through) > len(given):
        return len(given), len(through)
    find = calls_span if messages[i].get("tool_calls") else content_span
    span = find(messages, i, text, chat, not prompted)
    if span is None or not prompted or given is None:
        return span
    return (len(given), span[1]) if len(given) <= span[1] else None


def content_span(messages: list[dict[str, Any]], i: int, text: str, chat: Renderings, headed: bool) -> Span | None:
    """Return the span of message i's content and its end of turn in `text`, found by a mark in place of the content.

    Args:
        headed: the span begins where an answer begins, so it includes thoughts before the content.
    """
    mark = MARK.format(i)
    marked = [{**turn, "content": mark} if k == i else turn for k, turn in enumerate(messages)]
    again = chat.again(marked, [(i + 1, False)])
    before, found, after = again.text(len(marked)).partition(mark)
    end = len(text) - len(after)
    if not found or mark in text or mark in after or len(before) > end:
        return None
    if not text.endswith(after) or not text.startswith(before):
        return None
    own_before, _, tail = again.text(i + 1).partition(mark)
    lead = behind_header(own_before, messages, i, chat) if headed and messages[i].get("reasoning_content") else None
    start = len(before) - len(lead) if lead is not None and before.endswith(lead) else len(before)
    whole = text.startswith(tail, end)
    return start, end + (len(to_turn_end(tail, chat)) if whole else 0)


def calls_span(messages: list[dict[str, Any]], i: int, text: str, chat: Renderings, headed: bool) -> Span | None:
    """Return the span of message i, which calls tools, with its end of turn, found by a mark for its last call's name.

    Args:
        headed: the span begins where an answer begins; else at the last call's name.
    """
    mark, own = MARK.format(i), chat.text(i + 1)
    *calls, last = messages[i]["tool_calls"]
    named = {**messages[i], "tool_calls": [*calls, {**last, "function": {**last["function"], "name": mark}}]}
    again = chat.again([*messages[:i], named, *messages[i + 1 :]], [(i + 1, False)])
    before, found, _ = again.text(len(messages)).partition(mark)
    own_before = again.text(i + 1).partition(mark)[0]
    if not found:
        raise Missing(i, "tool_calls", last["function"]["name"])
    if mark in text or not text.startswith(before) or not own.startswith(own_before):
        return None
    call = own[len(own_before) :]
    if not text.startswith(call, len(before)):
        call = to_turn_end(call, chat)
    lead = behind_header(own_before, messages, i, chat) if headed else ""
    if lead is None or not before.endswith(lead) or not text.startswith(call, len(before)):
        return None
    return len(before) - len(lead), len(before) + len(call)


def behind_header(own: str, messages: list[dict[str, Any]], i: int, chat: Renderings) -> str | None:
    """Return the part of `own`, text of messages[:i + 1], that belongs to message i, after the header of any answer.

    It begins after the generation prompt. Without one, or if that opens another thought, it begins where `own` differs
    from a rendering with a plain answer instead of message i. None if not certain.
    """
    mark, words = MARK.format(i), messages[i - 1]["content"].strip() if i else ""
    try:
        plain = chat.again([*messages[:i], {"role": messages[i]["role"], "content": mark}]).text(i + 1)
    except UserError:
        return None
    header, found, _ = plain.partition(mark)
    before, given = (chat.replies[i, prompted].get("text", "") for prompted in (False, True))
    start = len(outside_tags(os.path.commonprefix([own, header])))  # noqa: RUF071 (characters, not paths)
    asking = given[len(before) :] if given.startswith(before) else ""
    if asking and asking in header[:start]:
        start = header.rfind(asking, 0, start) + len(asking)
    if words and words in header:
        known = header.rfind(words) + len(words)
    else:
        known = len(before) if before and header.startswith(before) else start + 1
    return own[start:] if found and known <= start else None


def outside_tags(text: str) -> str:
    """Remove an incomplete spelling of a control token from the end of a text."""
    opened = max(text.rfind("<"), text.rfind("["))
    return text[:opened] if opened > max(text.rfind(">"), text.rfind("]")) else text


def to_turn_end(tail: str, chat: Renderings) -> str:
    """Cut the text after an answer at its end of turn: some templates write the next header after every turn."""
    ends = [tail.find(name) + len(name) for name in turn_ends(chat.tokenizer) if name in tail]
    return tail[: min(ends, default=len(tail))]


def as_asked(
    messages: list[dict[str, Any]], chat: Renderings, text: str, spans: dict[int, Span]
) -> tuple[str, dict[int, Span], bool]:
    """Put the generation prompt before the last message, if that is learned. Also return whether the two agree.

    A template may write the system message or the tools only before a last user's message, or open a thought in its
    generation prompt. Then the text is that prompt, the answer, and what the template writes after an answer.
    """
    i = len(messages) - 1
    given = chat.prompt(i) if i in spans else None
    if given is None or text.startswith(given):
        return text, spans, True
    answer = None if messages[i].get("tool_calls") else answer_after(messages, chat, given)
    prefix_length = len(os.path.commonprefix([given, text]))  # noqa: RUF071 (characters, not paths)
    if answer is None or any(end > prefix_length for k, (_, end) in spans.items() if k < i):
        return text, spans, False
    made = given + answer
    return made, {**spans, i: (len(given), len(made))}, True


def answer_after(messages: list[dict[str, Any]], chat: Renderings, given: str) -> str | None:
    """Return the last message as the continuation of a prompt, with its end; None if the two do not fit."""
    *before, last = messages
    mark, asked = MARK.format(len(before)), before[-1]["content"].strip() if before else ""
    head, found, tail = (
        chat.again([*before, {"role": last["role"], "content": mark}]).text(len(messages)).partition(mark)
    )
    words = replace(chat.shape, parts="none").message(last)
    if not found or mark in tail or not asked or asked not in head or asked not in given or len(words) > 2:
        return None
    answer, written, prompted = words["content"], head.rpartition(asked)[2], given.rpartition(asked)[2]
    if written.startswith(prompted):
        return written[len(prompted) :] + answer + tail
    opened = prompted.removeprefix(written)  # such as "<think>\n", which the answer must begin with
    if not prompted.startswith(written) or not answer.lstrip().startswith(opened.strip()):
        return None
    return answer.lstrip().removeprefix(opened.strip()).lstrip() + tail


def close_turn(text: str, start: int, end: int, stops: frozenset[str], tokenizer: Any) -> Turn:
    """Return (start, end, ended) of the turn with its end-of-turn token and without the white space after it."""
    turn = text[start:end].rstrip()
    if any(turn.endswith(stop) for stop in stops):
        return start, start + len(turn), True
    gap = len(text[end:]) - len(text[end:].lstrip())
    for name in turn_ends(tokenizer):  # a template may write it between turns instead of after each
        if text.startswith(name, end + gap):
            return start, end + gap + len(name), True
    return start, start + len(turn), False


def turn_ends(tokenizer: Any) -> list[str]:
    """Return the tokenizer's tokens that are known to end a turn."""
    return [name for name in (tokenizer.eos_token, *END_NAMES) if name in specials_of(tokenizer).names]
