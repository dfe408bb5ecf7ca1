"""llama.cpp's names for a model's hyperparameters and tensors, for the families that it has a graph for.

The keys and the changes to tensors follow llama.cpp's converter: llama's query and key rows in the order of its rotary
embedding (neighbours instead of halves), gemma's norms as 1 + weight, llama 3's rotary scaling as a tensor of factors,
the experts of a layer as one tensor for each of gate, up and down. What the families differ in is in families.py. A
model with an operation that llama.cpp's graph of its family does not compute is an error.
"""

from __future__ import annotations

import math
import re
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from onecard.errors import UserError
from onecard.export.gguf.families import (
    EPSILONS,
    FAMILIES,
    GEMMAS,
    LAYERS_27B,
    NO_ROPE_PERIOD,
    WINDOW_PERIOD,
    WINDOWED_EXAONE4,
)

PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}  # of a stack of experts
TEXT_PART = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?")  # before a tensor's name in a multimodal model
DO = "serve the merged checkpoint with vLLM or transformers instead"


class Architecture:
    """A family of models in llama.cpp's terms.

    Attributes:
        config: transformers' config, with all its defaults; of the text part, if `is_part`.
        is_tied: whether the head is the embedding.
        head_dim: size of a query, key or value of one head.
        notes: what llama.cpp computes differently, for the user.
    """

    def __init__(self, fields: dict[str, Any]):
        """Raise UserError for a model that llama.cpp's graph is not known to compute.

        Args:
            fields: config.json.
        """
        whole = fields["model_type"]
        self.is_part = "text_config" in fields and whole in CONFIG_MAPPING
        read: Any = CONFIG_MAPPING[whole].from_dict(dict(fields)) if self.is_part or whole in FAMILIES else None
        config: Any = None if read is None else read.get_text_config()
        self.config = config
        self.family = whole if config is None else config.model_type
        if config is None or self.family not in FAMILIES:
            known, found = ", ".join(FAMILIES), f"{whole}, whose text part is {self.family}" if self.is_part else whole
            raise UserError(f"the model must be one of {known}", found, DO, "config.json: model_type")
        assert read is not None
        self.is_tied = read.tie_word_embeddings
        self.facts = FAMILIES[self.family]
        self.arch = self.facts.arch
        self.name = gguf.MODEL_ARCH_NAMES[self.arch]
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.names = gguf.get_tensor_name_map(self.arch, config.num_hidden_layers)
        ropes = config.rope_parameters
        self.rope = ropes.get("full_attention", ropes)
        self.rope_dims = int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.check()
        window = getattr(config, "sliding_window", None)
        counts = (getattr(config, key, 0) for key in ("num_local_experts", "num_experts"))
        self.num_experts = next((count for count in counts if count), 0)
        self.notes = [f"the file has the text part of {whole}; images need llama.cpp's own mmproj file"] * self.is_part
        if self.rope.get("rope_type") == "yarn" and self.rope.get("truncate") is False:
            self.notes.append("llama.cpp rounds the bounds between which YaRN scales, the model does not")
        if self.facts.ignores_window and window and window < config.max_position_embeddings:
            self.notes.append(f"llama.cpp attends to the whole context, the model to its last {window:,} tokens")

    def check(self) -> None:
        """Raise UserError if the config needs an operation that llama.cpp's graph does not have."""
        config, gemma = self.config, self.family in GEMMAS
        activation = (getattr(config, "hidden_activation", None) or config.hidden_act) if gemma else config.hidden_act
        require(activation in self.facts.activations, "hidden_act", activation)
        kind = self.rope.get("rope_type", "default")
        require(kind in self.facts.ropes, "rope_type", kind)
        if self.is_part and self.family == "gemma3_text":  # the whole model does not cap its logits
            require(not config.final_logit_softcapping, "final_logit_softcapping", config.final_logit_softcapping)
        for key, value in self.facts.needs.items():
            found = self.is_tied if key == "tie_word_embeddings" else getattr(config, key, None)
            require(found == value or (not found and not value), key, found)
        period = NO_ROPE_PERIOD.get(self.family)
        if period:
            found = config.no_rope_layers
            require(found == [int(i % period < period - 1) for i in range(len(found))], "no_rope_layers", found)
        if self.family == "olmoe":  # one norm over all heads
            require(self.num_kv_heads == self.num_heads, "num_key_value_heads", self.num_kv_heads)
        if self.family == "exaone4":
            windowed = config.num_hidden_layers == WINDOWED_EXAONE4
            require(bool(config.sliding_window) == windowed, "sliding_window", config.sliding_window)
        if self.family in ("cohere2", "gpt_oss") or (self.family == "exaone4" and config.sliding_window):
            require(self.windows() == self.usual_windows(), "layer_types", config.layer_types)
        if self.family in LAYERS_27B:
            scale, heads = config.query_pre_attn_scalar, config.num_attention_heads
            large = config.num_hidden_layers == LAYERS_27B[self.family]
            require(scale == (config.hidden_size // heads if large else self.head_dim), "query_pre_attn_scalar", scale)

    def windows(self) -> list[bool]:
        """Return which layers attend to a window."""
        return [kind == "sliding_attention" for kind in self.config.layer_types]

    def usual_windows(self) -> list[bool]:
        """Return llama.cpp's pattern of them."""
        period = WINDOW_PERIOD[self.family]
        return [i % period < period - 1 for i in range(self.config.num_hidden_layers)]

    def expert_names(self, stack: str) -> tuple[str, ...]:
        """Return the names in the file of a stack of experts' matrices: of its gates and ups, or its downs."""
        layer = re.search(r"\.layers\.(\d+)\.", stack)
        assert layer is not None, stack
        return tuple(f"blk.{layer[1]}.ffn_{part}_exps.weight" for part in PARTS[stack.rpartition(".")[2]])

    def expert_rows(self, number: int, count: int, num_rows: int) -> slice:
        """Return the rows of a stack's matrices that are those of its tensor `number` of `count`."""
        if self.facts.interleaves:
            return slice(number, None, count)
        return slice(number * num_rows // count, (number + 1) * num_rows // count)

    def tensor_name(self, name: str) -> str | None:
        """Return a tensor's name in the file; None for a tensor that is not written."""
        if self.is_part:
            name, count = TEXT_PART.subn("", name)
            if not count and name != "lm_head.weight":
                return None
            name = name if name.startswith("lm_head.") else f"model.{name}"
        if name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and self.is_tied):
            return None
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"a tensor of {self.family} must have a place in GGUF", name, DO, "checkpoint")
        return found if found.endswith((".weight", ".bias")) else f"{found}.weight"

    def row_order(self, name: str) -> Tensor | None:
        """Return the order of a tensor's rows in the file; None if it is the checkpoint's order."""
        heads = {"q_proj": self.num_heads, "k_proj": self.num_kv_heads}
        module = name.split(".")[-2]
        if module == "query_key_value":  # gpt_neox: those of each head together; llama.cpp: all queries first
            rows = torch.arange(3 * self.num_heads * self.head_dim)
            return rows.view(self.num_heads, 3, self.head_dim).transpose(0, 1).reshape(-1)
        if not self.facts.turns_heads or module not in heads:
            return None
        rows = torch.arange(heads[module] * self.head_dim)
        return rows.view(heads[module], 2, self.head_dim // 2).transpose(1, 2).reshape(-1)

    def shift(self, name: str) -> float:
        """Return what to add to a tensor: gemma multiplies by 1 + a norm's weight, llama.cpp by the stored value."""
        return 1.0 if self.family in GEMMAS and name.endswith("norm.weight") else 0.0

    def add_metadata(self, writer: gguf.GGUFWriter, vocab_size: int) -> None:
        """Write the model's hyperparameters."""
        config, windowed = self.config, self.family in WINDOW_PERIOD or self.family == "phi3"
        windowed = windowed and (config.sliding_window is not None or self.family != "exaone4")
        epsilon = next(getattr(config, key) for key in EPSILONS if hasattr(config, key))
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.num_heads)
        writer.add_head_count_kv(self.num_kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        (writer.add_layer_norm_eps if self.facts.has_means else writer.add_layer_norm_rms_eps)(epsilon)
        for key, place in self.facts.numbers.items():
            value, place = getattr(config, key), place.format(arch=self.name)
            add = {bool: writer.add_bool, int: writer.add_uint32}.get(type(value), writer.add_float32)
            add(place, value)
        writer.add_vocab_size(vocab_size)
        self.add_rope(writer)
        if windowed:
            writer.add_sliding_window(config.sliding_window or 0)
        if self.family in LAYERS_27B:
            self.add_gemma(writer)

    def add_gemma(self, writer: gguf.GGUFWriter) -> None:
        """Write the caps of logits, and which layers attend to a window if they differ from llama.cpp's pattern."""
        config = self.config
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if self.windows() != self.usual_windows():
            writer.add_sliding_window_pattern(self.windows())
        local = config.rope_parameters.get("sliding_attention")
        if local:
            writer.add_rope_freq_base_swa(local["rope_theta"])

    def add_rope(self, writer: gguf.GGUFWriter) -> None:
        """Write the rotary embedding's base and scaling."""
        rope = self.rope
        writer.add_rope_dimension_count(self.rope_dims)
        writer.add_rope_freq_base(rope["rope_theta"])
        kind = rope.get("rope_type", "default")
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or self.config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(original)
            more = {
                "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
                "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
                "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
            }
            for key, add in more.items():
                if rope.get(key) is not None:
                    add(rope[key])
        if self.family == "phi3":
            writer.add_rope_scaling_orig_ctx_len(self.config.original_max_position_embeddings)
        if kind == "longrope":
            writer.add_rope_scaling_attn_factors(self.longrope_factor())

    def longrope_factor(self) -> float:
        """Return longrope's factor of queries and keys (arXiv 2402.13753): sqrt(1 + log s / log L)."""
        original = self.config.original_max_position_embeddings
        scale = self.config.max_position_embeddings / original
        return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0

    def rope_factors(self) -> dict[str, Tensor]:
        """Return the tensors by which llama.cpp divides the rotary frequencies, float32 (rope_dims / 2,)."""
        kind, rope = self.rope.get("rope_type", "default"), self.rope
        if kind == "longrope":
            return {
                f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
                for which in ("long", "short")
            }
        if kind != "llama3":
            return {}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, self.rope_dims, 2, dtype=torch.float32) / self.rope_dims)
        return {"rope_freqs.weight": plain / scaled}


def require(holds: bool, key: str, found: Any) -> None:
    if not holds:
        raise UserError(f"{key} must be what llama.cpp computes for this family", str(found), DO, f"config.json: {key}")
