"""The memory plan: bytes a term, its formula beside it, from headers and settings alone.

With P_q weights in 4-bit linears, P_o others, P_l LoRA weights, T tokens a micro-batch, L layers, d hidden, f
intermediate and V vocabulary size, c bytes of the compute dtype:
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from onecard.config import LOGITS_CHUNK_BYTES, NESTED_BLOCKSIZE, TrainConfig
from onecard.hf.checkpoint import DTYPE_BITS, Checkpoint


@dataclass(frozen=True)
class Term:
    """One line of the bill."""

    name: str
    num_bytes: int
    formula: str


@dataclass(frozen=True)
class Plan:
    """The bill of a run."""

    terms: list[Term]

    @property
    def total_bytes(self) -> int:
        return sum(term.num_bytes for term in self.terms)


def plan_training(checkpoint: Checkpoint, config: TrainConfig, compute_dtype: torch.dtype) -> Plan:
    """What `train` will hold at its peak, process and runtime not counted."""
    model = meta_model(checkpoint)
    head = model.get_output_embeddings()
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    sizes = [module.weight.numel() for module in linears.values()]
    num_quantized = sum(sizes)
    width = compute_dtype.itemsize
    num_lora = sum(config.r * (m.in_features + m.out_features) for m in targets(linears, config))
    tokens = min(config.max_seq_length, longest_context(model.config)) * config.per_device_train_batch_size
    chunk = min(LOGITS_CHUNK_BYTES, 4 * tokens * model.config.get_text_config().vocab_size)
    return Plan(
        [
            Term("base, 4-bit codes", num_quantized // 2, "P_q / 2"),
            Term("base, scales", scale_bytes(sizes, config), scale_formula(config)),
            Term(
                "embeddings, norms, head",
                other_bytes(checkpoint, linears, width),
                "P_o x bytes of its dtype, at most c",
            ),
            Term("LoRA weights", 4 * num_lora, "4 P_l"),
            Term("LoRA gradients", 4 * num_lora, "4 P_l"),
            Term("AdamW states", 8 * num_lora, "8 P_l"),
            Term("dequantized weight", width * max(sizes, default=0), "c x the largest linear"),
            Term("activations", activation_bytes(model.config, tokens, width, config), activation_formula(config)),
            Term("logits chunk", 3 * chunk, "3 x min(32 MiB, 4 T V)"),
        ]
    )


def meta_model(checkpoint: Checkpoint) -> Any:
    """transformers' model without weights."""
    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def targets(linears: dict[str, torch.nn.Linear], config: TrainConfig) -> list[torch.nn.Linear]:
    """The linears that get an adapter."""
    if config.target_modules == "all-linear":
        return list(linears.values())
    names = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    return [m for path, m in linears.items() if any(path.removesuffix(".weight").endswith(name) for name in names)]


def longest_context(config: Any) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def scale_bytes(sizes: list[int], config: TrainConfig) -> int:
    blocks = [-(-size // config.blocksize) for size in sizes]
    if not config.double_quant:
        return 4 * sum(blocks)
    return sum(b + 4 * -(-b // NESTED_BLOCKSIZE) + 4 for b in blocks)


def scale_formula(config: TrainConfig) -> str:
    if not config.double_quant:
        return f"4 P_q / {config.blocksize}"
    return f"P_q / {config.blocksize} + 4 P_q / ({config.blocksize} x {NESTED_BLOCKSIZE})"


def other_bytes(checkpoint: Checkpoint, linears: dict[str, Any], width: int) -> int:
    total = 0
    for name, info in checkpoint.tensors.items():
        if name not in linears:
            bits = DTYPE_BITS[info.dtype]
            total += info.nbytes * min(bits, 8 * width) // bits
    return total


def activation_bytes(config: Any, tokens: int, width: int, settings: TrainConfig) -> int:
    """Saved for the backward: 16 d + 5 f values a token and layer (with recompute d, and one whole layer)."""
    text = config.get_text_config()
    d, f, layers = (
        text.hidden_size,
        getattr(text, "intermediate_size", 0) or 4 * text.hidden_size,
        text.num_hidden_layers,
    )
    a_layer = tokens * (16 * d + 5 * f) * width
    if settings.gradient_checkpointing:
        return layers * tokens * d * width + a_layer
    return layers * a_layer


def activation_formula(config: TrainConfig) -> str:
    return "T (L d + 16 d + 5 f) c" if config.gradient_checkpointing else "T L (16 d + 5 f) c"


def available_bytes(device: torch.device) -> int:
    """Memory that a run may still take: free on the GPU, or available to this process under its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
