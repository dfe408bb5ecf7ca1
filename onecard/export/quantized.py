"""A 16-bit checkpoint as a 4-bit one in bitsandbytes' format, streamed tensor by tensor.

What it holds is what `load_model` would have made of the original, bit for bit; bitsandbytes with transformers loads it
as its own, onecard pages it straight from its files. Experts are an exception: transformers has no 4-bit form of them.
Each stacked weight gets the keys that bitsandbytes.nn.parametrize gives a 4-bit parameter and reads; of transformers'
own loading only onecard's quantizer does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.config import NESTED_BLOCKSIZE, QuantConfig
from onecard.errors import UserError
from onecard.export.experts import read_experts
from onecard.export.folder import check_room, new_folder, read_tensor, write_others
from onecard.hf.checkpoint import Checkpoint, TensorInfo, inspect_checkpoint
from onecard.hf.experts import expert_places
from onecard.hf.load import find_checkpoint
from onecard.hf.writer import TensorFile
from onecard.kernels import ops
from onecard.memory.plan import read_model
from onecard.quant.state import STATE_KEY, QuantState, to_bnb

STATE_BYTES = 256  # of a weight's JSON, filled up with spaces


def quantize_checkpoint(model: str, output: str, quant: QuantConfig, compute_dtype: str = "bfloat16") -> Path:
    """Write a folder with the model's linears and experts in 4 bits; its path.

    Args:
        compute_dtype: what those who load it should dequantize to, for config.json.

    Raises:
        UserError: a checkpoint that is not in 16 or 32 bits; int4; no room on the disk; an output that exists.
    """
    checkpoint = inspect_checkpoint(find_checkpoint(model))
    if checkpoint.is_4bit:
        raise UserError("the model must be in 16 or 32 bits", "4 bits", "use it as it is", model)
    if quant.quant_type == "int4":
        raise UserError("bitsandbytes' format holds nf4 and fp4", "int4", "choose one of them", "quant_type")
    check_room(Path(output), checkpoint.nbytes // 2)
    weights = quantizable(checkpoint, quant)
    with new_folder(Path(output)) as folder:
        files: dict[str, str] = {}
        for file in checkpoint.files:
            infos = [name for name, info in checkpoint.tensors.items() if info.file == file]
            found = {name: weights.get(name) for name in infos}
            found = {weight.name if weight else name: weight for name, weight in found.items()}
            new = {name: weight for name, weight in found.items() if name not in files}  # experts' come once
            if new:
                files |= dict.fromkeys(write_quantized(folder / file.name, checkpoint, new, quant), file.name)
        write_others(folder, checkpoint, quantized_config(checkpoint, quant, compute_dtype), files)
    return Path(output)


@dataclass(frozen=True)
class Weight:
    """A weight to be quantized: its name and shape in the result, and its codes and state when they are wanted."""

    name: str
    shape: tuple[int, ...]
    quantize: Callable[[], tuple[Tensor, QuantState]]


def quantizable(checkpoint: Checkpoint, quant: QuantConfig) -> dict[str, Weight]:
    """The weight that each tensor is, or is a part of."""
    model, how = read_model(checkpoint), (quant.quant_type, quant.blocksize, quant.double_quant)
    places = expert_places(model.modules, model.stacks, checkpoint.tensors) if model.stacks else {}

    def linear(name: str, info: TensorInfo) -> Weight:
        return Weight(name, info.shape, lambda: ops.quantize_4bit(read_tensor(info), *how, name))

    def stacked(name: str) -> Weight:
        shape, experts = model.stacks[name].weight.shape, partial(read_experts, checkpoint, places, name)
        return Weight(name, shape, lambda: ops.quantize_stack(experts(), shape, *how, name))

    linears = {name: linear(name, info) for name, info in checkpoint.tensors.items() if name in model.linears}
    return {**linears, **{name: stacked(place.stack) for name, place in places.items()}}


def quantized_config(checkpoint: Checkpoint, quant: QuantConfig, compute_dtype: str) -> dict[str, Any]:
    """config.json with transformers' BitsAndBytesConfig."""
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant.quant_type,
        "bnb_4bit_use_double_quant": quant.double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
    }
    return {**checkpoint.config, "quantization_config": quantization}


def write_quantized(
    path: Path, checkpoint: Checkpoint, weights: dict[str, Weight | None], quant: QuantConfig
) -> list[str]:
    """One file with the weights in 4 bits, other tensors (None) copied; the names in it."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, weight in weights.items():
        if weight is not None:
            tensors |= quantized_shapes(name, weight.shape, quant)
        else:
            tensors[name] = (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
    file = TensorFile(path, tensors)
    for name, weight in weights.items():
        if weight is None:
            file.copy(name, checkpoint.tensors[name])
            continue
        for suffix, tensor in to_bnb(*weight.quantize()).items():
            file.append(name + suffix, tensor)
            if STATE_KEY in suffix:
                file.append(name + suffix, b" " * (STATE_BYTES - tensor.numel()))
    file.close()
    return list(tensors)


def quantized_shapes(name: str, shape: tuple[int, ...], quant: QuantConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor that stands for a weight of this shape."""
    numel = torch.Size(shape).numel()
    blocks = -(-numel // quant.blocksize)
    found = {
        name: ("U8", ((numel + 1) // 2, 1)),
        f"{name}.absmax": ("U8" if quant.double_quant else "F32", (blocks,)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.{STATE_KEY}{quant.quant_type}": ("U8", (STATE_BYTES,)),
    }
    if quant.double_quant:
        found[f"{name}.nested_absmax"] = ("F32", (-(-blocks // NESTED_BLOCKSIZE),))
        found[f"{name}.nested_quant_map"] = ("F32", (256,))
    return found
