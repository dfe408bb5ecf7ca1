"""Leaves out of memory the parts of a multimodal checkpoint that text does not pass through.

The modules stay in the model under their names, so that an adapter and its config are those of the whole checkpoint.
Their tensors have no elements. They are away while the model loads: transformers would fill what it does not read.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from onecard.nn.linears import beside_text


def leave_out(model: Any) -> None:
    """Empty the modules that text does not pass through, on the device of the embedding."""
    for name in beside_text(model):
        empty(model.get_submodule(name), model.get_input_embeddings().weight.device)


def detach(model: Any) -> dict[str, nn.Module]:
    """Put empty modules in place of those that text does not pass through, and let their tensors be unexpected. Return
    the modules by name."""
    found = {name: model.get_submodule(name) for name in beside_text(model)}
    for name in found:
        model.set_submodule(name, nn.Identity())
    unexpected = [rf"^{re.escape(name)}\." for name in found]
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *unexpected}
    return found


def attach(model: Any, modules: dict[str, nn.Module]) -> None:
    """Put modules that `detach` returned back, without elements."""
    for name, module in modules.items():
        empty(module, model.get_input_embeddings().weight.device)
        model.set_submodule(name, module)


def empty(module: nn.Module, device: torch.device) -> None:
    """Replace a module's tensors by tensors without elements."""
    for part in module.modules():
        held: tuple[Any, Any] = (part._parameters, part._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None:
                    nothing = torch.empty(0, dtype=tensor.dtype, device=device)
                    is_learned = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(nothing, requires_grad=False) if is_learned else nothing
