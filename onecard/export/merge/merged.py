"""An adapter merged into 16-bit weights, streamed tensor by tensor: memory for about one tensor, not for two models.

    W' = W + s B A        DoRA: W' = m (W + s B A) / ||W + s B A||, norms of rows (arXiv 2402.09353)

By default W is the dequantized 4-bit weight of every linear that training quantized. "original" uses the checkpoint's
own weights, which training did not use. A linear that training keeps in the checkpoint's few bits has one form of its
values, dequantized to 16 bits. Sums are float32, rounded once to the checkpoint's dtype. Rounding to 4 bits
again would undo most of the update, so the result is 16-bit. The output has the base's file names; its folder has a
temporary name until it is complete. Experts are merged matrix by matrix (experts.py). Tensors have the checkpoint's
names, which transformers may change at load (hf/names.py). A Conv1D's matrix is transposed there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from onecard.adapter.head import labels_beside
from onecard.adapter.origin import check_sample, read_origin, stored_as
from onecard.adapter.update import Adapter, read_adapter
from onecard.config import QuantConfig
from onecard.errors import UserError
from onecard.export.ends import Ends, saved_tensors, with_head
from onecard.export.folder import Shapes, check_room, new_folder, write_others
from onecard.export.merge.experts import Experts, matrix_info, matrix_key, part_in_4bit
from onecard.hf.checkpoint import Checkpoint, inspect_checkpoint
from onecard.hf.load import find_checkpoint
from onecard.hf.skeleton import Model, read_model, stored_dtype
from onecard.hf.stored import DTYPE_BITS, FLOAT_DTYPES, read_tensor
from onecard.hf.writer import TensorFile
from onecard.kernels import ops
from onecard.kernels.dequantize import dequantize_part
from onecard.nn.experts import turns
from onecard.nn.grid import slab_rows
from onecard.quant.mxfp4 import SCALES, from_mxfp4
from onecard.quant.scales import state_absmax
from onecard.quant.state import BNB_KEYS, STATE_KEY, PackedWeight, QuantState, from_bnb, read_facts

Base = Literal["dequantized", "original"]
NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
SUFFIXES = tuple(f".{key}" for key in BNB_KEYS)


@dataclass(frozen=True)
class Merged:
    """A base and an adapter as one 16-bit checkpoint, computed tensor by tensor on request.

    Attributes:
        config: the result's config.json.
        shapes: by tensor of the result: dtype in safetensors' spelling, shape.
    """

    checkpoint: Checkpoint
    model: Model
    adapter: Adapter
    quant: QuantConfig
    config: dict[str, Any]
    shapes: Shapes
    rounded: set[str]  # weights that are first rounded to 4 bits
    full: dict[str, Tensor]  # tensors that replace the base's
    linears: set[str]  # weights that training has in 4 bits
    turned: set[str]  # weights that are (K, N) in the checkpoint, not (N, K)
    experts: Experts
    mxfp4: set[str]  # stacked weights that the checkpoint has in MXFP4

    @property
    def nbytes(self) -> int:
        return num_bytes(self.shapes)

    def files(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each of the base's file names with its tensors of the result. New tensors are in the last file."""
        infos, files = self.checkpoint.tensors, self.checkpoint.files
        for file in files:
            names = [n for n in self.shapes if (infos[n].file == file if n in infos else file == files[-1])]
            if file.suffix != ".gguf":
                yield file.name, names
            else:
                yield "model.safetensors" if len(files) == 1 else file.with_suffix(".safetensors").name, names

    def read(self, name: str) -> Tensor:
        """Return one whole tensor of the result."""
        if self.as_stored(name):
            return read_tensor(self.checkpoint.tensors[name])
        return torch.cat([slab.reshape(-1) for slab in self.slabs(name)]).view(self.shapes[name][1])

    def matrix(self, name: str) -> Tensor:
        """Return a linear's whole weight of the result, (N, K)."""
        W = self.read(name)
        return W.T.contiguous() if name in self.turned else W

    def slabs(self, name: str) -> Iterator[Tensor]:
        """Yield consecutive rows of one tensor of the result."""
        if name in self.full:
            yield self.full[name].to(FLOAT_DTYPES[self.shapes[name][0]])
        elif self.as_stored(name):
            yield read_tensor(self.checkpoint.tensors[name])
        elif name in self.turned:
            yield torch.cat(list(self.matrix_slabs(name, None))).T
        else:
            for expert in range(self.shapes[name][1][0]) if self.experts.is_stack(name) else [None]:
                yield from self.matrix_slabs(name, expert)

    def matrix_slabs(self, name: str, expert: int | None) -> Iterator[Tensor]:
        """Yield consecutive rows of a matrix of the result: a weight, or `expert`'s of a stacked tensor."""
        update = self.adapter.updates.get(matrix_key(name, expert))
        for start, piece in self.base_slabs(name, expert):
            piece = piece if update is None else update.add_to(piece, start)
            yield piece.to(FLOAT_DTYPES[self.shapes[name][0]])

    def as_stored(self, name: str) -> bool:
        """Whether the result has a tensor's values of the base unchanged."""
        key = matrix_key(name, 0 if self.experts.is_stack(name) else None)
        return name not in self.full and name not in self.rounded and key not in self.adapter.updates

    def base_slabs(self, name: str, expert: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield a matrix of the base, (N, K), in float32: the number of the first row, and some rows."""
        N, K = self.matrix_shape(name)
        rows = slab_rows(K)
        if name not in self.rounded:
            W = self.original(name, expert)
            yield from ((start, W[start : start + rows].float()) for start in range(0, N, rows))
            return
        packed, state, skip = self.in_4bit(name, expert)
        weight, absmax = PackedWeight.of(packed, state), state_absmax(state)
        if expert is not None and turns(self.experts.is_transposed(name), state.quant_type):
            W = dequantize_part(weight, absmax, skip, N * K).view(K, N).T
            yield from ((start, W[start : start + rows]) for start in range(0, N, rows))
            return
        for start in range(0, N, rows):
            count = min(rows, N - start) * K
            yield start, dequantize_part(weight, absmax, skip + start * K, count).view(-1, K)

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """Return (N, K) of a weight, or of a stacked tensor's matrices."""
        shape = self.shapes[name][1][-2:]
        return shape[::-1] if name in self.turned else shape

    def original(self, name: str, expert: int | None = None) -> Tensor:
        """Return a matrix of a 16-bit base with its stored values, (N, K)."""
        info = self.checkpoint.tensors[name]
        W = read_tensor(info if expert is None else matrix_info(info, expert))
        return W.T.contiguous() if name in self.turned else W

    def in_4bit(self, name: str, expert: int | None = None) -> tuple[Tensor, QuantState, int]:
        """Return codes and state that contain a matrix as training had it, and how many weights in them precede it."""
        info, place, quant = self.checkpoint.tensors[name], self.experts.places.get(name), self.quant
        how = (quant.quant_type, quant.blocksize, quant.double_quant)
        if place is not None:
            load = read_mxfp4 if name in self.mxfp4 else read_4bit
            read = (lambda: load(self.checkpoint, name)) if info.dtype == "U8" else None
            return part_in_4bit(*self.experts.in_4bit(place.stack, how, read), place, expert)
        if info.dtype == "U8":
            return *read_4bit(self.checkpoint, name), 0
        return *ops.quantize_4bit(self.original(name), *how, name), 0

    def stack(self, name: str) -> Iterator[Tensor]:
        """Yield the matrices of a stacked weight of the result, in its order."""
        for expert, parts in self.experts.parts(name):
            if expert is None:
                numbers = range(self.shapes[parts[0]][1][0])
                yield from (torch.cat(list(self.matrix_slabs(parts[0], number))) for number in numbers)
            else:
                yield torch.cat([self.read(part) for part in parts])


def num_bytes(shapes: Shapes) -> int:
    """Return the number of bytes of tensors with these dtypes and shapes."""
    return sum(DTYPE_BITS[dtype] // 8 * prod(shape) for dtype, shape in shapes.values())


def open_merged(model: str, adapter: str | None, base: Base | None = None, quant: QuantConfig | None = None) -> Merged:
    """Return the merge of the checkpoint `model` and a trained adapter, which may be None.

    Args:
        model: the checkpoint that the adapter was trained on, in 16 bits or in bitsandbytes' 4-bit format.
        base: the weights to add to: "dequantized", as in training, or "original", as in the checkpoint. None:
            "original" for a 16-bit checkpoint without an adapter, else "dequantized". Experts in MXFP4 are the same in
            both.
        quant: how training quantized a 16-bit base; None: as the adapter's folder records, or the defaults.

    Raises:
        UserError: an adapter of another model, over another quantization or of an unknown kind; "original" with a
            checkpoint that has no original weights; a model whose linears are not tensors of the checkpoint.
    """
    checkpoint = replace(inspect_checkpoint(find_checkpoint(model)), labels=labels_beside(adapter))
    base = base or ("dequantized" if adapter is not None or checkpoint.is_4bit else "original")
    if checkpoint.is_4bit and base == "original":
        found = "a checkpoint in 4 bits"
        raise UserError("the original weights must be in the checkpoint", found, "use the dequantized ones", model)
    known = read_model(checkpoint)
    known.check_stored(checkpoint)
    tuned = read_adapter(Path(adapter)).renamed(known.stored) if adapter is not None else Adapter()
    ends = Ends.of(known)
    checkpoint = ends.with_true_ties(replace(checkpoint, tensors=checkpoint.weights))
    if checkpoint.labels and adapter is not None:
        checkpoint = with_head(checkpoint, ends, Path(adapter))
    turned, experts = turned_weights(known), Experts.of(checkpoint, known)
    packed = {name for name, place in experts.places.items() if place.stack in known.mxfp4}
    shapes = stored_shapes(checkpoint, turned) | packed_shapes(checkpoint, experts, packed)
    experts.spread(tuned)
    check_belongs(tuned, shapes, turned, checkpoint.folder)
    owners = {name: own for own, name in known.stored.items()}
    linears = {name for name in shapes if checkpoint.tensors[name].dtype == "U8"} - set(experts.places)
    if not checkpoint.is_4bit:
        linears = {known.stored[own] for own in known.linears}
    quant = trained_over(checkpoint, known, {owners.get(name, name) for name in linears}, adapter, quant)
    rounded = linears | set(experts.places) if base == "dequantized" else packed
    rounded -= {known.stored[name] for name in known.kept}
    full, config = saved_tensors(tuned, checkpoint, shapes, ends)
    for name, tensor in full.items():
        dtype = shapes[name][0] if name in shapes else common_dtype(shapes)
        shapes[name] = (dtype, tuple(tensor.shape))
    return Merged(checkpoint, known, tuned, quant, config, shapes, rounded, full, linears, turned, experts, packed)


def turned_weights(known: Model) -> set[str]:
    """Return the names of the checkpoint's tensors that are a Conv1D's weight, whose rows are inputs."""
    named = known.modules.named_modules()
    own = [f"{name}.weight" for name, module in named if isinstance(module, Conv1D)]
    return {known.stored[name] for name in own if name in known.stored}


def trained_over(
    checkpoint: Checkpoint, known: Model, linears: set[str], adapter: str | None, quant: QuantConfig | None
) -> QuantConfig:
    """Return how training quantized the base. `linears` are the model's names.

    Raises:
        UserError: the quantization or the base differs from what the adapter's folder records.
    """
    fields = {} if quant is None else quant.model_dump()
    if checkpoint.is_4bit:
        state = read_4bit(checkpoint, known.stored[min(linears)])[1]
        fields |= {"quant_type": state.quant_type, "blocksize": state.blocksize, "double_quant": state.nested}
    found, origin = stored_as(adapter, fields), read_origin(adapter) if adapter is not None else None
    if origin is not None and adapter is not None:
        check_sample(checkpoint, known.modules, linears, origin, adapter)
    return found


def stored_shapes(checkpoint: Checkpoint, turned: set[str]) -> Shapes:
    """Return the dtype and shape of each tensor of a checkpoint before its quantization, without those of MXFP4."""
    shapes: Shapes = {}
    for name, info in checkpoint.tensors.items():
        if f"{name}.absmax" in checkpoint.tensors:
            states = {suffix: checkpoint.tensors.get(name + suffix) for suffix in SUFFIXES if STATE_KEY in suffix}
            facts = read_facts(name, {suffix: read_tensor(state) for suffix, state in states.items() if state})
            shape = tuple(facts.shape)[::-1] if name in turned else tuple(facts.shape)
            shapes[name] = (NAMES[getattr(torch, facts.dtype)], shape)
        elif not (checkpoint.is_4bit and name.endswith(SUFFIXES)) and not (checkpoint.is_mxfp4 and info.dtype == "U8"):
            shapes[name] = (info.dtype, info.shape)
    return shapes


def read_4bit(checkpoint: Checkpoint, name: str) -> tuple[Tensor, QuantState]:
    """Read the codes and state of a weight of a bitsandbytes checkpoint."""
    infos = {suffix: checkpoint.tensors.get(name + suffix) for suffix in ("", *SUFFIXES)}
    return from_bnb(name, {suffix: read_tensor(info) for suffix, info in infos.items() if info is not None})


def packed_shapes(checkpoint: Checkpoint, experts: Experts, packed: set[str]) -> Shapes:
    """Return the dtype and shape of stacked weights in MXFP4 once they are dequantized: those of the model."""
    dtype = NAMES[stored_dtype(checkpoint.folder)]
    return {name: (dtype, tuple(experts.stacks[experts.places[name].stack].weight.shape)) for name in packed}


def read_mxfp4(checkpoint: Checkpoint, name: str) -> tuple[Tensor, QuantState]:
    """Read the codes and state of a stacked weight in MXFP4, (E, N, K)."""
    blocks, scales = (read_tensor(checkpoint.tensors[name + suffix]) for suffix in ("", SCALES))
    return from_mxfp4(name, blocks, scales)


def common_dtype(shapes: Shapes) -> str:
    """Return the dtype of most of a checkpoint's float tensors."""
    return Counter(dtype for dtype, _ in shapes.values() if dtype in FLOAT_DTYPES).most_common(1)[0][0]


def merge(model: str, adapter: str, output: str, base: Base | None = None, quant: QuantConfig | None = None) -> Path:
    """Write a 16-bit checkpoint with the adapter merged. Return its folder. Arguments are the same as in `open_merged`.

    Raises:
        UserError: no room on the disk; an output folder that exists; same as `open_merged`.
    """
    merged, target = open_merged(model, adapter, base, quant), Path(output)
    check_room(target, merged.nbytes)
    with new_folder(target) as folder:
        write_merged(merged, folder)
    return target


def write_merged(merged: Merged, folder: Path) -> None:
    """Write a whole checkpoint into an existing folder."""
    places: dict[str, str] = {}
    for file_name, names in merged.files():
        file = TensorFile(folder / file_name, {name: merged.shapes[name] for name in names})
        for name in names:
            write_tensor(file, merged, name)
        file.close()
        places |= dict.fromkeys(names, file_name)
    write_others(folder, merged.checkpoint, merged.config, places, merged.adapter.folder)


def write_tensor(file: TensorFile, merged: Merged, name: str) -> None:
    """Write one tensor of the result, some rows at a time."""
    info = merged.checkpoint.tensors.get(name)
    if info is not None and info.form is None and merged.as_stored(name):
        file.copy(name, info)
        return
    for slab in merged.slabs(name):
        file.append(name, slab)


def check_belongs(adapter: Adapter, shapes: Shapes, turned: set[str], folder: Path) -> None:
    """Raise UserError unless every update has a weight of its shape."""
    for name, update in adapter.updates.items():
        shape = (update.B_NR.shape[0], update.A_RK.shape[1])
        dtype, found = shapes.get(name.partition("[")[0], (None, None))
        found = found and found[-2:]  # a stacked tensor's matrices
        found = found[::-1] if found and name in turned else found
        if found != shape or dtype not in FLOAT_DTYPES:
            raise UserError(
                f"the model must have the adapter's {name} of shape {list(shape)}",
                "no such tensor" if found is None else f"{dtype} {list(found)}",
                "use the model that the adapter was trained on",
                str(folder),
            )
