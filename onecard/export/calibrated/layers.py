"""transformers' own model of a checkpoint without weights, whose decoder layers are loaded and run one at a time.

The model's forward runs once with recorders in place of its layers: they record the first hidden states and the other
arguments of each layer's call. Then each layer runs alone on the hidden states of the layer before it. Last, the
model's forward runs again with the last layer's outputs, for the logits. check.py compares such a run with the model's
own forward.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from onecard.errors import UserError
from onecard.export.merge.merged import Merged, common_dtype
from onecard.hf.attention import supports_packing, use_packed_attention
from onecard.hf.quantizer import check_finite
from onecard.hf.skeleton import meta_model, read_config
from onecard.hf.stored import FLOAT_DTYPES
from onecard.kernels.cpu_info import product_dtype
from onecard.train.loss import supervised

LOGIT_ROWS = 256  # positions whose logits are in memory together

Item = TypeVar("Item")
Value = TypeVar("Value")
Batch = dict[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


class Workers:
    """Threads for independent tasks. Each has one thread of torch, so that their number does not change a result."""

    def __init__(self, device: torch.device):
        self.count = torch.get_num_threads() if device.type == "cpu" else 1

    @contextmanager
    def pool(self) -> Iterator[ThreadPoolExecutor]:
        """Yield a pool that begins tasks in the order in which it gets them."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(before)

    def map(self, task: Callable[[Item], Value], items: Iterable[Item]) -> list[Value]:
        """Return the task's value for each item, in order."""
        with self.pool() as pool:
            return list(pool.map(task, items))


@dataclass
class Row:
    """One row of documents: its current hidden states (1, T, d), and the other arguments of each layer's call."""

    hidden: Tensor
    calls: list[Call]

    def copy(self) -> Row:
        """Return a row with the same hidden states, whose layers share state with each other but with no other row."""
        copies: dict[int, Any] = {}

        def own(value: Any) -> Any:
            if value is None or isinstance(value, (Tensor, tuple, str, int, float)):
                return value
            if id(value) not in copies:
                copies[id(value)] = copy(value)
            return copies[id(value)]

        calls: list[Call] = []
        for args, kwargs in self.calls:
            calls.append((tuple(map(own, args)), {key: own(value) for key, value in kwargs.items()}))
        return Row(self.hidden, calls)


class Recorder(nn.Module):
    """Replaces a layer. It records the arguments with which the model's own forward calls it, and returns `output`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.own = (layer,)  # in a tuple, so that it is not a child
        self.hidden = torch.empty(0)
        self.call: Call = (), {}
        self.output: Tensor | None = None  # None: its input
        self.in_tuple = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.own[0], name)  # what the model reads of its layers, such as attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden_states, (args, kwargs)
        out = hidden_states if self.output is None else self.output
        return (out,) if self.in_tuple else out


class LayeredModel:
    """A model on the meta device. A part of it is loaded while it runs.

    Attributes:
        layers: the decoder layers, by name.
        dtype: of the products. `check_layers` sets it to float32 for a time.
        is_packed: whether several documents may share a row.
    """

    def __init__(self, merged: Merged, device: torch.device):
        self.merged, self.device, self.workers = merged, device, Workers(device)
        with tempfile.TemporaryDirectory() as folder:  # a merged model's config may differ from the checkpoint's
            (Path(folder) / "config.json").write_text(json.dumps(merged.config), encoding="utf-8")
            config = read_config(Path(folder))
        self.model: Any = meta_model(config, "config.json").eval().requires_grad_(False)
        self.decoder: Any = self.model.get_decoder()
        self.key = self.list_of_layers()
        own = list(getattr(self.decoder, self.key))
        self.layers = {name: m for name, m in self.model.named_modules() if any(m is layer for layer in own)}
        if len(self.layers) != len(own):
            raise self.refused("layers that occur several times")
        self.owners = {}  # of each module: the innermost model, which initializes it
        for outer in self.model.modules():
            if isinstance(outer, PreTrainedModel):
                self.owners |= dict.fromkeys(outer.modules(), outer)
        self.stored = FLOAT_DTYPES[common_dtype(merged.shapes)]
        self.dtype = product_dtype(self.stored, device.type)
        self.is_packed = supports_packing(self.model)
        self.in_tuple = False  # whether its layers return tuples

    def list_of_layers(self) -> str:
        """Return the name in the decoder of the list of its layers."""
        count = self.model.config.get_text_config().num_hidden_layers
        found = self.decoder.named_children()
        names = [name for name, child in found if isinstance(child, nn.ModuleList) and len(child) == count]
        if len(names) != 1:
            raise self.refused("layers that are not in one list")
        return names[0]

    def refused(self, found: str) -> UserError:
        must = "a model to calibrate must be one that runs layer by layer"
        do = "use a format that is not calibrated, or leave calibrate out"
        return UserError(must, f"{self.model.config.model_type}: {found}", do, "config.json")

    def packing(self) -> AbstractContextManager[None]:
        return use_packed_attention(self.model) if self.is_packed else nullcontext()

    def name_of(self, module: nn.Module) -> str:
        return next(name for name, found in self.model.named_modules() if found is module)

    # Weights

    def load(self, module: nn.Module, name: str) -> None:
        """Load the merged weights and buffers of a module that is on the meta device.

        Raises:
            UserError: a tensor of the model is not in the checkpoint, has another shape or is not finite.
        """
        prefix = f"{name}." if name else ""
        self.fill_buffers(module, name)
        kept = set(module.state_dict())
        parameters = {key for key, _ in module.named_parameters()}
        wanted = {**dict(module.named_parameters()), **{k: b for k, b in module.named_buffers() if k in kept}}
        for key, tensor in wanted.items():
            found = self.shape_of(prefix + key)
            if found != tuple(tensor.shape):
                raise UserError(
                    f"the checkpoint must hold {prefix}{key} of shape {list(tensor.shape)}",
                    "no such tensor" if found is None else str(list(found)),
                    "use a format that is not calibrated: this one needs each tensor of a layer in the checkpoint",
                    str(self.merged.checkpoint.folder),
                )
        state = {}
        for key in wanted:
            tensor = self.read(prefix + key).to(self.device)
            state[key] = tensor.to(self.dtype) if key in parameters else tensor
            if tensor.is_floating_point():
                check_finite(prefix + key, tensor)
        module.load_state_dict(state, strict=False, assign=True)
        for key, tensor in module.state_dict(keep_vars=True).items():
            if key in state:
                tensor._is_hf_initialized = True  # transformers' initialization leaves it as it is
        left = [key for key, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
        if left:
            raise self.refused(f"{prefix}{left[0]}, which gets no value")

    def fill_buffers(self, module: nn.Module, name: str) -> None:
        """Compute the buffers that no checkpoint holds, such as rotary frequencies, as transformers does after a load.
        A model may compute those of its layers. A buffer that none computes is NaN."""
        kept, made = set(module.state_dict()), []
        for path, part in module.named_modules():
            own = [key for key, _ in part.named_buffers(recurse=False)]
            for key in own:
                buffer = getattr(part, key)
                value = float("nan") if buffer.is_floating_point() else 0
                setattr(part, key, torch.full_like(buffer, value, device=self.device))
            missing = [key for key in own if f"{path}.{key}".lstrip(".") not in kept]
            if missing:
                self.owners[part]._init_weights(part)
                made += [getattr(part, key) for key in missing]
        if any(buffer.is_floating_point() and buffer.isnan().any() for buffer in made):
            above = [
                found for path, found in self.model.named_modules() if not path or f"{name}.".startswith(f"{path}.")
            ]
            for part in above[:-1]:
                self.owners[part]._init_weights(part)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor of the model in the checkpoint; None if it is not there."""
        experts = self.merged.experts
        if name in experts.stacks and experts.parts(name):
            return tuple(experts.stacks[name].weight.shape)
        return self.merged.shapes.get(self.merged.model.stored.get(name, name), ("", None))[1]

    def read(self, name: str) -> Tensor:
        """Read a tensor of the model from the checkpoint."""
        if name in self.merged.experts.stacks:
            return torch.stack(list(self.merged.stack(name)))
        return self.merged.read(self.merged.model.stored.get(name, name))

    # Runs

    @contextmanager
    def rest_loaded(self, with_head: bool = False) -> Iterator[None]:
        """Load what is beside the layers: the decoder's other modules and, if wanted, the head."""
        layers, head = getattr(self.decoder, self.key), self.model.get_output_embeddings()
        try:
            setattr(self.decoder, self.key, nn.ModuleList())
            self.load(self.decoder, self.name_of(self.decoder))
            setattr(self.decoder, self.key, layers)
            if with_head and self.shape_of(f"{self.name_of(head)}.weight") is not None:
                self.load(head, self.name_of(head))
            elif with_head:  # it is the embedding
                head.weight = self.model.get_input_embeddings().weight
            yield
        finally:
            setattr(self.decoder, self.key, nn.ModuleList())
            self.decoder.to("meta")
            setattr(self.decoder, self.key, layers)
            if head is not None:
                head.to("meta")

    @contextmanager
    def recorded(self, with_head: bool = False) -> Iterator[list[Recorder]]:
        """Same as `rest_loaded`, with recorders in place of the layers. Yield them."""
        layers = getattr(self.decoder, self.key)
        with self.packing(), self.rest_loaded(with_head):
            recorders = [Recorder(layer) for layer in layers]
            for recorder in recorders:
                recorder.in_tuple = self.in_tuple
            try:
                setattr(self.decoder, self.key, nn.ModuleList(recorders))
                yield recorders
            finally:
                setattr(self.decoder, self.key, layers)

    def first_rows(self, batches: Iterable[Batch], prepare: Callable[[], None] = lambda: None) -> list[Row]:
        """Return rows with the hidden states before the first layer, from the model's forward without layers.

        Args:
            prepare: called when the weights beside the layers are loaded.
        """
        rows = []
        with self.recorded() as recorders:
            prepare()
            for batch in batches:
                self.record(batch, recorders)
                rows.append(Row(recorders[0].hidden.cpu(), [recorder.call for recorder in recorders]).copy())
        return rows

    def record(self, batch: Batch, recorders: list[Recorder]) -> None:
        """Run the decoder with recorders. Find out whether its layers must return tuples: without them, a model that
        takes a tuple's first item takes the first row of the hidden states."""
        ends = {"cu_seqlens": batch["cu_seqlens"]} if self.is_packed else {}
        for in_tuple in (self.in_tuple, not self.in_tuple):
            for recorder in recorders:
                recorder.in_tuple = in_tuple
            try:
                out = self.decoder(**self.inputs(batch), **ends, use_cache=False)[0]
            except Exception:
                if in_tuple != self.in_tuple:
                    raise
                continue
            first = recorders[0].hidden.shape
            if {recorder.hidden.shape[:-1] for recorder in recorders} == {first[:-1]} == {out.shape[:-1]}:
                self.in_tuple = in_tuple
                return
        raise self.refused("layers that pass on more than their hidden states")

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the model's arguments for a row. A single document has no need of positions."""
        keys = ("input_ids", "position_ids") if self.is_packed else ("input_ids",)
        return {key: batch[key].to(self.device) for key in keys}

    def losses(self, rows: list[Row], batches: list[Batch], last: Recorder) -> Iterator[tuple[float, int]]:
        """Yield the sum of each row's losses, from the last layer's outputs and by the model's own head, and the number
        of its supervised tokens.

        Args:
            last: the last of the recorders, with the head loaded.
        """
        for row, batch in zip(rows, batches):
            last.output = row.hidden.to(self.device)
            position, target = (t.to(self.device) for t in supervised(batch["labels"]))
            total = 0.0
            for some, wanted in zip(position.split(LOGIT_ROWS), target.split(LOGIT_ROWS)):
                total += float(nn.functional.cross_entropy(self.logits(batch, some), wanted, reduction="sum"))
            yield total, len(target)

    def logits(self, batch: Batch, position: Tensor) -> Tensor:
        """Return the model's logits at some positions of a row, float32 (P, V)."""
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            return self.model(**self.inputs(batch), use_cache=False, logits_to_keep=position).logits[0].float()
        return self.model(**self.inputs(batch), use_cache=False).logits[0, position].float()

    def each(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Load the layers one after another, and yield their numbers, names and modules."""
        with self.packing():
            for index, (name, module) in enumerate(self.layers.items()):
                self.load(module, name)
                yield index, name, module
                module.to("meta")

    def run(self, index: int, module: nn.Module, row: Row) -> Tensor:
        """Return a layer's output for one row."""
        args, kwargs = row.calls[index]
        out = module(row.hidden.to(self.device), *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def advance(self, index: int, module: nn.Module, rows: list[Row]) -> None:
        """Replace the rows' hidden states by a layer's outputs."""
        for row, out in zip(rows, self.workers.map(partial(self.run, index, module), rows)):
            row.hidden = out.to(row.hidden.device)
