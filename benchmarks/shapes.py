"""Checkpoints of known shapes with random weights, saved by transformers and reused by later calls."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from onecard.hf.load import load_tokenizer

CACHE = Path(__file__).parent / ".checkpoints"
TOKENIZER = Path(__file__).parents[1] / "onecard" / "demo" / "base"
LLAMAS: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "demo": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 896,
        "tie_word_embeddings": True,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1.1b": {**LLAMAS["1b"], "tie_word_embeddings": False},
    "8b-4": {**LLAMAS["8b"], "num_hidden_layers": 4, "tie_word_embeddings": False},  # four of its 32 layers
}

EXPERT_SHAPES: dict[str, dict[str, Any]] = {
    name: {
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": hidden // 2,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    for name, hidden, experts, layers in (
        ("moe-tiny", 256, 16, 2),
        ("moe-0.1b", 512, 32, 6),
        ("moe-1.4b", 1024, 64, 12),
    )
}


def make_checkpoint(shape: str) -> Path:
    """Return the folder of a bfloat16 checkpoint in shards of at most 500 MB, with the demo's tokenizer."""
    folder = CACHE / shape
    if not (folder / "tokenizer.json").is_file():
        torch.manual_seed(0)
        tokenizer = load_tokenizer(str(TOKENIZER))
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        fields = {"model_type": "llama", **{**SHAPES, **EXPERT_SHAPES}[shape]}
        config = AutoConfig.for_model(max_position_embeddings=2048, **special, **fields)
        config.dtype = torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="500MB")
        tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=[*SHAPES, *EXPERT_SHAPES])
    print(make_checkpoint(parser.parse_args().shape))
