"""A tokenizer in GGUF: tokens, their kinds, and merges or scores.

tokenizer.json's BPE shows which of two kinds a tokenizer is:

    byte-level (gpt2)       tokens in the byte alphabet, merges by rank, and the name of a pre-tokenizer, since the
                            file holds no regular expression: llama.cpp has a fixed list of them by name
    byte fallback (llama)   sentencepiece's: llama.cpp joins the neighbours whose union has the highest score; with
                            score = -rank of the first merge that makes a token, that is the order of the merges

A pre-tokenizer is recognised by its output: it must split a probe text exactly as the tokenizer does. If none does, the
one with the tokenizer's tokens for most probes is used, and a note says so.
"""

from __future__ import annotations

import json
from typing import Any

import gguf
from tokenizers import Tokenizer

from onecard.data.chat.mask import bos
from onecard.errors import UserError
from onecard.hf.gguf.pre_tokenizers import PRE_TOKENIZERS, cutter

PROBE = (
    "It's  WE'LL go\n\n \tdo_it(x1, 12345.678) => {'a': \"b\"};\r\n  #!/usr/bin/env // done...\n  Ünïcode Straße "
    "été 北京大学 にほんご 한국어 привет, мир! κόσμε नमस्ते 3½ ٤٥ 🙂🙂 HTTPServer2Go don't DON'T   \n   x"
)
MAX_PROBES = 4000


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int, end_ids: list[int]) -> list[str]:
    """Write a tokenizer's metadata. Return notes of what llama.cpp does differently from the tokenizer.

    Args:
        vocab_size: rows of the embedding; ids without a token become unused tokens.
        end_ids: every token that ends an answer.

    Raises:
        UserError: a tokenizer that is neither byte-level BPE nor BPE with byte fallback.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    model, notes = state["model"], []
    if model["type"] == "BPE" and '"ByteLevel"' in json.dumps(state["pre_tokenizer"]):
        pre, notes = find_pre_tokenizer(backend, model)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(pair) for pair in pairs(model)])
    elif model["type"] == "BPE" and model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(merge_scores(model, vocab_size))
        prefixed = [backend.encode(text, add_special_tokens=False).tokens for text in ("a", " a")]
        writer.add_add_space_prefix(prefixed[0][0] != "a")
        if prefixed[0][0] != "a" and prefixed[0] == prefixed[1]:
            notes.append("a text that begins with a space has one space more in llama.cpp")
    else:
        raise UserError(
            "the tokenizer must be byte-level BPE, or BPE with byte fallback as sentencepiece's",
            f"{model['type']} of another kind",
            "serve the merged checkpoint with vLLM or transformers instead",
            "tokenizer.json",
        )
    tokens, types = list_tokens(state, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    add_special_tokens(writer, tokenizer, vocab_size, end_ids)
    return notes


def pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges by rank. Older files hold each merge as one string."""
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in split]


def merge_scores(model: dict[str, Any], vocab_size: int) -> list[float]:
    """Return scores with which sentencepiece's greedy joining does the merges in the order of their ranks."""
    scores = [0.0] * vocab_size
    for rank, (left, right) in reversed(list(enumerate(pairs(model), 1))):
        token = model["vocab"][left + right]
        if token < vocab_size:
            scores[token] = float(-rank)
    return scores


def list_tokens(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the spelling and kind of each id below vocab_size."""
    kind, model = gguf.TokenType, state["model"]
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [int(kind.UNUSED)] * vocab_size
    for token, i in model["vocab"].items():
        if i < vocab_size:
            byte = model["byte_fallback"] and len(token) == 6 and token.startswith("<0x")
            tokens[i], types[i] = token, kind.BYTE if byte else kind.NORMAL
            if token == model["unk_token"]:
                types[i] = kind.UNKNOWN
    for added in state["added_tokens"]:
        i, unknown = added["id"], added["content"] == model["unk_token"]
        if i < vocab_size and not unknown:
            tokens[i] = added["content"] if added["special"] else added["content"].replace("▁", " ")
            types[i] = kind.CONTROL if added["special"] else kind.USER_DEFINED
    return tokens, types


def add_special_tokens(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int, end_ids: list[int]) -> None:
    """Write the ids of the named tokens, which of them the tokenizer adds itself, and the chat template."""
    named = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, add in named.items():
        i = getattr(tokenizer, f"{name}_token_id")
        if i is not None and i < vocab_size:  # some tokenizer classes name tokens without a row in the model
            add(i)
    others = [i for i in end_ids if i != tokenizer.eos_token_id and i < vocab_size]
    if others:
        writer.add_eot_token_id(others[0])
    written = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(bos(tokenizer)))
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and written[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


def find_pre_tokenizer(backend: Tokenizer, model: dict[str, Any]) -> tuple[str, list[str]]:
    """Return llama.cpp's name for a byte-level tokenizer's pre-tokenizer, and a note if no name is exact."""
    cuts = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(PROBE)]
    for name, (splits, whole) in PRE_TOKENIZERS.items():
        same = [span for _, span in cutter(splits).pre_tokenize_str(PROBE)] == cuts
        if same and whole == bool(model.get("ignore_merges")):
            return name, []
    probes = [PROBE, *PROBE.split(), *list(model["vocab"])[-MAX_PROBES:]]
    probes = [text.replace("Ġ", " ").replace("Ċ", "\n") for text in probes]
    wanted = [encoded.ids for encoded in backend.encode_batch(probes, add_special_tokens=False)]
    other = Tokenizer.from_str(backend.to_str())
    shares = {}
    for name, (splits, whole) in PRE_TOKENIZERS.items():
        other.pre_tokenizer, other.model.ignore_merges = cutter(splits), whole
        found = other.encode_batch(probes, add_special_tokens=False)
        shares[name] = sum(a.ids == b for a, b in zip(found, wanted)) / len(probes)
    nearest = max(shares, key=lambda name: shares[name])
    return nearest, [
        f"llama.cpp has no pre-tokenizer that cuts text as this one does: {nearest!r} is nearest, with the same tokens "
        f"for {shares[nearest]:.1%} of {len(probes):,} probes"
    ]
