"""CUDA graphs of a token's forward pass. One launch replaces hundreds, between which a GPU waits for Python longer than
it computes.

A graph has fixed addresses, so keys and values are in buffers of a fixed length, which grow by doubling. A query
attends to the keys up to its own position. A graph is captured at the third token and kept for the adapter of its
capture. Before a model's first answer, its logits with these buffers are compared with those of transformers' own
cache. If they differ, or a graph cannot hold the model, that cache is used.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from onecard.hf.attention import cache_name, supports_packing, use_cached_attention
from onecard.infer.check import MAX_RELATIVE_ERROR, agree, context_of
from onecard.infer.decoding import CachedContext, Uncached, shared_prefix
from onecard.kernels.cuda_graph import Recording, forbid_device_sync, on_side_stream, record_graph
from onecard.nn.embedding import device_of
from onecard.nn.experts import has_experts

MIN_BUFFER_TOKENS = 256  # tokens of the first buffers
TOKENS_BEFORE_CAPTURE = 3  # capture at the third token that is fed alone
MAX_GRAPHS = 4  # one for each adapter
PROBE = (list(range(1, 17)), [17], [18])  # tokens

_kinds: WeakKeyDictionary[Any, type[CachedContext]] = WeakKeyDictionary()  # of each model, set at its first context


class FixedLayer(CacheLayerMixin):
    """A layer's keys and values, (1, H_kv, length, D). The next ones are written at `positions`."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.positions: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            x.new_zeros(*x.shape[:2], self.length, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None and self.positions is not None
        self.keys.index_copy_(2, self.positions, key_states)
        self.values.index_copy_(2, self.positions, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        raise NotImplementedError("the positions are handed over")

    def get_max_length(self) -> int:
        return self.length


class Buffers:
    """A cache of fixed length, and each adapter's graph of a token's forward pass with it."""

    def __init__(self, model: Any, length: int, device: torch.device):
        self.model, self.length = model, length
        self.layers = [FixedLayer(length) for _ in range(model.config.get_text_config().num_hidden_layers)]
        self.takes_cache: Any = {cache_name(model): Cache(layers=list(self.layers))}
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.graphs: dict[Any, Recording] = {}

    def take(self, shorter: Buffers) -> None:
        """Copy the contents of shorter buffers."""
        for old, new in zip(shorter.layers, self.layers):
            if old.keys is not None and old.values is not None:
                new.lazy_initialization(old.keys, old.values)
                assert new.keys is not None and new.values is not None
                new.keys[:, :, : old.length].copy_(old.keys)
                new.values[:, :, : old.length].copy_(old.values)

    def logits(self, ids: Tensor, positions: Tensor, num_keys: int | None = None) -> Tensor:
        """Return logits, (1, V) float32, after ids (1, T) at positions (T,). `num_keys` counts cached tokens too."""
        for layer in self.layers:
            layer.positions = positions
        with use_cached_attention(self.model):
            out = self.model(
                input_ids=ids,
                position_ids=positions[None],
                use_cache=True,
                logits_to_keep=1,
                **self.takes_cache,
                key_positions=positions,
                num_keys=num_keys,
            )
        return out.logits[:, -1].float()

    def record(self, key: Any) -> bool:
        """Capture a graph for the current ids and position. Return whether its replay agrees with the layers' own."""
        side = side_stream(self.ids.device)
        with on_side_stream(side), forbid_device_sync():
            expected = self.logits(self.ids, self.position)
        recording = record_graph(lambda: self.logits(self.ids, self.position), side)
        recording.replay()
        if len(self.graphs) == MAX_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        self.graphs[key] = recording
        return agree(recording.result, expected, MAX_RELATIVE_ERROR)


class FixedContext(CachedContext):
    """Same as `CachedContext`, with fixed buffers and CUDA graphs. With `records` False: no graphs, on any device."""

    def __init__(self, model: Any, records: bool = True):
        self.records = records
        self.tuner = next((m for m in model.modules() if isinstance(m, BaseTunerLayer)), None)
        super().__init__(model)

    def clear(self) -> None:
        self.tokens = []
        self.buffers: Buffers | None = None
        self.num_single, self.addresses = 0, 0

    def rewind(self, ids: list[int]) -> list[int]:
        self.tokens = self.tokens[: shared_prefix(self.tokens, ids[:-1])]
        self.num_single = 0
        self.addresses = hash(tuple(p.data_ptr() for p in self.model.parameters()))
        return ids[len(self.tokens) :]

    @torch.no_grad()
    def feed(self, ids: list[int]) -> Tensor:
        assert not self.model.training, "a cache needs a model in eval mode"
        start, device = len(self.tokens), device_of(self.model)
        buffers = self.reserve(start + len(ids), device)
        self.tokens += ids
        if len(ids) > 1 or not self.records:
            positions = torch.arange(start, start + len(ids), device=device)
            return buffers.logits(torch.tensor([ids], device=device), positions, start + len(ids))
        buffers.ids.fill_(ids[0])
        buffers.position.fill_(start)
        self.num_single += 1
        key = (self.addresses, self.adapter())
        if key not in buffers.graphs and (self.num_single < TOKENS_BEFORE_CAPTURE or not self.recorded(buffers, key)):
            return buffers.logits(buffers.ids, buffers.position)
        recording = buffers.graphs[key]
        recording.replay()
        return recording.result.clone()

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        assert self.buffers is not None
        fixed, end = self.buffers.layers[layer], len(self.tokens) + 1
        fixed.positions = torch.tensor([end - 1], device=key.device)
        keys, values = fixed.update(key, value)
        return keys[:, :, :end], values[:, :, :end]

    def reserve_token(self) -> None:
        self.reserve(len(self.tokens) + 1, device_of(self.model))

    def prefix(self) -> list[tuple[Tensor, Tensor]] | None:
        """Return copies: the buffers are written in place."""
        end, layers = len(self.tokens), self.buffers.layers if self.buffers else []
        found = [(each.keys, each.values) for each in layers if each.keys is not None and each.values is not None]
        return [(keys[:, :, :end].clone(), values[:, :, :end].clone()) for keys, values in found] or None

    def restore(self, tokens: list[int], prefix: list[tuple[Tensor, Tensor]]) -> None:
        self.clear()
        buffers = self.reserve(len(tokens), device_of(self.model))
        for layer, (keys, values) in zip(buffers.layers, prefix):
            layer.positions = torch.arange(len(tokens), device=keys.device)
            layer.update(keys[:, :, : len(tokens)], values[:, :, : len(tokens)])
        self.tokens = list(tokens)

    def reserve(self, length: int, device: torch.device) -> Buffers:
        """Return buffers for `length` tokens, with the current keys and values."""
        if self.buffers is None or self.buffers.length < length:
            longer = Buffers(self.model, max(MIN_BUFFER_TOKENS, 1 << (length - 1).bit_length()), device)
            if self.buffers is not None:
                longer.take(self.buffers)
            self.buffers = longer
        return self.buffers

    def adapter(self) -> Any:
        """Return the state of the adapters, on which a graph depends."""
        layer: Any = self.tuner
        if layer is None:
            return None
        return tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters)

    def recorded(self, buffers: Buffers, key: Any) -> bool:
        """Record a graph. A failure ends recording in this context, and for the model unless memory ran out."""
        try:
            agrees = buffers.record(key)
        except torch.OutOfMemoryError:
            self.records = False
            return False
        except RuntimeError:  # an operation that a graph cannot hold
            agrees = False
        if not agrees:
            buffers.graphs.clear()
            self.records, _kinds[self.model] = False, CachedContext
        return agrees


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all recordings: libraries keep a workspace for every stream that they see."""
    return torch.cuda.Stream(device)


def make_context(model: Any) -> CachedContext:
    """Create the cache that suits a model; a fixed one if its passes can be graphs.

    Raises:
        UserError: for a model's first context, same as `context_of`.
    """
    if model not in _kinds:
        kind = context_of(model)
        if kind is Uncached:
            line = f"{model.config.model_type} cannot use a cache: each new token recomputes all earlier tokens"
            warnings.warn(line, stacklevel=2)
        _kinds[model] = FixedContext if kind is CachedContext and suits(model) else kind
    return _kinds[model](model)


def suits(model: Any) -> bool:
    """Whether a model is completely on a GPU, uses transformers' AttentionInterface, has no experts (their tokens are
    counted on the host), and has the same logits with a fixed cache."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    on_gpu = device_of(base).type == "cuda"
    paged = getattr(base, "pager", None) is not None
    return on_gpu and not paged and not has_experts(base) and supports_packing(base) and gives_the_same(model)


def gives_the_same(model: Any) -> bool:
    """Whether a model's logits with a fixed cache agree with those of its own cache."""
    fixed, own = FixedContext(model, records=False), CachedContext(model)
    try:
        return all([agree(fixed.feed(ids), own.feed(ids), MAX_RELATIVE_ERROR) for ids in PROBE])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the model needs another kind of cache
        return False
