"""The families of models that we write as GGUF: what llama.cpp's graph of each one computes.

Each is read back by transformers or by llama.cpp in the tests, and its logits are compared with those of the model
(tests/export/gguf). A family that is not here is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
from gguf import MODEL_ARCH as ARCH

SILU, GELU = ("silu",), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")
ROPES = ("default", "linear", "yarn", "llama3")
KEYS, LLM = gguf.Keys.Attention, gguf.Keys.LLM


@dataclass(frozen=True)
class Family:
    """A family of transformers in llama.cpp's terms.

    Attributes:
        activations: of the MLP.
        ropes: kinds of rotary scaling.
        turns_heads: whether the rows of queries and keys are reordered: its rotary embedding turns neighbours, that of
            transformers halves.
        has_means: whether its norms subtract the mean.
        needs: settings that the graph cannot have otherwise, with the values that it has.
        numbers: the keys of numbers that only some families have, by the config's setting.
        ignores_window: whether the graph attends to the whole context where the model has a window.
        interleaves: whether a stack of experts has the rows of gates and ups in turn, not one after the other.
    """

    arch: ARCH
    activations: tuple[str, ...] = SILU
    ropes: tuple[str, ...] = ROPES
    turns_heads: bool = False
    has_means: bool = False
    needs: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    ignores_window: bool = False
    interleaves: bool = False


GRANITE = {
    "attention_multiplier": KEYS.SCALE,
    "embedding_multiplier": LLM.EMBEDDING_SCALE,
    "residual_multiplier": LLM.RESIDUAL_SCALE,
    "logits_scaling": LLM.LOGIT_SCALE,
}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
EXPERTS = {"num_experts": LLM.EXPERT_COUNT, "num_experts_per_tok": LLM.EXPERT_USED_COUNT}
LOCAL_EXPERTS = {"num_local_experts": LLM.EXPERT_COUNT, "num_experts_per_tok": LLM.EXPERT_USED_COUNT}
FAMILIES = {
    "llama": Family(ARCH.LLAMA, turns_heads=True),
    "mistral": Family(ARCH.LLAMA, turns_heads=True, ignores_window=True),
    "mixtral": Family(ARCH.LLAMA, turns_heads=True, ignores_window=True, numbers=LOCAL_EXPERTS),
    "qwen2": Family(ARCH.QWEN2, ignores_window=True),
    "qwen3": Family(ARCH.QWEN3, ignores_window=True),
    "qwen3_moe": Family(
        ARCH.QWEN3MOE,
        ignores_window=True,
        needs={**NO_BIAS, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        numbers={**EXPERTS, "moe_intermediate_size": LLM.EXPERT_FEED_FORWARD_LENGTH},
    ),
    "olmoe": Family(ARCH.OLMOE, needs={**NO_BIAS, "norm_topk_prob": False, "clip_qkv": None}, numbers=EXPERTS),
    "gpt_oss": Family(
        ARCH.GPT_OSS,
        ropes=("default", "yarn"),
        needs={"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        numbers={**LOCAL_EXPERTS, "intermediate_size": LLM.EXPERT_FEED_FORWARD_LENGTH},
        interleaves=True,
    ),
    "granite": Family(ARCH.GRANITE, turns_heads=True, needs=NO_BIAS, numbers=GRANITE),
    "granitemoe": Family(ARCH.GRANITE_MOE, turns_heads=True, needs=NO_BIAS, numbers={**GRANITE, **LOCAL_EXPERTS}),
    "gemma": Family(ARCH.GEMMA, activations=GELU[:1], needs={"tie_word_embeddings": True}),
    "gemma2": Family(ARCH.GEMMA2, activations=GELU[:1], needs={"tie_word_embeddings": True}),
    "gemma3_text": Family(ARCH.GEMMA3, activations=GELU[:1]),
    "phi3": Family(ARCH.PHI3, ropes=("default", "longrope")),
    "olmo2": Family(ARCH.OLMO2, needs=NO_BIAS),
    "smollm3": Family(ARCH.SMOLLM3, turns_heads=True, needs={**NO_BIAS, "use_sliding_window": False}),
    "glm4": Family(ARCH.GLM4),
    "ernie4_5": Family(ARCH.ERNIE4_5, needs={"use_bias": False}),
    "exaone4": Family(ARCH.EXAONE4),
    "cohere2": Family(
        ARCH.COHERE2, has_means=True, ropes=("default",), needs=NO_BIAS, numbers={"logit_scale": LLM.LOGIT_SCALE}
    ),
    "starcoder2": Family(ARCH.STARCODER2, GELU, has_means=True, ignores_window=True, needs={"use_bias": True}),
    "gpt_neox": Family(
        ARCH.GPTNEOX,
        GELU,
        has_means=True,
        needs={"attention_bias": True},
        numbers={"use_parallel_residual": LLM.USE_PARALLEL_RESIDUAL},
    ),
}
GEMMAS = ("gemma", "gemma2", "gemma3_text")
NO_ROPE_PERIOD = {"smollm3": 4}  # of so many layers, the last one has no rotary embedding
WINDOW_PERIOD = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "exaone4": 4}  # the last attends to all
WINDOWED_EXAONE4 = 64  # layers of the only exaone4 to which llama.cpp gives a window
LAYERS_27B = {"gemma2": 46, "gemma3_text": 62}  # here llama.cpp scales scores by hidden size / heads
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
