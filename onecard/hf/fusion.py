"""Selects the modules of a loaded model to replace with their fused form, by a comparison of their results.

The loaded model reads a few tokens: a prompt without a cache, packed documents, and a prompt and one more token with a
cache. The calls of one module of each kind are recorded. A kind is fused only if the fused code ran on each of these
calls, and on the first in training mode, too, and agrees with the module's own forward: in the whole output, in the
gradient of the input, and for an attention in everything that it passes to the attention interface and to the cache.
"""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel

from onecard.config import FUSION_PROBE_TOKENS
from onecard.hf.attention import cache_name, supports_packing, use_attention, use_packed_attention
from onecard.hf.fused import (
    KINDS,
    Fused,
    FusedAttention,
    counterpart,
    fused_class,
    kind_of,
    unfused,
)
from onecard.nn.linears import beside_text, is_inside

ROUNDINGS = 4  # allowed relative difference of a fused module in the Euclidean norm, in eps of its dtype,
SENSITIVITY = 2  # plus this many times the change of the module's own output by one rounding of the input,
MOST_SENSITIVE = 0.05  # a term of at most this size
SCALES = (1.0, 2.0**-6)  # of the input; with a small one, a layer's residual sum can't hide an error in what is added


def fuse(model: nn.Module) -> dict[str, str]:
    """Replace a loaded model's norms, MLPs, attentions and layers with their fused form if the results agree. Modules
    that text does not pass through stay as they are.

    Returns:
        the reason for each class that has the structure of a fused form but is not replaced.
    """
    kinds: dict[tuple, list[nn.Module]] = {}
    beside = beside_text(model) if isinstance(model, PreTrainedModel) else []
    for name, module in model.named_modules():
        if counterpart(module) is not None and not any(is_inside(name, path) for path in beside):
            kinds.setdefault(kind_of(module), []).append(module)
    if not kinds:
        return {}
    left: dict[str, str] = {}
    with frozen(model), torch.random.fork_rng():  # run() sets the seed of dropout
        calls, failed = record_calls(model, [modules[0] for modules in kinds.values()])
        for form in KINDS:
            for modules in [found for found in kinds.values() if counterpart(found[0]) is form]:
                cls: Any = fused_class(type(modules[0]), form)
                why = differs(modules[0], cls, calls.get(modules[0], []), model) or ""
                if why:
                    left.setdefault(type(modules[0]).__name__, failed if why == NOT_CALLED and failed else why)
                    continue
                for module in modules:
                    module.__class__ = cls
    if left and not is_tested():
        reasons = "; ".join(f"{name}: {why}" for name, why in left.items())
        warnings.warn(f"these modules run transformers' own code, without fused operators: {reasons}", stacklevel=2)
    return left


def is_tested() -> bool:
    """Whether the installed transformers is within the releases that this package was tested with."""
    try:
        lines = importlib.metadata.requires("onecard") or []
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return False
    wanted = [found for found in map(Requirement, lines) if found.name == "transformers"]
    return all(found.specifier.contains(installed, prereleases=True) for found in wanted)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters and disable dropout in the body: the fused forms are for frozen modules."""
    learning = [p for p in model.parameters() if p.requires_grad]
    training = [module for module in model.modules() if module.training]
    for parameter in learning:
        parameter.requires_grad_(False)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@dataclass
class Call:
    """A module's call as the model made it."""

    args: tuple
    kwargs: dict[str, Any]
    attention: str | None  # the implementation; None: the model's own
    cached: bool
    training: bool = False

    def copy(self) -> tuple[tuple, dict[str, Any]]:
        """Copy the arguments, so that the call may change them."""
        return tuple(map(own_copy, self.args)), {key: own_copy(value) for key, value in self.kwargs.items()}


def own_copy(value: Any) -> Any:
    """Copy a tensor or a cache; return another value unchanged."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.deepcopy(value) if isinstance(value, Cache) else value


class AllCalled(Exception):
    """Every module to record was called."""


@dataclass
class Recorder:
    """Hooks that record the calls of some modules, and stop the model's forward after the last of these modules."""

    modules: list[nn.Module]
    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    attention: str | None = None
    missing: set[nn.Module] = field(default_factory=set)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module in self.missing:
            cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
            call = Call(args, kwargs, self.attention, cached)
            call.args, call.kwargs = call.copy()
            self.calls.setdefault(module, []).append(call)

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.missing.discard(module)
        if not self.missing:
            raise AllCalled

    def run(self, forward: Callable[[], Any]) -> None:
        self.missing = set(self.modules)
        with suppress(AllCalled):
            forward()


@torch.no_grad()
def record_calls(model: Any, modules: list[nn.Module]) -> tuple[dict[nn.Module, list[Call]], str]:
    """Record the calls of `modules` while the model reads a few tokens in each way in which it is used.

    Returns:
        calls by module, and the reason if the model could not read the tokens, else "".
    """
    recorder = Recorder(modules)
    hooks = [module.register_forward_pre_hook(recorder.before, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(recorder.after) for module in modules]
    try:
        with unfused():
            return recorder.calls, read_tokens(model, recorder)
    finally:
        for hook in hooks:
            hook.remove()


def read_tokens(model: Any, recorder: Recorder) -> str:
    """Read without a cache, as packed documents, and with a cache. Return why the first way failed, or ""."""
    embedding = model.get_input_embeddings()
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(size, (1, FUSION_PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(embedding.weight.device)
    try:
        recorder.run(lambda: model(input_ids=ids, use_cache=False))
    except Exception as error:
        recorder.calls.clear()
        return f"{type(error).__name__} in a forward of seven tokens"
    if supports_packing(model):
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=ids.device)
        with use_packed_attention(model):
            recorder.attention = model.config._attn_implementation
            keep_if_it_runs(
                recorder, lambda: model(input_ids=ids, position_ids=positions, use_cache=False, cu_seqlens=[0, 3, 7])
            )
        recorder.attention = None
    cache = RecordedCache(config=model.config)
    cached: Any = {cache_name(model): cache, "use_cache": True}
    keep_if_it_runs(
        recorder, lambda: model(input_ids=ids[:, :6], **cached), lambda: model(input_ids=ids[:, 6:], **cached)
    )
    return ""


def keep_if_it_runs(recorder: Recorder, *forwards: Callable[[], Any]) -> None:
    """Record forwards. If the unchanged model fails on one, discard these records."""
    before = {module: list(calls) for module, calls in recorder.calls.items()}
    try:
        for forward in forwards:
            recorder.run(forward)
    except Exception:  # this model is not used in this way
        recorder.calls.clear()
        recorder.calls.update(before)


class RecordedCache(DynamicCache):
    """A cache that records the arguments of each update."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[override]
        PROBED.append(((key_states, value_states), {"args": args, **kwargs}))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


PROBE = "onecard_probe"
PROBED: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []


def probe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **settings: Any):
    """An attention that only records its arguments."""
    PROBED.append(((q, k, v), settings | {"mask": mask}))
    return torch.zeros((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), dtype=q.dtype, device=q.device), None


AttentionInterface.register(PROBE, probe)
NOT_CALLED = "the model did not call it"


def differs(module: nn.Module, cls: Any, calls: list[Call], model: Any) -> str | None:
    """Return why a module must not get its fused class, or None if both computed the same on every call."""
    if not calls:
        return NOT_CALLED
    is_attention, eager = issubclass(cls, FusedAttention), model.config._attn_implementation == "eager"
    compared = 0
    try:
        for call in [*calls, replace(calls[0], training=True)]:
            module.train(call.training)
            if is_attention and (why := hands_on_otherwise(module, cls, call, model)):
                return why
            if is_attention and eager and call.attention is None:
                continue  # eager attention is the class's own code
            with nullcontext() if call.attention is None else use_attention(model, call.attention):
                if why := gap(module, cls, call):
                    return why
            compared += 1
    except Exception as error:  # it needs something else
        return f"{type(error).__name__} in its fused form"
    finally:
        module.train(False)
    return None if compared else "its fused code never runs"


def hands_on_otherwise(module: nn.Module, cls: Any, call: Call, model: Any) -> str | None:
    """Set the class to pass on what the module's own forward passes on. Return why that is not possible, or None."""
    with use_attention(model, PROBE):
        own = handed_on(module, call)
        settings = own[-1][1]
        given = call.kwargs.keys() | {"dropout", "scaling", "mask"}
        if not (passes := settings.keys() - given) <= {"sliding_window", "softcap"}:
            return f"it hands {', '.join(sorted(passes))} to its attention"
        cls.passes = frozenset(passes)
        if call.cached:
            cls.cache_kwargs = "kwargs" in own[0][1]
        with wearing(module, cls):
            found = handed_on(module, call)
    same = len(found) == len(own) and all(a == b or (a is b) for (_, a), (_, b) in zip(found, own))
    alike = same and all(agree(x, y) for (xs, _), (ys, _) in zip(found, own) for x, y in zip(xs, ys))
    return None if alike else "it hands something else to its attention or its cache"


@torch.no_grad()
def handed_on(module: nn.Module, call: Call) -> list[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Return what a call passes to the cache and to the attention interface, in order."""
    PROBED.clear()
    try:
        run(module, *call.copy())
        return [(tensors, {k: comparable(v) for k, v in settings.items()}) for tensors, settings in PROBED]
    finally:
        PROBED.clear()


def comparable(value: Any) -> Any:
    """Convert a setting to plain values, so that == compares its content."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    return [comparable(each) for each in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def wearing(module: nn.Module, cls: Any) -> Iterator[None]:
    """Give the module another class in the body."""
    own, module.__class__ = module.__class__, cls
    try:
        yield
    finally:
        module.__class__ = own


def run(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a module without hooks, from one state of the random generator. A fused module must run its fused code."""
    torch.manual_seed(0)
    if not isinstance(module, Fused):
        return module.forward(*args, **kwargs)
    ready = module.ready(*args, **kwargs)
    if ready is None:
        raise TypeError("the fused code does not take this call")
    return module.fused(*ready)


def gap(module: nn.Module, cls: Any, call: Call) -> str | None:
    """Return why the output or gradient of the fused class does not agree with the module's own, or None."""
    for scale in SCALES:
        with unfused():
            expected = results(module, call, scale)
            moved = results(module, call, scale, rounding=True)
        with wearing(module, cls):
            found = results(module, call, scale)
        if len(found) != len(expected):
            return "its output is of another form"
        for what, x, y, z in zip(("output", "gradient", "output"), found, expected, moved):
            if not agree(x, y, z):
                return f"its {what} differs by {relative(x, y):.1e} of its size"
    return None


def results(module: nn.Module, call: Call, scale: float, rounding: bool = False) -> list[Tensor]:
    """Return a call's output and, without a cache, the gradient of its first tensor for a random cotangent.

    Args:
        scale: factor of the first tensor; a power of two, so that nothing is rounded.
        rounding: moves the first tensor by one rounding of its dtype, up or down at random.
    """
    args, kwargs = call.copy()
    x = (args[0] if args else kwargs["hidden_states"]) * scale
    if rounding:
        sign = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sign()
        x = x + x * sign.to(x.device, x.dtype) * (torch.finfo(x.dtype).eps / 2)
    x = x.requires_grad_(not call.cached)
    args, kwargs = ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})
    with torch.set_grad_enabled(not call.cached):
        out = run(module, args, kwargs)
        tensors = [out] if isinstance(out, Tensor) else [part for part in out if isinstance(part, Tensor)]
        if call.cached:
            return tensors
        cotangent = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(2)) * scale
        (grad,) = torch.autograd.grad(tensors[0], x, cotangent.to(tensors[0].device, tensors[0].dtype))
    return [tensors[0].detach(), grad, *(part.detach() for part in tensors[1:])]


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def agree(found: Tensor, expected: Tensor, moved: Tensor | None = None) -> bool:
    """Whether two tensors have one dtype and shape and differ by no more than rounding can explain.

    Args:
        moved: the expected tensor after one rounding of the input, which can change much if the module is steep.
    """
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    steep = 0.0 if moved is None else min(SENSITIVITY * relative(moved, expected), MOST_SENSITIVE)
    return relative(found, expected) <= ROUNDINGS * torch.finfo(found.dtype).eps + steep
