"""Run a model on the user's data one decoder layer at a time, to collect statistics of inputs for GPTQ and AWQ.

The model is transformers' own on the meta device. Its embedding computes the first hidden states. Then, for each layer:
read its weights, run it on all rows and accumulate statistics of its linears' inputs, let the caller change its
weights, and run it again. Its outputs are the next layer's inputs, so that a layer sees quantized layers' outputs.
Memory holds one layer, its statistics and the hidden states, whatever the number of layers. Documents are packed in
rows and never attend to each other, as in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from onecard.data.dataset import Dataset
from onecard.data.loader import Loader
from onecard.data.packing import collate
from onecard.errors import UserError
from onecard.export.folder import DTYPES
from onecard.export.merge.merged import Merged, common_dtype
from onecard.hf.attention import supports_packing, use_packed_attention
from onecard.hf.skeleton import meta_model
from onecard.kernels.cpu_info import product_dtype

SEED = 0  # of the order of the examples


@dataclass
class Inputs:
    """Statistics of an input that linears share: H = sum of x x^T and the mean |x|, over all tokens; float32.

    Attributes:
        names: names of the linears within their layer.
        norm: name within the layer of the norm whose output the input is; "" if there is none.
    """

    names: list[str]
    norm: str
    H_KK: Tensor
    mean_K: Tensor
    num_tokens: int = 0

    def add(self, x: Tensor) -> None:
        x_TK = x.reshape(-1, x.shape[-1]).float()
        self.H_KK.addmm_(x_TK.T, x_TK)
        self.mean_K += (x_TK.abs().sum(0) - self.mean_K * len(x_TK)) / (self.num_tokens + len(x_TK))
        self.num_tokens += len(x_TK)


@dataclass
class Row:
    """One row of documents: its current hidden states (1, T, d), and the keyword arguments of each layer's call."""

    hidden: Tensor
    calls: list[dict[str, Any]]


@dataclass
class Layer:
    """One decoder layer with its weights, for the caller to change.

    Attributes:
        name: the layer's name in the model, such as model.layers.0.
        dtype: the checkpoint's dtype.
    """

    name: str
    module: nn.Module
    inputs: list[Inputs]
    dtype: torch.dtype


class Recorder(nn.Module):
    """Replaces a layer to record the arguments with which the model's own forward calls it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.hidden, self.call = torch.empty(0), {}

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        self.hidden, self.call = hidden_states, call
        return hidden_states


def meta_decoder(merged: Merged) -> tuple[Any, dict[str, nn.Module]]:
    """Return transformers' model without weights, and its decoder layers by name."""
    fields = {key: value for key, value in merged.config.items() if key != "model_type"}
    config = AutoConfig.for_model(merged.config["model_type"], **fields)
    model = meta_model(config, "config.json").eval().requires_grad_(False)
    decoder: Any = model.get_decoder()
    layers = list(getattr(decoder, "layers", ()))
    if not layers:
        found = f"{config.model_type}, whose decoder keeps them elsewhere"
        do = "export in another format"
        raise UserError("a model to calibrate must have its decoder's layers in a list", found, do, "config.json")
    return model, {name: module for name, module in model.named_modules() if any(module is layer for layer in layers)}


def calibrate(
    merged: Merged, model: Any, layers: dict[str, nn.Module], dataset: Dataset, num_rows: int, device: torch.device
) -> Iterator[Layer]:
    """Yield the decoder layers in order. A layer has its weights until the next one is requested.

    Args:
        model, layers: the results of `meta_decoder`.
        num_rows: number of packed rows to run.

    Raises:
        UserError: a tensor of the model is not in the checkpoint.
    """
    stored = DTYPES[common_dtype(merged.shapes)]
    dtype = product_dtype(stored, device.type)
    packed = supports_packing(model)
    with use_packed_attention(model) if packed else nullcontext():
        rows = first_rows(merged, model, batches(dataset, num_rows, packed), dtype, device)
        for index, (name, layer) in enumerate(layers.items()):
            load(layer, f"{name}.", merged, dtype, device)
            yield Layer(name, layer, observe(layer, rows, index, device), stored)
            for row in rows:
                row.hidden = run(layer, row, index, device).to(row.hidden.device)
            layer.to("meta")


def batches(dataset: Dataset, num_rows: int, packed: bool) -> list[dict[str, Any]]:
    """Return the first rows of the examples in random order: one document each if the model supports no packed rows."""
    loader = Loader(dataset.examples, dataset.max_seq_length, packed, 1, SEED)
    found = [collate([dataset.examples[i] for i in indices]) for indices in loader.batches(0)[:num_rows]]
    return [{k: v for k, v in batch.items() if k != "labels" and (packed or k != "cu_seqlens")} for batch in found]


def first_rows(
    merged: Merged, model: Any, batches: Iterable[dict[str, Any]], dtype: torch.dtype, device: torch.device
) -> list[Row]:
    """Return the rows with the hidden states before the first layer, from the model's own forward without layers."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    layers = decoder.layers
    recorders: Any = nn.ModuleList(Recorder(layer) for layer in layers)
    decoder.layers = recorders
    fill_buffers(model, decoder, device)
    load(decoder, f"{name}.", merged, dtype, device)
    rows = []
    for batch in batches:
        decoder(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}, use_cache=False)
        rows.append(Row(recorders[0].hidden.cpu(), [recorder.call for recorder in recorders]))
    decoder.layers = layers
    model.get_input_embeddings().to("meta")
    return rows


def fill_buffers(model: Any, decoder: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies, as transformers does after a load."""
    for module in decoder.modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, torch.empty_like(buffer, device=device))
    for module in decoder.modules():
        if next(module.buffers(recurse=False), None) is not None:
            model._init_weights(module)


def load(module: nn.Module, prefix: str, merged: Merged, dtype: torch.dtype, device: torch.device) -> None:
    """Load the merged weights into a module that is on the meta device."""
    for key, parameter in module.named_parameters():
        found = merged.shapes.get(prefix + key, ("", None))[1]
        if found != tuple(parameter.shape):
            raise UserError(
                f"the checkpoint must hold {prefix}{key} of shape {list(parameter.shape)}",
                "no such tensor" if found is None else str(list(found)),
                "export in another format: experts and renamed tensors are not known to this one",
                str(merged.checkpoint.folder),
            )
    state = {key: merged.read(prefix + key).to(device, dtype) for key, _ in module.named_parameters()}
    module.load_state_dict(state, strict=False, assign=True)


def run(layer: nn.Module, row: Row, index: int, device: torch.device) -> Tensor:
    """Return the layer's output for one row."""
    out = layer(row.hidden.to(device), **row.calls[index])
    return out if isinstance(out, Tensor) else out[0]


def observe(layer: nn.Module, rows: list[Row], index: int, device: torch.device) -> list[Inputs]:
    """Run a layer on all rows and collect its `Inputs`. Linears that receive the same tensor share one."""
    found: list[Inputs] = []
    first: list[Tensor] = []  # the input of each, and below the norms' outputs; cleared after each row
    normed: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        mine = next((inputs for inputs in found if name in inputs.names), None)
        if mine is None:
            same = next((i for i, tensor in enumerate(first) if tensor is x), None)
            if same is not None:
                found[same].names.append(name)
                return
            K = x.shape[-1]
            norm = next((norm for norm, out in normed.items() if out is x), "")
            mine = Inputs([name], norm, torch.zeros(K, K, device=device), torch.zeros(K, device=device))
            found.append(mine)
            first.append(x)
        if mine.names[0] == name:
            mine.add(x)

    hooks = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(partial(see, name)))
        elif is_norm(module):
            hooks.append(module.register_forward_hook(lambda module, args, out, name=name: normed.update({name: out})))
    for row in rows:
        run(layer, row, index, device)
        first.clear()
        normed.clear()
    for hook in hooks:
        hook.remove()
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module's only parameter is a weight of one dimension."""
    parameters = dict(module.named_parameters())
    return set(parameters) == {"weight"} and parameters["weight"].dim() == 1
