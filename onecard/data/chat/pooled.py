"""Tokenize a document that a classification head reads, and mark the token at which it reads.

A text has the tokens of the tokenizer itself, with what this puts around a text. A prompt and its answer are one text,
and end with EOS. A chat is the chat template's rendering of all messages, without a generation prompt. These are the
tokens of transformers' pipelines and of trl's RewardTrainer. Control tokens that a message spells stay text.

The head reads at the last token that is not the pad token, as transformers' models do. Where EOS is the pad token, it
reads at the token before the EOS. That token alone has a label. A longer document loses its end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from onecard.data.chat.control import as_text, encode_ids, messages_as_text, refuse_control_tokens
from onecard.data.chat.mask import IGNORE, Example, eos, head, missing_bos, unwritten
from onecard.data.chat.rendering import Renderings
from onecard.data.files import BadRow
from onecard.data.records import Record, row_error
from onecard.data.shapes import Missing, check_words, ways
from onecard.errors import UserError
from onecard.hf.head import pad_of, pooled_position


def encode_pooled(record: Record, tokenizer: Any, most: int) -> Example:
    """Tokenize a record, with its rejected answer if it has one, up to `most` tokens a document.

    A pair whose documents a cut has made equal has no label.

    Raises:
        UserError: no chat template for a chat, or one that leaves out words; control tokens in the text; an answer
            with nothing but pad tokens behind its first token.
    """
    first = encode_document(record, tokenizer, most)
    if record.rejected is None:
        return replace(first, class_name=record.class_name)
    second = encode_document(record.rejected, tokenizer, most)
    labels = first.labels + second.labels
    if first.input_ids == second.input_ids:
        labels = [IGNORE] * len(labels)
    truncated = first.truncated or second.truncated
    ids = first.input_ids + second.input_ids
    return replace(
        first, input_ids=ids, labels=labels, truncated=truncated, answer_cut=truncated, second=len(first.input_ids)
    )


def encode_document(record: Record, tokenizer: Any, most: int) -> Example:
    refuse_control_tokens(record, tokenizer)
    ids = document_ids(record, tokenizer, most)
    is_cut, ids = len(ids) > most, ids[:most]
    at = pooled_position(ids, pad_of(tokenizer))
    if at == 0 and record.class_name is None:
        bad = BadRow("row", "an answer must have a token that is not the pad token, behind its first", "none")
        raise row_error(record.file, record.line, bad)
    labels = [token if i == at else IGNORE for i, token in enumerate(ids)]
    return Example(ids, labels, record.where, is_cut, is_cut)


def document_ids(record: Record, tokenizer: Any, most: int) -> list[int]:
    """Return a document's tokens. Tokens after the first `most` may be missing."""
    if record.messages is not None:
        text = rendered(record, tokenizer)
        ids = encode_ids(head(text, most, tokenizer, record.where), tokenizer, record.where)
        return missing_bos(text, tokenizer) + ids
    before, after = around(tokenizer)
    text = record.text if record.text is not None else f"{record.prompt or ''}{record.completion}"
    ids = encode_ids(head(as_text(text, tokenizer), most, tokenizer, record.where), tokenizer, record.where)
    ends = record.text is None and after[-1:] != eos(tokenizer)
    return before + ids + (eos(tokenizer) if ends else []) + after


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer itself puts before and after a text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def rendered(record: Record, tokenizer: Any) -> str:
    """Return the chat template's rendering of a record's messages, in the first way that keeps all words."""
    spoken, refused = messages_as_text(list(record.messages or ()), tokenizer), None
    for messages, shape in ways(spoken, record.tools, str(tokenizer.chat_template)):
        chat = Renderings(messages, tokenizer, record.where, record.tools, shape=shape)
        try:
            text = chat.text(len(messages))
            check_words(text, messages, record.tools, {})
            return text
        except Missing as missing:
            refused = refused or unwritten(record, missing, chat.template)
        except UserError as error:
            refused = refused or error
    assert refused is not None  # there is at least one way
    raise refused
