"""Experts' stacked weights as the plan counts them: linears of many matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.quantizers_utils import should_convert_module

from onecard.nn.experts import STACKS, are_stacked_experts, turns
from onecard.nn.linears import beside_text
from onecard.nn.slabs import slab_bytes
from onecard.quant.mxfp4 import BLOCKSIZE


@dataclass(frozen=True)
class Stack:
    """A stacked weight.

    Attributes:
        weight: (E, N, K), or (E, K, N) if `is_transposed`.
        in_features, out_features: sums over all its experts, so that LoRA of rank r has r (in + out) weights, the same
            as for a linear.
    """

    weight: Tensor
    is_transposed: bool

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.num_experts * self.weight.shape[1 if self.is_transposed else 2]

    @property
    def out_features(self) -> int:
        return self.num_experts * self.weight.shape[2 if self.is_transposed else 1]

    def slab_bytes(self, quant_type: str, blocksize: int, itemsize: int) -> int:
        """Return the bytes of its largest slab (nn/slabs.py)."""
        E, *matrix = self.weight.shape
        stored = torch.Size([E, *(reversed(matrix) if turns(self.is_transposed, quant_type) else matrix)])
        return slab_bytes(stored, BLOCKSIZE if quant_type == "mxfp4" else blocksize, itemsize)


def stacks_of(modules: Any) -> dict[str, Stack]:
    """Return the stacked weights to quantize of transformers' model on the meta device, by name."""
    named, beside = modules.named_modules(), beside_text(modules)
    found = [(path, m) for path, m in named if are_stacked_experts(m) and should_convert_module(path, beside)]
    return {
        f"{path}.{name}": Stack(parameter, module.is_transposed)
        for path, module in found
        for name, parameter in module.named_parameters(recurse=False)
        if name in STACKS
    }
