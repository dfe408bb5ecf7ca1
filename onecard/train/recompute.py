"""Recomputation of decoder layers' activations in the backward (gradient checkpointing)."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.kernels.dequantize import saved_weights
from onecard.paging.activations import Offload


def recompute_layers(
    base: PreTrainedModel,
    number: int,
    offload: Offload | None = None,
    num_offloaded: int = 0,
    keep_dequantized_weights: bool = False,
) -> None:
    """Recompute the activations of the first `number` decoder layers in the backward; the others keep theirs.

    The inputs of the first `num_offloaded` layers are offloaded until then. With keep_dequantized_weights, the weights
    that a layer dequantizes for the recomputation stay for its backward.
    """
    if number == 0:
        return base.gradient_checkpointing_disable()
    kept: dict[str, Any] = {"context_fn": saved_weights} if keep_dequantized_weights else {}
    base.gradient_checkpointing_enable({"use_reentrant": False, **kept})
    base.enable_input_require_grads()
    layers: list[Any] = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[:num_offloaded]:
        assert offload is not None
        layer._gradient_checkpointing_func = partial(offload.checkpoint, **kept)
    for layer in layers[number:]:
        layer.gradient_checkpointing = False
