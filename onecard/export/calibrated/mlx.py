"""Folders for MLX: 4-bit integers in groups of 64 inputs, each with a scale and a bias, as mlx-lm loads them.

    w = scale code + bias        code 0 ... 15, eight in a uint32, the first in the lowest four bits

A linear has `weight` (N, K / 8), `scales` and `biases` (N, K / 64) in the model's dtype. Scale and bias are the best
of weighted least squares over several candidates (export/gguf/scales.py), rounded before the codes are chosen.
mlx-lm's modules have the names of Hugging Face's checkpoints. Embedding and head stay in 16 bits, which it reads too.
Most of its families look for the rotary embedding at the top level of config.json, where transformers no longer
writes it, and take a default if it is not there: it is written there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.config import CalibrationConfig
from onecard.errors import UserError
from onecard.export.calibrated.storage import Storage
from onecard.export.folder import Shapes
from onecard.export.gguf.scales import affine_scales, reciprocal
from onecard.quant.grouped import LEVELS, pack_int32

GROUP = 64
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")  # whose logits in mlx-lm are the model's
ROPES = ("default", "linear", "llama3")


def model_fields(config: Any) -> tuple[dict[str, Any], list[str]]:
    """Return config.json's fields that mlx-lm reads of a model, and notes for the user.

    Args:
        config: transformers' config.

    Raises:
        UserError: a model that mlx-lm is not known to compute.
    """
    do, where = "merge it in 16 bits, and serve it with another tool", "config.json"
    if config.model_type not in FAMILIES:
        raise UserError(f"a model for mlx must be one of {', '.join(FAMILIES)}", config.model_type, do, where)
    rope = dict(config.rope_parameters)
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in ROPES or part != 1.0 or (kind != "default" and config.model_type not in ("llama", "mistral")):
        must = f"a rotary embedding for mlx must turn whole heads, its scaling be one of {', '.join(ROPES)}"
        raise UserError(must, f"{kind} of {config.model_type}, {part:.0%} of a head", do, where)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    fields = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if kind == "default" else {**scaling, "type": kind},
    }
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        return fields, [f"mlx-lm attends to the whole context, the model to its last {window:,} tokens"]
    return fields, []


@dataclass
class Affine:
    """A weight: codes uint8 (N, K), scales and biases (N, K / 64)."""

    codes_NK: Tensor
    scales_NG: Tensor
    biases_NG: Tensor


class MLX(Storage[Affine]):
    """4-bit integers in groups of 64."""

    title, block = "MLX", GROUP

    def nearest(self, W_NK: Tensor, config: CalibrationConfig, dtype: torch.dtype, peak: float = 0.0) -> Affine:
        x = W_NK.view(-1, GROUP).T.contiguous()  # groups last, as affine_scales adds them
        scale, least = (t.to(dtype) for t in affine_scales(x, torch.ones_like(x), LEVELS))
        codes = ((x + least.float()) * reciprocal(scale.float())).round_().clamp_(0, LEVELS)
        shape = (len(W_NK), -1)
        return Affine(codes.T.to(torch.uint8).reshape_as(W_NK), scale.view(shape), -least.view(shape))

    def tensors(self, weight: Affine) -> dict[str, Tensor]:
        N, K = weight.codes_NK.shape
        packed = pack_int32(weight.codes_NK.reshape(N, K // 8, 8))
        return {"weight": packed, "scales": weight.scales_NG, "biases": weight.biases_NG}

    def shapes(self, N: int, K: int, config: CalibrationConfig, dtype: str) -> Shapes:
        groups = (dtype, (N, K // GROUP))
        return {"weight": ("U32", (N, K // 8)), "scales": groups, "biases": groups}

    def config_fields(self, config: CalibrationConfig, linears: list[str], left_out: list[str]) -> dict[str, Any]:
        how = {"group_size": GROUP, "bits": 4, "mode": "affine"}
        return {"quantization": how, "quantization_config": how}
