"""A small gpt-oss whose experts are in MXFP4, laid out as its public checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_checkpoint


def random_mxfp4(*shape: int, exponents: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (..., K / 32, 16) and scales (..., K / 32) of a weight (..., K), with random codes and exponents."""
    generator = torch.Generator().manual_seed(seed)
    *before, K = shape
    blocks = torch.randint(0, 256, (*before, K // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(*exponents, (*before, K // 32), generator=generator, dtype=torch.uint8)


def make_mxfp4(folder: Path, wide: tuple[int, int] | None = None, **kwargs: Any) -> Path:
    """A checkpoint of random weights: experts in MXFP4, all else in bfloat16.

    Args:
        wide: number and intermediate size of its experts, if no model of them in 16 bits is to be made first.
    """
    make_checkpoint(folder, "gpt_oss", dtype=torch.bfloat16, **kwargs)
    config = json.loads((folder / "config.json").read_text())
    E, I = wide or (config["num_local_experts"], config["intermediate_size"])
    H, tensors = config["hidden_size"], load_file(folder / "model.safetensors")
    for seed, name in enumerate(sorted(tensors)):
        if name.endswith(("gate_up_proj", "down_proj")):
            del tensors[name]
            size = (E, 2 * I, H) if name.endswith("gate_up_proj") else (E, H, I)
            pair = random_mxfp4(*size, exponents=(121, 124), seed=seed)
            tensors |= {name + suffix: tensor for suffix, tensor in zip(("_blocks", "_scales"), pair)}
            tensors[f"{name}_bias"] = torch.randn(size[:2]).mul_(0.1).bfloat16()
        elif "router" in name:
            tensors[name] = torch.randn(E, *tensors[name].shape[1:]).mul_(0.2).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(folder, num_local_experts=E, intermediate_size=I)
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
