"""Experts in GPTQ's and AWQ's groups: each one's matrices, for the tokens that the router sends to it.

Rows for H are the expert's own. Fewer rows than a group has inputs leave the errors within a group undetermined, so
such an expert is rounded to the nearest levels, and named.
"""

from __future__ import annotations

from functools import partial

import torch

from onecard.config import CalibrationConfig
from onecard.export.calibrated.calibration import Layer
from onecard.export.calibrated.experts import RoutedExperts
from onecard.export.calibrated.storage import Calibrated
from onecard.export.merge.experts import Experts
from onecard.quant.grouped import Grouped

Found = list[tuple[str, Grouped]]


def quantize_experts(
    layer: Layer, stored: Experts, method: Calibrated, config: CalibrationConfig, dtype: torch.dtype
) -> tuple[Found, list[str]]:
    """Quantize a layer's experts. Its weights become those that a reader dequantizes.

    Args:
        stored: the checkpoint's experts, each matrix a tensor of its own.
        method: of the format.
        dtype: of the scales.

    Returns:
        The matrices by their tensor's name in the checkpoint; the experts that saw too few tokens.
    """
    matrices, few = [], []
    for path, routed in layer.routed.items():
        experts = RoutedExperts(layer.module.get_submodule(path), routed)
        up = "gate_up_proj" if experts.module.has_gate else "up_proj"
        ups, downs = (dict(stored.parts(f"{layer.name}.{path}.{key}")) for key in (up, "down_proj"))
        task = partial(quantize_expert, experts, up, len(ups[0]), method, config, dtype)
        for expert, (own, num_tokens) in enumerate(layer.layered.workers.map(task, range(len(ups)))):
            matrices += zip([*ups[expert], *downs[expert]], own)
            if num_tokens < config.group_size:
                few.append(f"{layer.name}.{path}, expert {expert} ({num_tokens} tokens)")
            *first, last = (W.dequantize() for W in own)
            experts.module.get_parameter(up)[expert].copy_(torch.cat(first))
            experts.module.down_proj[expert].copy_(last)
    layer.routed.clear()
    return matrices, few


def quantize_expert(
    experts: RoutedExperts,
    up: str,
    count: int,
    method: Calibrated,
    config: CalibrationConfig,
    dtype: torch.dtype,
    expert: int,
) -> tuple[list[Grouped], int]:
    """Quantize one expert's matrices. Return its number of tokens, too.

    Args:
        up: the weight before its activation, which is `count` matrices.
    """
    ups = list(experts.module.get_parameter(up)[expert].float().chunk(count))
    down, x_MK = experts.module.down_proj[expert].float(), experts.inputs(up, expert)
    if len(x_MK) < config.group_size:
        return [method.nearest(W, config, dtype) for W in (*ups, down)], len(x_MK)
    H_up, H_down = (x.T @ x for x in (x_MK, experts.inputs("down_proj", expert)))
    found = [method.quantize(W, H_up, config, dtype) for W in ups]
    return [*found, method.quantize(down, H_down, config, dtype)], len(x_MK)
