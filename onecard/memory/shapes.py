"""Shapes of public models, as fields of their config.json. A plan for them needs neither files nor a network."""

from __future__ import annotations

from typing import Any


def dense(
    kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int,
    tied: bool = False, head_dim: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "head_dim": head_dim or hidden // heads,
    }


def sparse(
    kind: str, experts: int, per_token: int, width: int, *shape: Any, head_dim: int
) -> dict[str, Any]:  # fmt: skip
    """Same as `dense`, with experts of `width` intermediate features."""
    number = "num_experts" if kind == "qwen3_moe" else "num_local_experts"
    size = {"moe_intermediate_size": width} if kind == "qwen3_moe" else {}
    return {**dense(kind, *shape, head_dim=head_dim), number: experts, "num_experts_per_tok": per_token, **size}


MXFP4 = ("gpt-oss-20b", "gpt-oss-120b")  # models whose experts are released in MXFP4

KNOWN = {
    "llama-33b": dense("llama", 6656, 17920, 60, 52, 52, 32000, 2048),
    "llama-65b": dense("llama", 8192, 22016, 80, 64, 64, 32000, 2048),
    "llama-2-7b": dense("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": dense("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "llama-2-70b": dense("llama", 8192, 28672, 80, 64, 8, 32000, 4096),
    "llama-3-8b": dense("llama", 4096, 14336, 32, 32, 8, 128256, 8192),
    "llama-3-70b": dense("llama", 8192, 28672, 80, 64, 8, 128256, 8192),
    "llama-3.1-8b": dense("llama", 4096, 14336, 32, 32, 8, 128256, 131072),
    "llama-3.1-70b": dense("llama", 8192, 28672, 80, 64, 8, 128256, 131072),
    "llama-3.1-405b": dense("llama", 16384, 53248, 126, 128, 8, 128256, 131072),
    "llama-3.2-1b": dense("llama", 2048, 8192, 16, 32, 8, 128256, 131072, True),
    "llama-3.2-3b": dense("llama", 3072, 8192, 28, 24, 8, 128256, 131072, True),
    "mistral-7b": dense("mistral", 4096, 14336, 32, 32, 8, 32000, 32768),
    "mistral-large-123b": dense("mistral", 12288, 28672, 88, 96, 8, 32768, 131072),
    "qwen2.5-0.5b": dense("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, True),
    "qwen2.5-1.5b": dense("qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, True),
    "qwen2.5-3b": dense("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, True),
    "qwen2.5-7b": dense("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072),
    "qwen2.5-14b": dense("qwen2", 5120, 13824, 48, 40, 8, 152064, 131072),
    "qwen2.5-32b": dense("qwen2", 5120, 27648, 64, 40, 8, 152064, 131072),
    "qwen2.5-72b": dense("qwen2", 8192, 29568, 80, 64, 8, 152064, 131072),
    "qwen3-0.6b": dense("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, True, 128),
    "qwen3-1.7b": dense("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, True, 128),
    "qwen3-4b": dense("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, True, 128),
    "qwen3-8b": dense("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, False, 128),
    "qwen3-14b": dense("qwen3", 5120, 17408, 40, 40, 8, 151936, 40960, False, 128),
    "qwen3-32b": dense("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960, False, 128),
    "mixtral-8x7b": sparse("mixtral", 8, 2, 14336, 4096, 14336, 32, 32, 8, 32000, 32768, head_dim=128),
    "qwen3-30b-a3b": sparse("qwen3_moe", 128, 8, 768, 2048, 6144, 48, 32, 4, 151936, 40960, head_dim=128),
    "qwen3-235b-a22b": sparse("qwen3_moe", 128, 8, 1536, 4096, 12288, 94, 64, 4, 151936, 40960, head_dim=128),
    "gpt-oss-20b": sparse("gpt_oss", 32, 4, 2880, 2880, 2880, 24, 64, 8, 201088, 131072, head_dim=64),
    "gpt-oss-120b": sparse("gpt_oss", 128, 4, 2880, 2880, 2880, 36, 64, 8, 201088, 131072, head_dim=64),
}
