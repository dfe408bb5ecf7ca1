"""The tensors of a GGUF file as a checkpoint's: transformers' names, row order and values.

    W = dequantize(blocks)[order] - shift

llama.cpp orders the rows of llama's queries and keys for a rotary embedding of neighbours, and stores gemma's norms as
1 + weight. Both are undone here. The dequantization is the gguf package's, in float32; the result is rounded once to
the model's dtype, as in transformers.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onecard.errors import UserError
from onecard.faults import about
from onecard.hf.gguf.config import DO, GEMMAS
from onecard.hf.gguf.header import Header, Stored
from onecard.hf.stored import Form, TensorInfo, computed
from onecard.quant.blockwise import all_finite

ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_LAYER = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
MORE = {"gemma2": GEMMA_LAYER, "gemma3": GEMMA_LAYER, "phi3": {"ffn_up": "mlp.gate_up_proj"}}
NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
NOT_WEIGHTS = ("rope_freqs.weight",)  # config_of reads it
FLOATS = ("F32", "F16", "BF16")
DTYPES = {"F32": "F32", "F16": "F16"}  # of a model by the type of its matrices; any other type gives BF16


@dataclass(frozen=True)
class Blocks(Form):
    """Values of a GGUF file: blocks of a type, or floats.

    Attributes:
        heads, head_dim: of rows in the order of llama.cpp's rotary embedding; 0: the rows are in transformers' order.
        shift: what to subtract.
    """

    name: str
    stored: Stored
    heads: int = 0
    head_dim: int = 0
    shift: float = 0.0

    @property
    def kind(self) -> str:
        return f"GGUF {self.stored.kind}"

    @property
    def is_rounded(self) -> bool:
        return self.stored.kind not in FLOATS

    @property
    def least_rows(self) -> int:
        return 1

    def rows(self, first: int, count: int) -> Tensor:
        """Return rows in float32. Raises UserError for a NaN or an Inf."""
        if len(self.stored.shape) == 1:
            values = self.read(0, 1)
            W = values if self.heads == 0 else values[:, self.places(0, values.shape[1])]
        elif self.heads == 0:
            W = self.read(first, count)
        else:
            places = self.places(first, count)
            low = int(places.min())
            W = self.read(low, int(places.max()) + 1 - low)[places - low]
        if not all_finite(W):
            do = "the file is damaged: fetch it again"
            raise UserError("every weight must be finite", "NaN or Inf", do, f"{self.stored.file}: {self.name}")
        return W - self.shift if self.shift else W

    def places(self, first: int, count: int) -> Tensor:
        """Return where the file has some rows of transformers' order."""
        order = torch.arange(self.heads * self.head_dim).view(self.heads, self.head_dim // 2, 2).transpose(1, 2)
        return order.reshape(-1)[first : first + count]

    def read(self, first: int, count: int) -> Tensor:
        """Dequantize consecutive rows of the file."""
        import gguf

        stored = self.stored
        size = stored.nbytes // (stored.shape[0] if len(stored.shape) > 1 else 1)
        with about(stored.file), stored.file.open("rb") as stream:
            stream.seek(stored.begin + first * size)
            raw = np.frombuffer(stream.read(count * size), np.uint8).reshape(count, size)
        kind = gguf.GGMLQuantizationType[stored.kind]
        if stored.kind in ("F32", "F16"):  # gguf.dequantize wants these in their dtype
            raw = raw.view(np.float32 if stored.kind == "F32" else np.float16)
        with np.errstate(all="ignore"):  # a damaged scale; the values are checked
            return torch.from_numpy(gguf.dequantize(raw, kind).astype(np.float32)).view(count, -1)


def gguf_tensors(header: Header, config: Any) -> dict[str, TensorInfo]:
    """Return a file's tensors under transformers' names.

    Args:
        config: `config_of` the file.

    Raises:
        UserError: a tensor that the model does not have.
    """
    names = LAYER | MORE.get(header.architecture, {})
    dtype, found = model_dtype(header), {}
    for own, stored in header.tensors.items():
        if own in NOT_WEIGHTS:
            continue
        match = NAME.fullmatch(own)
        name = match and (names if match[1] else ENDS).get(match[2])
        if match is None or name is None:
            must = f"a tensor must be part of a {header.architecture} model"
            raise UserError(must, "one that transformers has no place for", DO, f"{stored.file}: {own}")
        name = f"model.layers.{match[1]}.{name}.{match[3]}" if match[1] else f"{name}.{match[3]}"
        heads = 0
        if header.architecture == "llama" and match[2] in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if match[2] == "attn_q" else config.num_key_value_heads
            if stored.shape[0] != heads * config.head_dim:
                found_shape = f"{list(stored.shape)} for {heads} heads of {config.head_dim}"
                raise UserError("queries and keys must have the rows of their heads", found_shape, DO, own)
        shift = 1.0 if header.architecture in GEMMAS and own.endswith("norm.weight") else 0.0
        form = Blocks(own, stored, heads, config.head_dim if heads else 0, shift)
        found[name] = computed(stored.shape, dtype, stored.file, form)
    return found


def model_dtype(header: Header) -> str:
    """Return the dtype of a model in safetensors' spelling: that of its matrices if all are F32 or F16, else BF16."""
    kinds = Counter(stored.kind for stored in header.tensors.values() if len(stored.shape) > 1)
    return DTYPES.get(next(iter(kinds)), "BF16") if len(kinds) == 1 else "BF16"
