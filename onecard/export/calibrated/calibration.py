"""Run a model on the user's data one decoder layer at a time, to collect statistics of inputs for calibrated formats.

The model is transformers' own on the meta device. Its embedding computes the first hidden states. Then, for each layer:
read its weights, run it on all rows and accumulate statistics of its linears' inputs, let the caller change its
weights, and run it again. Its outputs are the next layer's inputs, so that a layer sees quantized layers' outputs.
Memory holds one layer, its statistics and the hidden states, whatever the number of layers. Documents are packed in
rows and never attend to each other, as in training.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from onecard.data.dataset import Dataset
from onecard.data.loader import Loader
from onecard.data.packing import collate
from onecard.errors import UserError
from onecard.export.calibrated.hessian import Inputs
from onecard.export.folder import DTYPES
from onecard.export.merge.merged import Merged, common_dtype
from onecard.hf.attention import supports_packing, use_packed_attention
from onecard.hf.quantizer import check_finite
from onecard.hf.skeleton import meta_model
from onecard.kernels.cpu_info import product_dtype
from onecard.nn.experts import are_stacked_experts
from onecard.nn.linears import LINEARS

SEED = 0  # of the order of the examples
GROUP_TOKENS = 4096  # of rows whose linears' inputs are in memory together

Item = TypeVar("Item")
Value = TypeVar("Value")


class Workers:
    """Threads for independent tasks. Each has one thread of torch, so that their number does not change a result."""

    def __init__(self, device: torch.device):
        self.count = torch.get_num_threads() if device.type == "cpu" else 1

    def map(self, task: Callable[[Item], Value], items: Iterable[Item]) -> list[Value]:
        """Return the task's value for each item, in order."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(task, items))
        finally:
            torch.set_num_threads(before)


Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


@dataclass
class Row:
    """One row of documents: its current hidden states (1, T, d), and the other arguments of each layer's call."""

    hidden: Tensor
    calls: list[Call]


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
        dtype: the checkpoint's dtype.
    """

    name: str
    module: nn.Module
    index: int
    dtype: torch.dtype
    device: torch.device
    inputs: list[Inputs] = field(default_factory=list)
    routed: dict[str, Routed] = field(default_factory=dict)

    def advance(self, rows: list[Row], workers: Workers) -> None:
        """Replace the rows' hidden states by the layer's outputs."""
        for row, out in zip(rows, workers.map(self.run, rows)):
            row.hidden = out.to(row.hidden.device)

    def run(self, row: Row) -> Tensor:
        """Return the layer's output for one row."""
        args, kwargs = row.calls[self.index]
        out = self.module(row.hidden.to(self.device), *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]


class Recorder(nn.Module):
    """Replaces a layer. It records the arguments with which the model's own forward calls it, and returns `output`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.hidden = torch.empty(0)
        self.call: Call = (), {}
        self.output: Tensor | None = None  # None: its input

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.call = hidden_states, (args, kwargs)
        return hidden_states if self.output is None else self.output


def meta_decoder(merged: Merged) -> tuple[Any, dict[str, nn.Module]]:
    """Return transformers' model without weights, and its decoder layers by name."""
    fields = {key: value for key, value in merged.config.items() if key != "model_type"}
    config = AutoConfig.for_model(merged.config["model_type"], **fields)
    model = meta_model(config, "config.json").eval().requires_grad_(False)
    layers = list(getattr(model.get_decoder(), layers_name(model)))
    found = {name: module for name, module in model.named_modules() if any(module is layer for layer in layers)}
    if len(found) != len(layers):
        raise not_in_one_list(model)
    return model, found


def layers_name(model: Any) -> str:
    """Return the name in the decoder of the list of its layers."""
    text, found = model.config.get_text_config(), model.get_decoder().named_children()
    names = [n for n, child in found if isinstance(child, nn.ModuleList) and len(child) == text.num_hidden_layers]
    if len(names) != 1:
        raise not_in_one_list(model)
    return names[0]


def not_in_one_list(model: Any) -> UserError:
    must = "a model to calibrate must have its decoder's layers in one list, each once"
    found, do = f"{model.config.model_type}, whose layers are elsewhere", "use a format that is not calibrated"
    return UserError(must, found, do, "config.json")


def calibrate(
    merged: Merged, model: Any, layers: dict[str, nn.Module], rows: list[Row], device: torch.device, workers: Workers
) -> Iterator[Layer]:
    """Yield the decoder layers in order. A layer has its weights until the next one is requested.

    Args:
        model, layers: the results of `meta_decoder`.
        rows: the results of `first_rows`. A layer's statistics are of their hidden states.

    Raises:
        UserError: a tensor of the model is not in the checkpoint.
    """
    stored = DTYPES[common_dtype(merged.shapes)]
    with packing(model):
        for index, (name, module) in enumerate(layers.items()):
            load(module, f"{name}.", merged, device)
            layer = Layer(name, module, index, stored, device)
            observe(layer, rows, workers)
            yield layer
            layer.advance(rows, workers)
            module.to("meta")


def packing(model: Any) -> AbstractContextManager[None]:
    """Use packed attention in the body if the model supports it."""
    return use_packed_attention(model) if supports_packing(model) else nullcontext()


def batches(dataset: Dataset, model: Any, num_rows: int) -> list[dict[str, Any]]:
    """Return the first rows of the examples in random order: one document each if the model supports no packed rows."""
    loader = Loader(dataset.examples, dataset.max_seq_length, supports_packing(model), 1, SEED)
    return [collate([dataset.examples[i] for i in indices]) for indices in loader.batches(0)[:num_rows]]


def first_rows(merged: Merged, model: Any, batches: Iterable[dict[str, Any]], device: torch.device) -> list[Row]:
    """Return the rows with the hidden states before the first layer, from the model's own forward without layers."""
    rows = []
    with packing(model), without_layers(merged, model, device) as recorders:
        for batch in batches:
            decode(model, batch, device)
            rows.append(Row(recorders[0].hidden.cpu(), [recorder.call for recorder in recorders]))
    return rows


@contextmanager
def without_layers(merged: Merged, model: Any, device: torch.device) -> Iterator[list[Recorder]]:
    """Put recorders in place of the decoder's layers, and yield them. The decoder's other weights are loaded."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    key = layers_name(model)
    layers = getattr(decoder, key)
    recorders = [Recorder(layer) for layer in layers]
    setattr(decoder, key, nn.ModuleList(recorders))
    fill_buffers(model, decoder, device)
    load(decoder, f"{name}.", merged, device)
    yield recorders
    setattr(decoder, key, layers)
    model.get_input_embeddings().to("meta")


def decode(model: Any, batch: dict[str, Any], device: torch.device) -> Tensor:
    """Run the decoder on a row. Return its last hidden states, (1, T, H)."""
    known = {key: value for key, value in batch.items() if key in ("input_ids", "position_ids", "cu_seqlens")}
    if not supports_packing(model):
        known.pop("cu_seqlens")
    on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in known.items()}
    return model.get_decoder()(**on_device, use_cache=False).last_hidden_state


def fill_buffers(model: Any, decoder: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies, as transformers does after a load."""
    for module in decoder.modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, torch.empty_like(buffer, device=device))
    for module in decoder.modules():
        if next(module.buffers(recurse=False), None) is not None:
            model._init_weights(module)


def load(module: nn.Module, prefix: str, merged: Merged, device: torch.device) -> None:
    """Load the merged weights into a module that is on the meta device, in the dtype of products there."""
    dtype = product_dtype(DTYPES[common_dtype(merged.shapes)], device.type)
    for key, parameter in module.named_parameters():
        found = shape_of(prefix + key, merged)
        if found != tuple(parameter.shape):
            raise UserError(
                f"the checkpoint must hold {prefix}{key} of shape {list(parameter.shape)}",
                "no such tensor" if found is None else str(list(found)),
                "use a format that is not calibrated: this one needs each weight of a layer in the checkpoint",
                str(merged.checkpoint.folder),
            )
    state = {}
    for key, _ in module.named_parameters():
        state[key] = read(prefix + key, merged).to(device, dtype)
        check_finite(prefix + key, state[key])
    module.load_state_dict(state, strict=False, assign=True)


def shape_of(name: str, merged: Merged) -> tuple[int, ...] | None:
    """Return the shape of a parameter of the model in the checkpoint; None if it is not there."""
    if name in merged.experts.stacks and merged.experts.parts(name):
        return tuple(merged.experts.stacks[name].weight.shape)
    return merged.shapes.get(merged.model.stored.get(name, name), ("", None))[1]


def read(name: str, merged: Merged) -> Tensor:
    """Read a parameter of the model from the checkpoint."""
    if name in merged.experts.stacks:
        return torch.stack(list(merged.stack(name)))
    return merged.read(merged.model.stored.get(name, name))


@dataclass
class Seen:
    """What the modules of a layer received and returned for one row, by name within the layer."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)  # of linears
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of norms
    routed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of stacked experts


def observe(layer: Layer, rows: list[Row], workers: Workers) -> None:
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
        layer.run(row)
        return here.seen

    hooks = []
    for name, module in layer.module.named_modules():
        if isinstance(module, LINEARS):
            hooks.append(module.register_forward_pre_hook(partial(see, name)))
        elif are_stacked_experts(module):
            hooks.append(module.register_forward_pre_hook(partial(see_experts, name), with_kwargs=True))
        elif is_norm(module):
            hooks.append(module.register_forward_hook(partial(see_norm, name)))
    for some in groups(rows):
        found = workers.map(record, some)
        for seen in found:
            group(layer.inputs, seen)
            for name, (hidden, index) in seen.routed.items():
                routed = layer.routed.setdefault(name, Routed([], []))
                routed.hidden.append(hidden)
                routed.index.append(index)
        tasks = []
        for one in layer.inputs:
            received = [x for seen in found for x in seen.inputs.get(one.names[0], ())]
            tasks += one.tasks(received) if received else []
        workers.map(lambda task: task(), tasks)
    for hook in hooks:
        hook.remove()
    for one in layer.inputs:
        one.finish()


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


def group(found: list[Inputs], seen: Seen) -> None:
    """Add the linears of a row that are new to `found`: to the `Inputs` of the same tensor, or to a new one."""
    known = {name for one in found for name in one.names}
    for name, (x, *_) in seen.inputs.items():
        if name in known:
            continue
        same = next((one for one in found if one.names[0] in seen.inputs and seen.inputs[one.names[0]][0] is x), None)
        if same is not None:
            same.names.append(name)
        else:
            norm = next((norm for norm, out in seen.outputs.items() if out is x), "")
            found.append(Inputs(name, norm, x.shape[-1], x.device))


def is_norm(module: nn.Module) -> bool:
    """Whether a module's only parameter is a weight of one dimension."""
    parameters = dict(module.named_parameters())
    return set(parameters) == {"weight"} and parameters["weight"].dim() == 1
