"""RMSNorm, gated MLP, rotary attention and the residuals around them on fused operators, put in place of a model's own
modules where they compute the same.

A model says by its attributes that it has such a module and by its numbers that it means the same: `fuse` runs both
on random input once for each class and takes the fused one only if they agree to a few roundings of the dtype; of
attentions it compares all that they hand to transformers' AttentionInterface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from onecard.kernels import rows

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
NUMBERS = {"layer_idx", "training"}  # in which layers of a kind may differ
SETTING = (bool, int, float, str, type(None))
AGREE_EPS = 4  # roundings of the compute dtype, relative in the Euclidean norm


class FusedRMSNorm(nn.Module):
    """y = weight * (x / sqrt(mean(x^2) + eps)), the mean in float32; a weight that learns takes plain torch."""

    def __init__(self, weight: nn.Parameter, variance_epsilon: float):
        super().__init__()
        self.weight, self.variance_epsilon = weight, variance_epsilon

    def takes(self, x: Tensor) -> bool:
        return rows.supports_norm(x, self.weight) and not self.weight.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        if self.takes(x):
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


class FusedAttention:
    """Mixed into a model's attention class: its forward with the rotary positions of q and k as one operator."""

    passes: set[str]  # what the class hands to the interface beside the usual

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cos, sin = position_embeddings
        whole = cos.shape[-1] == self.head_dim and rows.has_rope(hidden_states.device)
        if self.config._attn_implementation == "eager" or not (whole and rows.supports(hidden_states, cos, sin)):
            own: Any = super()
            return own.forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rows.rope(x.transpose(1, 2), cos, sin) for x in (q, k))
        v = v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, weights = attend(self, q, k, v, attention_mask, **self.settings(), **kwargs)
        return self.o_proj(y.reshape(*shape[:-2], -1)), weights

    def settings(self: Any) -> dict[str, Any]:
        """What every call hands to the interface, by the families' names for it."""
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        known = {"sliding_window": window, "softcap": getattr(self, "attn_logit_softcapping", None)}
        dropout = self.attention_dropout if self.training else 0.0
        return {"dropout": dropout, "scaling": self.scaling} | {name: known[name] for name in self.passes}


class FusedLayer:
    """Mixed into a model's decoder layer: its forward with each sum and the norm behind it in one pass."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        first, second = self.input_layernorm, self.post_attention_layernorm
        if not all(isinstance(norm, FusedRMSNorm) and norm.takes(hidden_states) for norm in (first, second)):
            own: Any = super()
            return own.forward(hidden_states, **kwargs)
        x, y = rows.residual_norm(hidden_states, None, first.weight, first.variance_epsilon)
        y, _ = self.self_attn(hidden_states=y, **kwargs)
        x, y = rows.residual_norm(x, y, second.weight, second.variance_epsilon)
        y = self.mlp(y)
        return y.add_(x) if isinstance(self.mlp, FusedGatedMLP) else x + y  # in place: a product's result, kept by none


def fuse(model: nn.Module) -> None:
    """Replace the model's norms, MLPs, attentions and layers, loaded and frozen, by those above where that changes
    nothing."""
    agreed: dict[tuple, Any] = {}
    for name, module in reversed(list(model.named_modules())):  # parts before what they are parts of
        children = dict(module.named_children()).keys()
        if children >= PROJECTIONS or children == LAYER:
            kind = kind_of(module)
            if kind not in agreed:
                agreed[kind] = fused_layer(module) if children == LAYER else fused_attention(module)
            if agreed[kind] is not None:
                model.set_submodule(name, as_kind(module, agreed[kind]))
            continue
        other, width = counterpart(module)
        if other is None:
            continue
        other.train(module.training)
        kind = (type(module), width)
        if kind not in agreed:
            agreed[kind] = same_output(module, other, width)
        if agreed[kind]:
            model.set_submodule(name, other)


def kind_of(module: nn.Module) -> tuple:
    """What modules must share for one to stand for all: class, parts' classes, and settings such as a window."""
    settings = {k: v for k, v in vars(module).items() if k not in NUMBERS and isinstance(v, SETTING)}
    return (
        type(module),
        *((name, type(child)) for name, child in module.named_children()),
        *sorted(settings.items(), key=str),
    )


def as_kind(module: nn.Module, kind: Any) -> nn.Module:
    """The same state with another class's forward."""
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    return other


def four_tokens(attention: Any) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """Random hidden states and angles for an attention; None if their sizes or dtype are not known."""
    linear = getattr(attention, "q_proj", None)
    if linear is None or not hasattr(attention, "head_dim"):
        return None
    dtype = getattr(linear, "compute_dtype", None) or linear.weight.dtype
    if not dtype.is_floating_point:
        return None
    generator = torch.Generator().manual_seed(0)
    sizes = [linear.in_features, attention.head_dim, attention.head_dim]
    x, cos, sin = (torch.randn(1, 4, size, generator=generator).to(linear.weight.device, dtype) for size in sizes)
    return x, (cos, sin)


@torch.no_grad()
def fused_layer(module: Any) -> type | None:
    """A class between FusedLayer and the layer's own; None if what they make of four tokens is not alike."""
    probed = four_tokens(module.self_attn)
    if probed is None:
        return None
    x, angles = probed
    kind = type(f"Fused{type(module).__name__}", (FusedLayer, type(module)), {})
    try:
        settings = {"attention_mask": None, "position_embeddings": angles}
        found, expected = as_kind(module, kind)(x, **settings), module(x, **settings)
        return kind if agree(found, expected) else None
    except Exception:  # it wants something else
        return None


@torch.no_grad()
def fused_attention(module: Any) -> type | None:
    """A class between FusedAttention and the module's own; None if their calls of the interface are not alike."""
    probed = four_tokens(module)
    if probed is None:
        return None
    x, angles = probed
    before, calls = module.config._attn_implementation, PROBED
    try:
        module.config._attn_implementation = PROBE
        calls.clear()
        module(x, angles, None)
        passes = calls[0][1].keys() - {"dropout", "scaling"}
        if not passes <= {"sliding_window", "softcap"}:
            return None
        kind = type(f"Fused{type(module).__name__}", (FusedAttention, type(module)), {"passes": passes})
        as_kind(module, kind)(x, angles, None)
        (expected, settings), (found, own) = calls
        return kind if own == settings and all(map(agree, found, expected)) else None
    except Exception:  # it wants something else
        return None
    finally:
        calls.clear()
        module.config._attn_implementation = before


def probe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **settings: Any):
    """An attention that only notes what it was called with."""
    PROBED.append(((q, k, v), settings))
    return torch.zeros_like(q.transpose(1, 2)), None


PROBE, PROBED = "onecard_probe", []
AttentionInterface.register(PROBE, probe)


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are of one dtype and differ by AGREE_EPS roundings of it at most."""
    gap = (found.double() - expected.double()).norm()
    return found.dtype == expected.dtype and bool(
        gap <= AGREE_EPS * torch.finfo(found.dtype).eps * expected.double().norm()
    )


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
    return agree(found, expected)
