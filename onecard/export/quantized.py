"""A 16-bit checkpoint as a 4-bit one in bitsandbytes' format, streamed tensor by tensor.

What it holds is what `load_model` would have made of the original, bit for bit; bitsandbytes with transformers loads it
as its own, onecard pages it straight from its files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from onecard.config import NESTED_BLOCKSIZE, QuantConfig
from onecard.errors import UserError
from onecard.export.folder import check_room, new_folder, read_tensor, write_others
from onecard.hf.checkpoint import Checkpoint, TensorInfo, inspect_checkpoint
from onecard.hf.load import find_checkpoint
from onecard.hf.writer import TensorFile
from onecard.kernels import ops
from onecard.memory.model import read_model
from onecard.quant.state import STATE_KEY, to_bnb

STATE_BYTES = 256  # of a weight's JSON, filled up with spaces


def quantize_checkpoint(model: str, output: str, quant: QuantConfig, compute_dtype: str = "bfloat16") -> Path:
    """Write a folder with the model's linears in 4 bits; its path.

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
    linears = set(read_model(checkpoint).linears)
    check_room(Path(output), checkpoint.nbytes // 2)
    with new_folder(Path(output)) as folder:
        places: dict[str, str] = {}
        for file in checkpoint.files:
            infos = {name: info for name, info in checkpoint.tensors.items() if info.file == file}
            places |= dict.fromkeys(write_quantized(folder / file.name, infos, linears, quant), file.name)
        write_others(folder, checkpoint, quantized_config(checkpoint, quant, compute_dtype), places)
    return Path(output)


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


def write_quantized(path: Path, infos: dict[str, TensorInfo], linears: set[str], quant: QuantConfig) -> list[str]:
    """One file's tensors, the linears' weights in 4 bits; the names in it."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, info in infos.items():
        tensors |= quantized_shapes(name, info.shape, quant) if name in linears else {name: (info.dtype, info.shape)}
    file = TensorFile(path, tensors)
    for name, info in infos.items():
        if name not in linears:
            file.copy(name, info)
            continue
        packed, state = ops.quantize_4bit(
            read_tensor(info), quant.quant_type, quant.blocksize, quant.double_quant, name
        )
        for suffix, tensor in to_bnb(packed, state).items():
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
