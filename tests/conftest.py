"""Small checkpoints written by the real libraries, in milliseconds."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose library looks at it then

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would children

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "how many mugs do you want?",
    "two blue mugs, please",
    "0123456789",
]
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "phi3": Phi3Config,
}
EXPERT_FAMILIES: dict[str, Any] = {
    "mixtral": partial(MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": partial(Qwen3MoeConfig, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32),
    "gpt_oss": partial(
        GptOssConfig, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, rope_parameters=PLAIN_ROPE
    ),
}


def make_tokenizer(template: str | None = CHATML, specials: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """A byte-level BPE tokenizer of some 350 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>", *specials]
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(named),
        special_tokens=named,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fields = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": template}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=["<|im_start|>", *specials],
        **{**fields, **kwargs},
    )


def make_checkpoint(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
    """A two-layer model of a family, with its tokenizer, as transformers saves them."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,
    }
    if family == "phi3":
        fields.pop("head_dim")
    config = {**FAMILIES, **EXPERT_FAMILIES}[family](**{**fields, **kwargs})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Chats of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"how many mugs do you want? {'the lazy dog ' * (i % 5)}{i}"},
                {"role": "assistant", "content": f"{i} blue mugs, please" + " fox" * (i % 3)},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", chat_rows(24))
