"""The config of a GGUF file's model: its metadata in transformers' terms, for the families that are known to be right.

transformers' own tables leave out what they do not know, such as rotary scaling, biases and windows, and the model then
computes something else without an error. Here each key of the model must be used or known to change nothing; a file
with another key is refused. `export/gguf/architecture.py` is the inverse.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import CONFIG_MAPPING, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from onecard.documents import brief
from onecard.errors import UserError
from onecard.hf.gguf.header import Header, Stored, damaged

FAMILIES = {
    "llama": "llama",  # also Mistral's, which computes the same
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}  # general.architecture: model_type
GEMMAS = ("gemma", "gemma2", "gemma3")
WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}  # of so many layers, the last one attends to all positions
LAYERS_27B = {"gemma2": 46, "gemma3": 62}  # here scores are scaled by hidden size / heads
NO_EFFECT: dict[str, tuple[Any, ...]] = {  # keys with the values that change nothing
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "rope.scaling.finetuned": (True, False),
    "rope.scale_linear": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "attention.sliding_window": (0,),
}
DO = "use the original checkpoint in safetensors"
FLOAT32 = 2**-20  # relative; factors that another program computed in float32


class Keys:
    """The metadata of an architecture, from which each key is taken once."""

    def __init__(self, header: Header):
        self.header, self.prefix = header, f"{header.architecture}."
        start = len(self.prefix)
        self.left = {key[start:]: value for key, value in header.metadata.items() if key.startswith(self.prefix)}

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """Return a key's value, or the default if there is no key. Raises UserError for a value of another kind."""
        value = self.left.pop(name, default)
        if value is default:
            return value
        kinds = {float: (int, float), int: (int,), str: (str,), list: (list,)}[kind]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise damaged(self.header.file, f"{self.prefix}{name} {brief(value)}")
        if isinstance(value, float):
            return rounded(value)
        return value

    def need(self, name: str, kind: type) -> Any:
        """Return a key's value. Raises UserError if it is not there or, as a number, not above 0."""
        value = self.take(name, kind)
        if value is None or (kind in (int, float) and not 0 < value < math.inf):
            raise damaged(self.header.file, f"{self.prefix}{name} {brief(value)}")
        return value

    def finish(self) -> None:
        """Raise UserError for a key that was not taken and may change what the model computes."""
        for name, value in self.left.items():
            if value not in NO_EFFECT.get(name, ()):
                must = "every number of a GGUF model must be one that onecard knows"
                raise UserError(must, f"{self.prefix}{name} = {brief(value)}", DO, str(self.header.file))


def rounded(value: float) -> float:
    """Return the shortest decimal number that is the same in float32: the file holds 1e-5 as 9.99999975e-06."""
    if not math.isfinite(value):
        return value
    return next(float(text) for n in range(1, 10) if torch.tensor(float(text := f"{value:.{n}g}")).item() == value)


def config_of(header: Header) -> Any:
    """Return transformers' config of a file's model, without its dtype.

    Raises:
        UserError: another family, a key that is missing, not known, or does not fit the tensors.
    """
    architecture = header.metadata.get("general.architecture")
    if architecture not in FAMILIES:
        must = f"a GGUF file's model must be one of {', '.join(FAMILIES)}"
        raise UserError(must, brief(architecture), DO, f"{header.file}: general.architecture")
    if header.metadata.get("general.type", "model") != "model":
        found = brief(header.metadata["general.type"])
        raise UserError("the file must hold a model", found, "pass the model's own file", str(header.file))
    keys = Keys(header)
    heads, hidden = keys.need("attention.head_count", int), keys.need("embedding_length", int)
    head_dim = keys.take("attention.key_length", int) or hidden // heads
    fields = {
        "num_hidden_layers": keys.need("block_count", int),
        "max_position_embeddings": keys.need("context_length", int),
        "hidden_size": hidden,
        "intermediate_size": keys.need("feed_forward_length", int),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.take("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon", float),
        "vocab_size": vocab_size(header, keys),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    if keys.take("attention.value_length", int, head_dim) != head_dim:
        raise damaged(header.file, "values of another length than keys")
    if keys.take("rope.dimension_count", int, head_dim) != head_dim:
        raise UserError("a rotary embedding must turn whole heads", "a part of them", DO, str(header.file))
    rope = rope_parameters(header, keys, head_dim)
    if architecture == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    elif architecture == "phi3":
        del fields["head_dim"]  # it follows from the others
        original = keys.take("rope.scaling.original_context_length", int, fields["max_position_embeddings"])
        fields["original_max_position_embeddings"] = original
        fields["sliding_window"] = keys.take("attention.sliding_window", int) or None
    elif architecture in WINDOW_PERIOD:
        fields |= gemma_fields(architecture, fields, keys)
    if architecture == "gemma3":
        local = keys.take("rope.freq_base_swa", float, 10_000.0)
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    keys.finish()
    kind, names = FAMILIES[architecture], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    fields |= {"rope_parameters": rope, "architectures": [names[kind]], **token_ids(header, fields["vocab_size"])}
    return CONFIG_MAPPING[kind](**fields)


def vocab_size(header: Header, keys: Keys) -> int:
    """Return the rows of the embedding. Raises UserError unless the metadata agrees."""
    stored = header.tensors.get("token_embd.weight")
    if stored is None or len(stored.shape) != 2:
        raise damaged(header.file, "no matrix token_embd.weight")
    stated = keys.take("vocab_size", int, stored.shape[0])
    if stated != stored.shape[0]:
        raise damaged(header.file, f"{stored.shape[0]:,} rows of token_embd.weight for {stated:,} tokens")
    return stored.shape[0]


def token_ids(header: Header, size: int) -> dict[str, int]:
    """Return the ids of the named tokens. One outside the vocabulary is refused."""
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < size):
            raise damaged(header.file, f"tokenizer.ggml.{key}_token_id {brief(value)} of {size:,} tokens")
        found[f"{name}_token_id"] = value
    return found


def gemma_fields(architecture: str, fields: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """Return the fields of models whose layers alternate between a window and all positions."""
    layers, period = fields["num_hidden_layers"], WINDOW_PERIOD[architecture]
    windows = keys.take("attention.sliding_window_pattern", list)
    if windows is None:
        windows = [i % period < period - 1 for i in range(layers)]
    large = layers == LAYERS_27B[architecture]
    head_dim = fields["hidden_size"] // fields["num_attention_heads"] if large else fields["head_dim"]
    return {
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "sliding_window": keys.need("attention.sliding_window", int),
        "query_pre_attn_scalar": head_dim,
        "attn_logit_softcapping": keys.take("attn_logit_softcapping", float),
        "final_logit_softcapping": keys.take("final_logit_softcapping", float),
    }


def rope_parameters(header: Header, keys: Keys, head_dim: int) -> dict[str, Any]:
    """Return the rotary embedding's base and scaling. Raises UserError for a scaling that is not known."""
    theta, kind = keys.take("rope.freq_base", float, 10_000.0), keys.take("rope.scaling.type", str, "none")
    if "rope_freqs.weight" in header.tensors and kind == "none":
        return llama3_rope(header, theta, head_dim)
    rope: dict[str, Any] = {"rope_type": "default" if kind == "none" else kind, "rope_theta": theta}
    if kind in ("linear", "yarn"):
        rope["factor"] = keys.need("rope.scaling.factor", float)
    if kind == "yarn":
        rope["original_max_position_embeddings"] = keys.need("rope.scaling.original_context_length", int)
        for name, key in (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
            value = keys.take(f"rope.scaling.yarn_{key}", float)
            rope |= {} if value is None else {name: value}
    if kind not in ("none", "linear", "yarn") or "rope_factors_long.weight" in header.tensors:
        must = "a rotary embedding's scaling must be none, linear, yarn or llama 3's"
        raise UserError(must, kind if kind != "none" else "longrope", DO, f"{header.file}: rope.scaling.type")
    return rope


def llama3_rope(header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """Return llama 3's parameters that give the file's factors, by which it divides the frequencies.

    The file has the factors only. The parameters are found by trying: low 1, high 4, and an original context that is
    a power of two, as all llama 3 models have.
    """
    found = read_floats(header.tensors["rope_freqs.weight"])
    config: Any = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim)
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    for original in (1 << power for power in range(4, 21)):
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": rounded(float(f"{found.max().item():.4g}")),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        config.rope_parameters = rope
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if found.shape == plain.shape and ((plain / scaled) / found - 1).abs().max() <= FLOAT32 * 8:
            return rope
    raise UserError("rope_freqs must be llama 3's factors", "others", DO, f"{header.file}: rope_freqs.weight")


def read_floats(stored: Stored) -> torch.Tensor:
    """Read a tensor of F32. Raises UserError for another type."""
    if stored.kind != "F32":
        raise damaged(stored.file, f"rotary factors in {stored.kind}")
    with stored.file.open("rb") as stream:
        stream.seek(stored.begin)
        return torch.frombuffer(bytearray(stream.read(stored.nbytes)), dtype=torch.float32)
