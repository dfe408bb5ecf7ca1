"""Training for the format of a file that will be served (nn/grid.py): which linears it takes, and their grids.

A file rounds each linear of the decoder layers. So each needs a LoRA: one without would be rounded in the file and not
in the run. What the exports decide for a whole model is decided here in the same way: gptq's group size, and which
weights share a scale in nvfp4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.pytorch_utils import Conv1D

from onecard.adapter.layers import LoraLinear4bit, adapted_linears
from onecard.config import CalibrationConfig, LoraSettings
from onecard.errors import UserError
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.quantizer import quantization_of
from onecard.hf.skeleton import Model, read_model
from onecard.hf.stored import FLOAT_DTYPES
from onecard.nn.grid import Grid
from onecard.quant import nvfp4, q4_0
from onecard.quant.grouped import IN_LAYER, pick_group_size
from onecard.quant.state import QuantState

LARGEST_GROUP = CalibrationConfig.model_fields["group_size"].default  # of `export --format gptq`
WHERE = "train_for"


def check_served(model: Model, lora: LoraSettings) -> None:
    """Raise UserError unless a run can train for the format: every 4-bit weight is a linear of a decoder layer with a
    LoRA, whose rows are whole blocks."""
    format = lora.train_for
    if format is None:
        return
    must, do = f"train_for {format} needs every 4-bit weight to be a linear with LoRA", "leave train_for out"
    if model.stacks:
        raise UserError(must, f"experts, as in {next(iter(model.stacks))}", do, WHERE)
    names = [path.removesuffix(".weight") for path in model.linears]
    bare = sorted(set(names) - set(adapted_linears(lora, names)))
    if bare:
        do = "target all-linear without exclude_modules and layers_to_transform"
        raise UserError(must, f"{bare[0]} without one", do, WHERE)
    turned = next((n for n, m in model.modules.named_modules() if isinstance(m, Conv1D)), None)
    if turned is not None:
        raise UserError(must, f"{turned}, a Conv1D", do, WHERE)
    made = next((name for name in names if model.stored and f"{name}.weight" not in model.stored), None)
    if made is not None:
        raise UserError(must, f"{made}, which transformers makes from other tensors of the checkpoint", do, WHERE)
    outside = next((name for name in names if not IN_LAYER.search(name)), None)
    if outside is not None:
        raise UserError(must, f"{outside}, outside of the decoder layers", do, WHERE)
    size, outputs = block_size(model, lora), 8 if format in ("gptq", "nvfp4") else 1
    for name in names:
        N, K = model.linears[f"{name}.weight"].weight.shape
        if K % size or N % outputs:
            must = f"train_for {format} needs linears whose inputs are a multiple of {size}, and outputs of {outputs}"
            raise UserError(must, f"{name} of shape {[N, K]}", do, WHERE)


def block_size(model: Model, lora: LoraSettings) -> int:
    """Return how many inputs share a scale; 1 for nf4, whose blocks run over the ends of rows."""
    if lora.train_for == "gptq":
        return pick_group_size((linear.weight.shape[1] for linear in model.linears.values()), LARGEST_GROUP)
    return {"q4_0": q4_0.BLOCK, "nvfp4": nvfp4.BLOCK}.get(str(lora.train_for), 1)


def set_grids(model: Any, folder: Path, lora: LoraSettings) -> None:
    """Make the LoRA layers of a loaded model compute with the weights of the file.

    Args:
        model: peft's, over a base in 4 bits.
        folder: the base's checkpoint. The load's blocksize and double_quant are those of nf4.
    """
    checkpoint = inspect_checkpoint(folder)
    known = read_model(checkpoint)
    size, quant, parents = block_size(known, lora), quantization_of(model.get_base_model()), {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLinear4bit):
            base: Any = module.get_base_layer()
            info = checkpoint.tensors[known.stored[f"{name}.weight"]]
            state: QuantState = base.loaded_state
            dtype = FLOAT_DTYPES.get(info.dtype, state.dtype)  # a weight that is stored in 4 bits says it there
            assert lora.train_for is not None
            module.grid = Grid(lora.train_for, dtype, size, quant["blocksize"], quant["double_quant"])
            parents.setdefault(name.rpartition(".")[0], []).append(module)
    if lora.train_for == "nvfp4":
        for beside in parents.values():
            for module in beside:
                module.beside = tuple(beside)


@contextmanager
def without_grids(model: Any) -> Iterator[None]:
    """Make the LoRA layers compute with W and the adapter as they are in the body, as other commands do."""
    grids = {m: m.grid for m in model.modules() if isinstance(m, LoraLinear4bit) and m.grid is not None}
    for module in grids:
        module.grid = None
    try:
        yield
    finally:
        for module, grid in grids.items():
            module.grid = grid
