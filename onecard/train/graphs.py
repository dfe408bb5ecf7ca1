"""CUDA graphs of the decoder's forward and backward. One launch replaces thousands, between which a fast GPU waits for
Python longer than it computes.

A graph has fixed shapes, so a row is padded to a size that other rows share. Its last token repeats (a padding token's
embedding may be zero: data/packing.py). No earlier position attends to the repeated tokens, and none is supervised.
Empty documents pad the document count to a power of two. The longest document counts as a power of two, since attention
launches a block for each part of it in each document. A size is captured on its second occurrence. All graphs share one
memory pool, since one runs at a time. A graph is used only if its replay agrees with the layers' own result.

A graph cannot hold recomputed layers, pages, or experts, whose tokens are counted on the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from onecard.hf.attention import has_windows
from onecard.kernels.cuda_graph import Recording, forbid_device_sync, on_side_stream, record_graph
from onecard.train.loss import decode

MAX_GRAPHS = 16
STEPS = 5  # leading bits of a size that are kept: from 1,024 tokens on, a row grows by at most a sixteenth
SMALLEST_STEP = 64  # tokens
SHORTEST_LONGEST = 128  # tokens of a block of attention
ALIGN = 64  # elements: each gradient is aligned for vector loads
MAX_RELATIVE_ERROR = 2**-6  # of the norm: a few roundings of bfloat16


class Size(NamedTuple):
    """What a row is padded to: its tokens, documents, and the tokens that its longest document has at most."""

    tokens: int
    documents: int
    longest: int


def size_of(batch: dict[str, Any]) -> Size:
    tokens, documents = batch["input_ids"].shape[1], len(batch["cu_seqlens"]) - 1
    step = max(SMALLEST_STEP, 1 << max(tokens.bit_length() - STEPS, 0))
    tokens, documents = -(-tokens // step) * step, 1 << (documents - 1).bit_length()
    longest = max(end - start for start, end in pairwise(boundaries(batch, tokens, documents)))
    return Size(tokens, documents, min(max(1 << (longest - 1).bit_length(), SHORTEST_LONGEST), tokens))


def boundaries(batch: dict[str, Any], tokens: int, documents: int) -> list[int]:
    """Return a row's cu_seqlens, padded to `tokens` and `documents`."""
    ends = [*batch["cu_seqlens"][:-1], tokens]
    return ends + [tokens] * (documents + 1 - len(ends))


class Graph:
    """The forward graph and the backward graph of one size.

    Attributes:
        row: the graphs' inputs: input_ids, position_ids and cu_seqlens, with the longest document.
        forward, backward: the recordings, set by DecoderGraphs.
        hidden, grad_hidden: the output of the forward and the input of the backward, (1, T, H).
    """

    def __init__(self, size: Size, reads_ends: bool, device: torch.device):
        self.size = size
        ids, positions = (torch.zeros(1, size.tokens, dtype=torch.int64, device=device) for _ in range(2))
        self.row: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "cu_seqlens": [0, size.tokens]}
        if reads_ends:
            self.row["cu_seqlens"] = torch.zeros(size.documents + 1, dtype=torch.int32, device=device)
            self.row["longest"] = size.longest
        self.forward: Recording
        self.backward: Recording
        self.hidden: Tensor = ids
        self.grad_hidden: Tensor = ids

    def fill(self, batch: dict[str, Any]) -> None:
        """Copy a row into the graphs' inputs and pad it."""
        tokens = batch["input_ids"].shape[1]
        for key in ("input_ids", "position_ids"):
            self.row[key][:, :tokens].copy_(batch[key])
        self.row["input_ids"][:, tokens:].copy_(batch["input_ids"][:, -1:])
        self.row["position_ids"][:, tokens:].zero_()
        if isinstance(self.row["cu_seqlens"], Tensor):
            ends = torch.tensor(boundaries(batch, self.size.tokens, self.size.documents), dtype=torch.int32)
            self.row["cu_seqlens"].copy_(ends.pin_memory(), non_blocking=True)


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graph: Graph, batch: dict[str, Any]) -> Tensor:
        ctx.graph = graph
        graph.fill(batch)
        graph.forward.replay()
        return graph.hidden.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.graph.grad_hidden.copy_(grad)
        ctx.graph.backward.replay()  # accumulates into the parameters' .grad
        return None, None, None


class DecoderGraphs:
    """Replaces `decode` where a backward follows. Call `attach_gradients` before each update's first call.

    Args:
        limit: bytes of device memory that the run may use.
    """

    def __init__(self, model: PreTrainedModel, trainable: Iterable[torch.nn.Parameter], limit: int):
        self.model, self.trainable, self.limit = model, list(trainable), limit
        self.device = self.trainable[0].device
        self.anchor = torch.zeros((), requires_grad=True, device=self.device)
        self.flat: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.graphs: dict[Size, Graph] = {}
        self.occurrences: Counter[Size] = Counter()
        self.pool: Any = None
        self.stream: Any = None
        self.refused: dict[bool, str] = {}  # why no more graphs are captured, by `reads_ends`

    def attach_gradients(self) -> None:
        """Set every parameter's .grad to zeros at a fixed address. Graphs and layers accumulate there."""
        if not self.grads:
            self.flat, self.grads = flat_gradients(self.trainable)
        for buffer in self.flat:
            buffer.zero_()
        self.attach()

    def attach(self) -> None:
        for parameter, grad in zip(self.trainable, self.grads):
            parameter.grad = grad

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Return the hidden states, (1, T or more, H), of a row from `to_device`."""
        size = size_of(batch)
        if size not in self.graphs and self.reads_ends(size) not in self.refused:
            self.occurrences[size] += 1
            if self.occurrences[size] > 1 and len(self.graphs) < MAX_GRAPHS and self.has_room():
                self.capture(batch, size)
        if size in self.graphs:
            return Replay.apply(self.anchor, self.graphs[size], batch)  # type: ignore[return-value]
        return decode(self.model, self.pad_to(batch, size))

    def release(self) -> bool:
        """Drop all graphs and capture no more. Return whether there were any."""
        had, self.refused = bool(self.graphs), dict.fromkeys((False, True), "memory ran out")
        self.graphs.clear()
        return had

    def reads_ends(self, size: Size) -> bool:
        """Whether a graph of this size reads the documents' ends on the device. Not every GPU's attention does."""
        return size.documents > 1 or has_windows(self.model)

    def pad_to(self, batch: dict[str, Any], size: Size) -> dict[str, Any]:
        """Pad a row to a graph's size, so that the layers without a graph compute the same bits."""
        missing = size.tokens - batch["input_ids"].shape[1]
        ids, positions = batch["input_ids"], torch.nn.functional.pad(batch["position_ids"], (0, missing))
        ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], 1)
        return {"input_ids": ids, "position_ids": positions, "cu_seqlens": boundaries(batch, *size[:2])}

    def has_room(self) -> bool:
        """Whether a row's activations fit on the device twice: for the graphs, and for rows without a graph."""
        now, most = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return now + 2 * (most - now) <= min(self.limit, free)

    def capture(self, batch: dict[str, Any], size: Size) -> None:
        """Capture a size's graphs, or set `refused` for its kind to the reason for the failure."""
        kind = self.reads_ends(size)
        graph = Graph(size, kind, self.device)
        graph.fill(batch)
        random, before = torch.cuda.get_rng_state(self.device), [buffer.clone() for buffer in self.flat]
        try:
            if self.record(graph, random):
                self.graphs[size] = graph
            else:
                self.refused[kind] = "a graph gave other numbers than the layers"
        except RuntimeError as error:  # out of memory, or an operation that a graph cannot hold
            self.refused[kind] = (str(error).splitlines() or [type(error).__name__])[0]
        for buffer, values in zip(self.flat, before):
            buffer.copy_(values)
        self.attach()
        torch.cuda.set_rng_state(random, self.device)

    def record(self, graph: Graph, random: Tensor) -> bool:
        """Capture both graphs. Return whether a replay agrees with the layers' own result."""
        if self.stream is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        with on_side_stream(self.stream):
            for mode in ("default", "error"):  # the first run compiles kernels and builds their tables
                torch.cuda.set_rng_state(random, self.device)
                for parameter in self.trainable:
                    parameter.grad = None
                with forbid_device_sync(mode):
                    hidden = decode(self.model, graph.row)
                    torch.autograd.backward(hidden, probe_gradient(hidden))
            expected = [hidden.detach(), *(p.grad for p in self.trainable)]
            del hidden
        graph.grad_hidden = torch.empty_like(expected[0])
        self.attach()
        graph.forward = record_graph(lambda: decode(self.model, graph.row), self.stream, self.pool)
        hidden, graph.forward.result = graph.forward.result, None  # else the recording keeps its autograd graph
        graph.backward = record_graph(
            lambda: torch.autograd.backward(hidden, graph.grad_hidden), self.stream, self.pool
        )
        graph.hidden = hidden.detach()
        for buffer in self.flat:
            buffer.zero_()
        torch.cuda.set_rng_state(random, self.device)
        graph.forward.replay()
        graph.grad_hidden.copy_(probe_gradient(graph.hidden))
        graph.backward.replay()
        return agree([graph.hidden], expected[:1]) and agree(self.grads, expected[1:])


def probe_gradient(hidden: Tensor) -> Tensor:
    """Return a gradient for the hidden states with which graphs are checked: themselves, with 1 as the largest value.
    Hidden states of hundreds, times a norm's weight of hundreds, would overflow float16 in the backward."""
    hidden = hidden.detach()
    return hidden / hidden.abs().amax().clamp(min=1)


def flat_gradients(parameters: list[torch.nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """Allocate zero gradients in one buffer per dtype. Return the buffers and each parameter's gradient."""
    grads: list[Tensor] = [p.detach() for p in parameters]
    buffers = []
    for dtype in {p.dtype for p in parameters}:
        some = [i for i, p in enumerate(parameters) if p.dtype == dtype]
        sizes = [-(-parameters[i].numel() // ALIGN) * ALIGN for i in some]
        buffers.append(torch.zeros(sum(sizes), dtype=dtype, device=parameters[0].device))
        for i, part in zip(some, buffers[-1].split(sizes)):
            grads[i] = part[: parameters[i].numel()].view(parameters[i].shape)
    return buffers, grads


def agree(found: list[Tensor], expected: list[Any]) -> bool:
    """Whether each error is within rounding of the tensor's norm plus the norms' root mean square; syncs the device."""
    pairs = [(a.float(), torch.zeros_like(a) if b is None else b.float()) for a, b in zip(found, expected)]
    difference = torch.stack([(a - b).norm() for a, b in pairs])
    norms = torch.stack([b.norm() for _, b in pairs])
    return bool((difference <= MAX_RELATIVE_ERROR * (norms + norms.norm() / len(pairs) ** 0.5)).all())
