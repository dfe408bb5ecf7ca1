"""Run a model on the user's data one decoder layer at a time, to collect statistics of inputs for calibrated formats.

For each layer: read its weights, run it on all rows and accumulate statistics of its linears' inputs, let the caller
change its weights, and run it again. Its outputs are the next layer's inputs, so that a layer sees quantized layers'
outputs. Memory holds one layer, its statistics and the hidden states, whatever the number of layers. Documents are
packed in rows and never attend to each other, as in training.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn

from onecard.data.chat.mask import Example
from onecard.data.loader import Loader
from onecard.data.packing import collate
from onecard.export.calibrated.hessian import Inputs, bfloat16_products
from onecard.export.calibrated.layers import Batch, LayeredModel, Row
from onecard.nn.experts import are_stacked_experts
from onecard.nn.linears import LINEARS

SEED = 0  # of the order of the examples
GROUP_TOKENS = 4096  # of rows whose linears' inputs are in memory together


@dataclass
class Routed:
    """What a module with stacked experts received, by row: hidden states (T, K) and each token's experts (T, J)."""

    hidden: list[Tensor]
    index: list[Tensor]


@dataclass
class Layer:
    """One decoder layer with its weights, for the caller to change.

    Attributes:
        name: the layer's name in the model, such as model.layers.0.
        index: its place among the layers.
        inputs: of its linears; `routed`: of its modules with stacked experts, by name within it.
        with_H: whether `inputs` have their H.
    """

    layered: LayeredModel
    index: int
    name: str
    module: nn.Module
    inputs: list[Inputs] = field(default_factory=list)
    routed: dict[str, Routed] = field(default_factory=dict)
    with_H: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's dtype."""
        return self.layered.stored

    def advance(self, rows: list[Row]) -> None:
        """Replace the rows' hidden states by the layer's outputs."""
        self.layered.advance(self.index, self.module, rows)


@torch.no_grad()
def calibrate(layered: LayeredModel, rows: list[Row], with_H: bool = True) -> Iterator[Layer]:
    """Yield the decoder layers in order. A layer has its weights until the next one is requested.

    Args:
        rows: the results of `first_rows`. A layer's statistics are of their hidden states.
        with_H: whether to compute the H of each input.

    Raises:
        UserError: a tensor of the model is not in the checkpoint.
    """
    for index, name, module in layered.each():
        layer = Layer(layered, index, name, module, with_H=with_H)
        observe(layer, rows)
        yield layer
        layer.advance(rows)


def first_batches(
    examples: Sequence[Example],
    length: int,
    is_packed: bool,
    num_rows: int | None = None,
    num_tokens: int | None = None,
) -> tuple[list[Batch], list[int]]:
    """Return rows of the examples in random order, and the indices of their examples.

    Args:
        length: tokens of a row of several documents.
        is_packed: whether rows may have several documents.
        num_rows: rows at most; num_tokens: examples up to the one that reaches it.
    """
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SEED)).tolist()
    if num_tokens is not None:
        totals = list(accumulate(len(examples[index].input_ids) for index in chosen))
        chosen = chosen[: bisect_left(totals, num_tokens) + 1]
    loader = Loader([examples[index] for index in chosen], length, is_packed, 1, SEED)
    rows = [[chosen[place] for place in row] for row in loader.batches(0)[:num_rows]]
    return [collate([examples[index] for index in row]) for row in rows], list(chain(*rows))


def count_tokens(rows: list[Batch]) -> int:
    return sum(row["input_ids"].numel() for row in rows)


@dataclass
class Seen:
    """What the modules of a layer received and returned for one row, by name within the layer."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)  # of linears
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of norms
    routed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of stacked experts


def observe(layer: Layer, rows: list[Row]) -> None:
    """Run a layer on all rows, and collect its `inputs` and `routed`. Linears with the same input share one."""
    here = threading.local()  # `here.seen` is of the row that a thread runs

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        here.seen.inputs.setdefault(name, []).append(args[0])

    def see_norm(name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        here.seen.outputs[name] = out

    def see_experts(name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden, index, *_ = (*args, *kwargs.values())  # the third are the tokens' weights
        here.seen.routed[name] = (hidden, index)

    def record(row: Row) -> Seen:
        here.seen = Seen()
        layer.layered.run(layer.index, layer.module, row)
        return here.seen

    hooks = []
    for name, module in layer.module.named_modules():
        if isinstance(module, LINEARS):
            hooks.append(module.register_forward_pre_hook(partial(see, name)))
        elif are_stacked_experts(module):
            hooks.append(module.register_forward_pre_hook(partial(see_experts, name), with_kwargs=True))
        elif is_norm(module):
            hooks.append(module.register_forward_hook(partial(see_norm, name)))
    try:
        for some in groups(rows):
            add(layer, layer.layered.workers.map(record, some))
    finally:
        for hook in hooks:
            hook.remove()
    for one in layer.inputs:
        one.finish()


def add(layer: Layer, found: list[Seen]) -> None:
    """Add what a layer's modules received for some rows to its statistics."""
    for seen in found:
        group(layer.inputs, seen, layer.with_H)
        for name, (hidden, index) in seen.routed.items():
            routed = layer.routed.setdefault(name, Routed([], []))
            routed.hidden.append(hidden)
            routed.index.append(index)
    exact, others = [], []  # of bfloat16, and of other inputs
    for one in layer.inputs:
        received = [x for seen in found for x in seen.inputs.get(one.names[0], ())]
        tasks = exact if all(x.dtype == torch.bfloat16 for x in received) else others
        tasks += one.tasks(received) if received else []
    with bfloat16_products():
        layer.layered.workers.map(lambda task: task(), exact)
    layer.layered.workers.map(lambda task: task(), others)


def groups(rows: list[Row]) -> list[list[Row]]:
    """Return groups of consecutive rows, of at most GROUP_TOKENS tokens if a group has more than one row."""
    found: list[list[Row]] = []
    room = 0
    for row in rows:
        if row.hidden.shape[1] > room:
            found.append([])
            room = GROUP_TOKENS
        found[-1].append(row)
        room -= row.hidden.shape[1]
    return found


def group(found: list[Inputs], seen: Seen, with_H: bool) -> None:
    """Add the linears of a row that are new to `found`: to the `Inputs` of the same tensor, or to a new one."""
    known = {name for one in found for name in one.names}
    for name, (x, *_) in seen.inputs.items():
        if name in known:
            continue
        same = next((one for one in found if one.names[0] in seen.inputs and seen.inputs[one.names[0]][0] is x), None)
        if same is not None:
            same.names.append(name)
        else:
            norm = next((norm for norm, out in seen.outputs.items() if out is x and not reaches_experts(x, seen)), "")
            found.append(Inputs(name, norm, x.shape[-1], x.device, with_H))


def reaches_experts(x: Tensor, seen: Seen) -> bool:
    """Whether stacked experts, and so a router, have the same input as a linear."""
    received = [hidden for hidden, _ in seen.routed.values()]
    return any(hidden.numel() == x.numel() and torch.equal(hidden.flatten(), x.flatten()) for hidden in received)


def is_norm(module: nn.Module) -> bool:
    """Whether a module's only parameter is a weight of one dimension."""
    parameters = dict(module.named_parameters())
    return set(parameters) == {"weight"} and parameters["weight"].dim() == 1
