"""Checkpoints in bitsandbytes' 4-bit format, streamed tensor by tensor, from a 16-bit one or a merged adapter.

The 4-bit weights equal those that `load_model` computes from the 16-bit weights, bit for bit. transformers with
bitsandbytes loads the checkpoint; onecard pages it directly from its files. Experts are an exception: transformers has
no 4-bit form of them. Each stacked weight gets the keys that bitsandbytes.nn.parametrize writes and reads for a 4-bit
parameter; in transformers' own loading, only onecard's quantizer reads them.

Rounding a merged weight to 4 bits again removes much of a small update. The export measures how much is left, over all
updated weights together: the share of the update D in the result, and the rounding noise:

    share = <Q(W + D) - W, D> / <D, D>        noise = ||Q(W + D) - W - share D|| / ||D||
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onecard.config import BNB_TYPES, NESTED_BLOCKSIZE, QuantConfig
from onecard.errors import UserError
from onecard.export.folder import Shapes, check_room, new_folder, write_others
from onecard.export.merge.experts import matrix_key, part_in_4bit
from onecard.export.merge.merged import Base, Merged, open_merged, write_tensor
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.load import find_checkpoint
from onecard.hf.quantizer import BitsAndBytesConfig
from onecard.hf.writer import TensorFile
from onecard.kernels import ops
from onecard.kernels.dequantize import dequantize_part
from onecard.nn.linears import skipped_names
from onecard.quant.scales import state_absmax
from onecard.quant.state import STATE_KEY, PackedWeight, QuantState, to_bnb

STATE_BYTES = 256  # of a weight's JSON, padded with spaces


@dataclass
class Kept:
    """How much of the adapter's updates is left after rounding to 4 bits."""

    along: float = 0.0  # <found, D>
    whole: float = 0.0  # <D, D>
    found: float = 0.0  # <found, found>

    @property
    def share(self) -> float | None:
        """Return the share; None if there was no update."""
        return self.along / self.whole if self.whole else None

    @property
    def noise(self) -> float | None:
        return max(self.found / self.whole - (self.along / self.whole) ** 2, 0.0) ** 0.5 if self.whole else None

    def add(self, merged: Merged, name: str, packed: Tensor, state: QuantState, expert: int | None = None) -> None:
        """Args: packed, state: the 4-bit result of the tensor, or of the whole stack that holds `expert`'s matrix."""
        update, skip, place = merged.adapter.updates.get(matrix_key(name, expert)), 0, merged.experts.places.get(name)
        if update is None:
            return
        if place is not None:
            packed, state, skip = part_in_4bit(packed, state, place, expert)
        weight, absmax = PackedWeight.of(packed, state), state_absmax(state)
        for start, W in merged.base_slabs(name, expert):
            D = update.add_to(W, start) - W
            found = dequantize_part(weight, absmax, skip + start * W.shape[1], W.numel()).view_as(W) - W
            self.along += (found * D).sum(dtype=torch.float64).item()
            self.whole += D.square().sum(dtype=torch.float64).item()
            self.found += found.square().sum(dtype=torch.float64).item()


def quantize_checkpoint(model: str, output: str, quant: QuantConfig) -> Path:
    """Write a folder with the model's linears and experts in 4 bits. Return its path.

    Args:
        quant: its compute_dtype becomes config.json's bnb_4bit_compute_dtype; "auto": bfloat16.

    Raises:
        UserError: a checkpoint that is not in 16 or 32 bits; int4 or mxfp4; no room on the disk; an output that exists.
    """
    check_type(quant)
    if inspect_checkpoint(find_checkpoint(model)).is_4bit:
        raise UserError("the model must be in 16 or 32 bits", "4 bits", "use it as it is", model)
    merged, target = open_merged(model, None, "original"), Path(output)
    check_room(target, merged.nbytes // 2)
    with new_folder(target) as folder:
        write_quantized(merged, folder, quant)
    return target


def requantize(
    model: str,
    adapter: str,
    output: str,
    quant: QuantConfig,
    base: Base = "dequantized",
    trained: QuantConfig | None = None,
) -> tuple[Path, Kept]:
    """Merge an adapter into a base and write it in 4 bits. Return the folder, and how much of the update is left.

    Args:
        quant: how to quantize the result.
        base, trained: `base` and `quant` of `open_merged`.

    Raises:
        UserError: same as `open_merged` and `quantize_checkpoint`.
    """
    check_type(quant)
    merged, target = open_merged(model, adapter, base, trained), Path(output)
    check_room(target, merged.nbytes // 2)
    with new_folder(target) as folder:
        kept = write_quantized(merged, folder, quant)
    return target, kept


def check_type(quant: QuantConfig) -> None:
    if quant.quant_type not in BNB_TYPES:
        raise UserError("bitsandbytes' format holds nf4 and fp4", quant.quant_type, "choose one of them", "quant_type")


def write_quantized(merged: Merged, folder: Path, quant: QuantConfig) -> Kept:
    """Write a whole checkpoint with linears and experts in 4 bits. Return how much of the adapter's update is left."""
    return Writer4bit(merged, folder, quant).finish()


class Writer4bit:
    """The files of a checkpoint with linears and experts in 4 bits, named like the base's.

    Attributes:
        left: the merged tensors, or stacks of experts, that are not written yet, with the file of each.
    """

    def __init__(self, merged: Merged, folder: Path, quant: QuantConfig):
        self.merged, self.folder, self.quant, self.kept = merged, folder, quant, Kept()
        self.left: dict[str, str] = {}
        self.places: dict[str, str] = {}
        self.files: dict[str, TensorFile] = {}
        stacked = merged.experts.places
        for file, names in merged.files():
            found = dict.fromkeys(stacked[name].stack if name in stacked else name for name in names)
            names = [name for name in found if name not in self.left]  # experts' tensors may be in several files
            shapes: Shapes = {}
            for name in names:
                shapes |= result_shapes(merged, name, quant)
            if names:
                self.files[file] = TensorFile(folder / file, shapes)
                self.left |= dict.fromkeys(names, file)
                self.places |= dict.fromkeys(shapes, file)

    def add(self, name: str, packed: Tensor, state: QuantState) -> None:
        """Write a linear's weight or a stack that is quantized already."""
        append_4bit(self.files[self.left.pop(name)], name, packed, state)

    def finish(self) -> Kept:
        """Write the weights that are left, rounded to nearest, and the other files. Return how much of the adapter's
        update is left in them."""
        for name, file in self.left.items():
            write_weight(self.files[file], self.merged, name, self.quant, self.kept)
        for file in self.files.values():
            file.close()
        before = self.merged.checkpoint.config.get("quantization_config") or {}
        quant = self.quant
        stored = BitsAndBytesConfig(
            bnb_4bit_quant_type=quant.quant_type,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype="bfloat16" if quant.compute_dtype == "auto" else quant.compute_dtype,
            llm_int8_skip_modules=before.get("llm_int8_skip_modules") or skipped_names(self.merged.model.modules),
        )
        config = {**self.merged.config, "quantization_config": stored.to_dict()}
        write_others(self.folder, self.merged.checkpoint, config, self.places, self.merged.adapter.folder)
        return self.kept


def result_shapes(merged: Merged, name: str, quant: QuantConfig) -> Shapes:
    """Return the shapes of the tensors that store a weight, in 4 bits if it is a linear's or a stack."""
    if name in merged.experts.stacks:
        return quantized_shapes(name, tuple(merged.experts.stacks[name].weight.shape), quant)
    if name in merged.linears:
        return quantized_shapes(name, merged.matrix_shape(name), quant)
    return {name: merged.shapes[name]}


def write_weight(file: TensorFile, merged: Merged, name: str, quant: QuantConfig, kept: Kept) -> None:
    """Write one weight of the result, and add how much of its update is left to `kept`."""
    how = (quant.quant_type, quant.blocksize, quant.double_quant)
    if name in merged.experts.stacks:
        packed, state = ops.quantize_stack(merged.stack(name), merged.experts.stacks[name].weight.shape, *how, name)
        append_4bit(file, name, packed, state)
        for expert, parts in merged.experts.parts(name):
            for number in range(state.shape[0]) if expert is None else [None]:
                for part in parts:
                    kept.add(merged, part, packed, state, number)
    elif name in merged.linears:
        packed, state = ops.quantize_4bit(merged.matrix(name), *how, name)
        append_4bit(file, name, packed, state)
        kept.add(merged, name, packed, state)
    else:
        write_tensor(file, merged, name)


def append_4bit(file: TensorFile, name: str, packed: Tensor, state: QuantState) -> None:
    """Write the tensors that store a 4-bit weight."""
    for suffix, tensor in to_bnb(packed, state).items():
        file.append(name + suffix, tensor)
        if STATE_KEY in suffix:
            file.append(name + suffix, b" " * (STATE_BYTES - tensor.numel()))


def quantized_shapes(name: str, shape: tuple[int, ...], quant: QuantConfig) -> Shapes:
    """Return the dtype and shape of each tensor that stores a 4-bit weight of this shape."""
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
