"""RMSNorm, gated MLP, rotary attention and their decoder layer with fused operators.

A module with the structure of one of these may get a subclass of its own class. The subclass uses the fused operators
if it can, and otherwise calls its own class's forward. It passes arguments on by their names, because transformers
renames and adds arguments from release to release. fusion.py decides which modules get a subclass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from onecard.kernels import elementwise

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
GATED_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
DROPOUT = ("attention_dropout", "dropout")  # of the attention's probabilities, by the families' names
NUMBERS = {"layer_idx", "training"}  # attributes in which modules of one kind may differ
SETTING = (bool, int, float, str, type(None))


class Fused:
    """A mixin for a module's own class. `ready` returns the arguments of `fused`, or None if the call needs the class's
    own forward."""

    enabled: ClassVar[bool] = True  # see unfused()
    own: ClassVar[type[nn.Module]]
    names: ClassVar[tuple[str, ...]]  # argument names of the class's own forward

    ready: Callable[..., tuple | None]
    fused: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.ready(*args, **kwargs) if Fused.enabled else None
        return self.own.forward(self, *args, **kwargs) if call is None else self.fused(*call)  # type: ignore[arg-type]


class FusedRMSNorm(Fused):
    """y = weight * (x / sqrt(mean(x^2) + eps)), the mean in float32. A trainable weight is not fused."""

    def takes(self: Any, x: Tensor) -> bool:
        return Fused.enabled and not self.weight.requires_grad and elementwise.supports_norm(x, self.weight)

    def ready(self, *args: Any, **kwargs: Any) -> tuple | None:
        return args if len(args) == 1 and not kwargs and self.takes(*args) else None

    def fused(self: Any, x: Tensor) -> Tensor:
        return elementwise.rms_norm(x, self.weight, self.variance_epsilon)[0]


class FusedGatedMLP(Fused):
    """y = down(act(gate(x)) * up(x)); with SiLU, act and the product are one operator.

    Attributes:
        chunk: most tokens that are computed at a time; None: all. The backward computes each chunk again, so that gate,
            up and their product exist for one chunk only.
    """

    chunk: int | None = None

    def ready(self, *args: Any, **kwargs: Any) -> tuple | None:
        return args if len(args) == 1 and not kwargs and elementwise.supports(*args) else None

    def fused(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        if self.chunk is None or len(tokens) <= self.chunk:
            return self.whole(x)
        parts = [checkpoint(self.whole, part, use_reentrant=False) for part in tokens.split(self.chunk)]
        return torch.cat(parts).view_as(x)

    def whole(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        joined = is_silu(self.act_fn) and elementwise.supports(gate, up)
        return self.down_proj(elementwise.swiglu(gate, up) if joined else self.act_fn(gate) * up)


def is_silu(activation: nn.Module) -> bool:
    return "silu" in type(activation).__name__.lower()


class FusedAttention(Fused):
    """The class's forward, with one operator for the rotary positions of q and k."""

    passes: ClassVar[frozenset[str]] = frozenset()  # other arguments that the class passes to the interface
    cache_kwargs: ClassVar[bool | None] = None  # whether it passes kwargs to the cache; None: not tested

    def ready(self: Any, *args: Any, **kwargs: Any) -> tuple | None:
        given = dict(zip(self.names, args)) | kwargs
        x, angles, mask = (given.pop(key, None) for key in ("hidden_states", "position_embeddings", "attention_mask"))
        named = [value for value in (given.pop(name, None) for name in self.names) if value is not None]
        cache = next((value for value in named if isinstance(value, Cache)), None)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        if attend is None or len(named) != (cache is not None) or not isinstance(angles, tuple):
            return None
        if cache is not None and self.cache_kwargs is None:
            return None
        cos, sin = angles
        whole = cos.shape[-1] == self.head_dim
        return (x, cos, sin, mask, cache, attend, given) if whole and elementwise.supports(x, cos, sin) else None

    def fused(
        self: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        attend: Callable,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (project(x).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (elementwise.rope(heads.transpose(1, 2), cos, sin) for heads in (q, k))
        v = v.transpose(1, 2)
        if cache is not None:
            more = {"kwargs": kwargs} if self.cache_kwargs else {}
            k, v = cache.update(k, v, self.layer_idx, **more)
        y, weights = attend(self, q, k, v, mask, **self.settings(), **kwargs)
        return self.o_proj(y.reshape(*shape[:-2], -1)), weights

    def settings(self: Any) -> dict[str, Any]:
        """Return the arguments that every call passes to the interface, by the families' names."""
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        known = {"sliding_window": window, "softcap": getattr(self, "attn_logit_softcapping", None)}
        rates = (getattr(self, name) for name in DROPOUT if hasattr(self, name))
        dropout = next(rates, 0.0) if self.training else 0.0
        return {"dropout": dropout, "scaling": self.scaling} | {name: known[name] for name in self.passes}


class FusedLayer(Fused):
    """The class's forward, with each residual sum and the norm after it in one pass."""

    def ready(self: Any, *args: Any, **kwargs: Any) -> tuple | None:
        given = dict(zip(self.names, args)) | kwargs
        x, norms = given.pop("hidden_states", None), (self.input_layernorm, self.post_attention_layernorm)
        takes = x is not None and all(isinstance(norm, FusedRMSNorm) and norm.takes(x) for norm in norms)
        return (x, given) if takes else None

    def fused(self: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        first, second = self.input_layernorm, self.post_attention_layernorm
        x, y = elementwise.residual_norm(x, None, first.weight, first.variance_epsilon)
        y, _ = self.self_attn(hidden_states=y, **kwargs)
        x, y = elementwise.residual_norm(x, y, second.weight, second.variance_epsilon)
        y = self.mlp(y)
        return y.add_(x) if isinstance(self.mlp, FusedGatedMLP) else x + y  # in place: nothing else keeps y


KINDS = (FusedRMSNorm, FusedGatedMLP, FusedAttention, FusedLayer)  # parts before the modules that contain them


def counterpart(module: nn.Module) -> type[Fused] | None:
    """Return the fused form that a module may have, judged by its children and parameters only."""
    children = dict(module.named_children()).keys()
    parameters = dict(module.named_parameters(recurse=False)).keys()
    if isinstance(module, Fused):
        return None
    if parameters == {"weight"} and not children and hasattr(module, "variance_epsilon"):
        return FusedRMSNorm
    if children == GATED_MLP and not parameters:
        return FusedGatedMLP
    if children >= PROJECTIONS and hasattr(module, "head_dim"):
        return FusedAttention
    return FusedLayer if children == LAYER else None


def kind_of(module: nn.Module) -> tuple:
    """Return what modules of one kind share: class, children's classes, shapes, and settings such as a window."""
    settings = {k: v for k, v in vars(module).items() if k not in NUMBERS and isinstance(v, SETTING)}
    return (
        type(module),
        *((name, type(child)) for name, child in module.named_children()),
        *((name, p.shape) for name, p in module.named_parameters(recurse=False)),
        *sorted(settings.items(), key=str),
    )


def unfuse(model: nn.Module) -> None:
    """Restore the own class of every fused module."""
    for module in model.modules():
        own: Any = getattr(type(module), "own", None) if isinstance(module, Fused) else None
        if own is not None:
            module.__class__ = own


@contextmanager
def unfused() -> Iterator[None]:
    """Make every fused module run its own class's forward in the body."""
    before, Fused.enabled = Fused.enabled, False
    try:
        yield
    finally:
        Fused.enabled = before


def fused_class(own: type[nn.Module], form: type[Fused]) -> type[Fused]:
    """Return a class that inherits from a fused form and a module's own class."""
    names = [
        name
        for name, parameter in inspect.signature(own.forward).parameters.items()
        if name != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    # The name stays: accelerate finds the layers to shard by it.
    return type(own.__name__, (form, own), {"own": own, "names": tuple(names)})
