"""Recomputation of decoder layers' activations in the backward (gradient checkpointing)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.hf.fused import FusedGatedMLP
from onecard.kernels.dequantize import saved_weights
from onecard.memory.inputs import MemoryStrategy
from onecard.paging.activations import Offload


class Recomputed:
    """A layer's checkpoint function. It saves the random states for the recomputation only if the layer draws random
    numbers, as dropout does. The first forward tells.

    Args:
        inner: torch.utils.checkpoint.checkpoint, or a function with its arguments.
    """

    def __init__(self, inner: Callable[..., Any]):
        self.inner = inner
        self.is_random: bool | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.is_random is not None or not torch.is_grad_enabled():
            return self.inner(function, *args, preserve_rng_state=self.is_random is not False)
        before = random_states()
        result = self.inner(function, *args, preserve_rng_state=True)
        self.is_random = any(not torch.equal(a, b) for a, b in zip(before, random_states()))
        return result


def random_states() -> list[torch.Tensor]:
    """Return the states of the CPU's generator and of the current GPU's. They are on the host."""
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])


def recompute_layers(base: PreTrainedModel, strategy: MemoryStrategy, offload: Offload | None = None) -> None:
    """Recompute the activations of the strategy's layers in the backward; the others keep theirs.

    The inputs of its first num_offloaded layers are offloaded until then. With keep_dequantized_weights, the weights
    that a layer dequantizes for the recomputation stay for its backward. With mlp_chunk, gated MLPs compute that many
    tokens at a time: sums over tokens, as a LoRA matrix's gradient, are then rounded in another order.
    """
    mlps = [module for module in base.modules() if isinstance(module, FusedGatedMLP)]
    for mlp in mlps:
        mlp.chunk = strategy.mlp_chunk
    if strategy.num_recomputed == 0:
        return base.gradient_checkpointing_disable()
    if strategy.mlp_chunk is not None and len(mlps) < strategy.num_recomputed:
        count = f"{strategy.num_recomputed - len(mlps)} of {strategy.num_recomputed} layers"
        warnings.warn(f"a step will take more memory than planned: the MLPs of {count} are not in chunks", stacklevel=2)
    kept: dict[str, Any] = {"context_fn": saved_weights} if strategy.keep_dequantized_weights else {}
    base.gradient_checkpointing_enable({"use_reentrant": False, **kept})
    base.enable_input_require_grads()
    layers: list[Any] = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers[: strategy.num_recomputed]):
        inner = partial(checkpoint, use_reentrant=False, **kept)
        if number < strategy.num_offloaded:
            assert offload is not None
            inner = partial(offload.checkpoint, **kept)
        layer._gradient_checkpointing_func = Recomputed(inner)
    for layer in layers[strategy.num_recomputed :]:
        layer.gradient_checkpointing = False
