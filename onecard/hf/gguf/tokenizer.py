"""The tokenizer of a GGUF file, if the file says all of it.

Byte-level BPE is whole in the file: tokens, merges, and the name of a pre-tokenizer with known regular expressions.
A sentencepiece tokenizer is not: nothing says whether a text after a special token begins with a space, and models
differ. A wrong guess would change the tokens of each row without an error. So it is refused, as is a pre-tokenizer
that is not known, and the user names the tokenizer's own folder.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from onecard.documents import brief
from onecard.errors import UserError
from onecard.hf.gguf.header import Header, damaged
from onecard.hf.gguf.pre_tokenizers import PRE_TOKENIZERS, cutter

KNOWN = {
    **{name: name for name in ("gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "gpt-4o", "smollm")},
    **dict.fromkeys(("llama3", "llama-v3"), "llama-bpe"),
    "deepseek-r1-qwen": "qwen2",
}  # tokenizer.ggml.pre: the name in PRE_TOKENIZERS; only those that are whole tokenizers of published models
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
DO = (
    "train with --tokenizer DIR, a folder with the tokenizer of the original checkpoint; "
    "other commands get it from the adapter"
)


def tokenizer_of(header: Header) -> Any:
    """Return a file's tokenizer with its chat template.

    Raises:
        UserError: a kind of tokenizer or a pre-tokenizer that is not known to be right; damaged metadata.
    """
    kind, pre = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or pre not in KNOWN:
        must = "a GGUF file's tokenizer must be byte-level BPE with a pre-tokenizer that onecard knows"
        found = f"{brief(kind)}, pre-tokenizer {brief(pre)}"
        raise UserError(must, found, DO, f"{header.file}: tokenizer.ggml.pre")
    tokens, kinds, merges = (texts(header, key) for key in ("tokens", "token_type", "merges"))
    if len(tokens) != len(kinds) or len(set(tokens)) != len(tokens):
        raise damaged(
            header.file, f"{len(set(tokens)):,} different tokens with {len(kinds):,} types of {len(tokens):,}"
        )
    splits, whole = PRE_TOKENIZERS[KNOWN[pre]]
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind != UNUSED}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=whole))  # type: ignore[arg-type]
    except Exception as error:
        raise damaged(header.file, f"merges that its tokens do not have: {brief(str(error))}") from None
    backend.pre_tokenizer = cutter(splits)
    if KNOWN[pre] == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds):
        if kind in (CONTROL, USER_DEFINED, UNKNOWN):
            backend.add_tokens([AddedToken(token, normalized=False, special=kind != USER_DEFINED)])
    named = {name: token_at(header, key, tokens) for name, key in NAMED.items()}
    add_ends(backend, header, named)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=templates(header),
        model_max_length=header.metadata.get(f"{header.architecture}.context_length"),
        additional_special_tokens=[t for t, kind in zip(tokens, kinds) if kind == CONTROL and t not in named.values()],
        **{name: token for name, token in named.items() if token is not None},
    )


def texts(header: Header, key: str) -> list[Any]:
    """Return a list of the metadata. Raises UserError if it is none, or of the wrong items."""
    value = header.metadata.get(f"tokenizer.ggml.{key}")
    kind = int if key == "token_type" else str
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise damaged(header.file, f"tokenizer.ggml.{key} {brief(value)}")
    return value


def token_at(header: Header, key: str, tokens: list[str]) -> str | None:
    """Return a named token; None if the file does not name it. `config_of` has checked the ids."""
    i = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if i is None:
        return None
    if type(i) is not int or not 0 <= i < len(tokens):
        raise damaged(header.file, f"tokenizer.ggml.{key}_token_id {brief(i)}")
    return tokens[i]


def add_ends(backend: Tokenizer, header: Header, named: dict[str, str | None]) -> None:
    """Make the tokenizer add the tokens that the file says it adds around a text."""
    flags = [bool(header.metadata.get(f"tokenizer.ggml.add_{name}_token")) for name in ("bos", "eos")]
    begin, end = (named[f"{name}_token"] if flag else None for name, flag in zip(("bos", "eos"), flags))
    used = [token for token in dict.fromkeys((begin, end)) if token is not None]
    if used:
        parts = [*([begin] if begin else []), "$A", *([end] if end else [])]
        ids = [(token, backend.token_to_id(token)) for token in used]
        pair = [*parts, *([f"{begin}:1"] if begin else []), "$B:1", *([f"{end}:1"] if end else [])]
        backend.post_processor = processors.TemplateProcessing(single=parts, pair=pair, special_tokens=ids)


def templates(header: Header) -> Any:
    """Return the file's chat template; a dict if it has several; None if it has none."""
    prefix = "tokenizer.chat_template"
    named = {k[len(prefix) + 1 :]: v for k, v in header.metadata.items() if k.startswith(f"{prefix}.")}
    default = header.metadata.get(prefix)
    if not all(isinstance(text, str) for text in [*named.values(), default or ""]):
        raise damaged(header.file, "a chat template that is not text")
    return {**({"default": default} if default else {}), **named} if named else default


def end_ids(header: Header) -> list[int]:
    """Return the ids of all tokens that end an answer."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(i for key in keys if type(i := header.metadata.get(key)) is int))


def other_token(header: Header, tokenizer: Any) -> str | None:
    """Return the first normal token that a tokenizer does not have under its id in the file; None if it has all.

    Control tokens are not compared, as files spell them in different ways; a space is sentencepiece's mark.
    """
    tokens, kinds = texts(header, "tokens"), texts(header, "token_type")
    normal = [i for i, kind in enumerate(kinds[: len(tokens)]) if kind == NORMAL]
    found = tokenizer.convert_ids_to_tokens([min(i, len(tokenizer) - 1) for i in normal])
    for i, own in zip(normal, found):
        if i >= len(tokenizer) or str(own).replace(" ", "▁") != tokens[i].replace(" ", "▁"):
            return f"{brief(own if i < len(tokenizer) else None)} at {i}, not {brief(tokens[i])}"
    return None
