"""RMSNorm and gated MLP on one operator each, put in place of a model's own modules where they compute the same.

A model says by its attributes that it has such a module and by its numbers that it means the same: `fuse` runs both
on random input once for each class and takes the fused one only if they agree to a few roundings of the dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onecard.kernels import rows

AGREE_EPS = 4  # roundings of the compute dtype, relative in the Euclidean norm


class FusedRMSNorm(nn.Module):
    """y = weight * (x / sqrt(mean(x^2) + eps)), the mean in float32; a weight that learns takes plain torch."""

    def __init__(self, weight: nn.Parameter, variance_epsilon: float):
        super().__init__()
        self.weight, self.variance_epsilon = weight, variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        if rows.supports(x, self.weight) and not self.weight.requires_grad:
            return rows.rms_norm(x, self.weight, self.variance_epsilon)[0]
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class FusedGatedMLP(nn.Module):
    """y = down(silu(gate(x)) * up(x))."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(rows.swiglu(gate, up) if rows.supports(gate, up) else self.act_fn(gate) * up)


def fuse(model: nn.Module) -> None:
    """Replace the model's norms and MLPs, loaded and frozen, by those above where that changes nothing."""
    agreed: dict[tuple, bool] = {}
    for name, module in list(model.named_modules()):
        other, width = counterpart(module)
        if other is None:
            continue
        other.train(module.training)
        kind = (type(module), width)
        if kind not in agreed:
            agreed[kind] = same_output(module, other, width)
        if agreed[kind]:
            model.set_submodule(name, other)


def counterpart(module: Any) -> tuple[nn.Module | None, int]:
    """The fused module for one of a model's own, and the width of its input; None if it is of another kind."""
    parameters, children = dict(module.named_parameters(recurse=False)), dict(module.named_children())
    if set(parameters) == {"weight"} and not children and hasattr(module, "variance_epsilon"):
        return FusedRMSNorm(module.weight, module.variance_epsilon), module.weight.shape[0]
    if set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not parameters:
        return FusedGatedMLP(**children), module.gate_proj.in_features
    return None, 0


def input_dtype(module: Any) -> torch.dtype:
    """What the module's weights compute in."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    return weight.dtype if weight is not None else module.gate_proj.compute_dtype or torch.float32


@torch.no_grad()
def same_output(module: nn.Module, other: nn.Module, width: int) -> bool:
    """Whether both modules give the same on random input, in dtype and to AGREE_EPS roundings of it."""
    dtype = input_dtype(module)
    device = next(module.parameters()).device
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    try:
        found, expected = other(x), module(x)
    except Exception:  # it wants more than x: another kind of module
        return False
    gap = (found.double() - expected.double()).norm()
    return found.dtype == expected.dtype and bool(gap <= AGREE_EPS * torch.finfo(dtype).eps * expected.double().norm())
