"""Folders in few bits: merged weights, quantized matrix by matrix, streamed into files named like the base's.

With data, the decoder layers run one after another on its rows, and codes are chosen for their outputs (GPTQ, AWQ).
Without, and for experts that saw too few tokens, each weight gets the nearest code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onecard.adapter.origin import trained_for
from onecard.config import CALIBRATED, CalibrationConfig, Data, DataConfig, Folder, QuantConfig, make_config
from onecard.data.chat.template import set_template
from onecard.data.dataset import Dataset
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.export.calibrated import mlx
from onecard.export.calibrated.awq import AWQ
from onecard.export.calibrated.calibration import Layer, calibrate, first_batches
from onecard.export.calibrated.check import check_layers
from onecard.export.calibrated.compressed import FP8, NVFP4, W4A16
from onecard.export.calibrated.gptq import GPTQ
from onecard.export.calibrated.layers import LayeredModel
from onecard.export.calibrated.routed import quantize_experts
from onecard.export.calibrated.storage import Calibrated, Storage
from onecard.export.folder import Shapes, check_room, new_folder, write_others
from onecard.export.merge.merged import Base, Merged, common_dtype, num_bytes, open_merged, write_tensor
from onecard.hf.load import load_tokenizer, pick_device
from onecard.hf.quantizer import check_finite
from onecard.hf.stored import FLOAT_DTYPES
from onecard.hf.writer import TensorFile
from onecard.quant.grouped import IN_LAYER, Grouped, pick_group_size

STORAGES: dict[Folder, Storage[Any]] = {
    "gptq": GPTQ(), "awq": AWQ(), "w4a16": W4A16(), "fp8": FP8(), "nvfp4": NVFP4(), "mlx": mlx.MLX()
}  # fmt: skip
ALONE = {  # formats without experts, and what to do
    "nvfp4": "choose fp8 or w4a16; transformers 5.23 reads experts of NVFP4 without their float32 scale",
    "mlx": "merge it, and let mlx_lm.convert join its experts",
}
Matrices = dict[str, tuple[int, int]]  # (N, K), by the module's name in the checkpoint


@dataclass
class Written:
    """A folder, the linears of decoder layers that stay in 16 bits because their widths do not fit, the experts that
    saw too few tokens, and notes for the user."""

    format: Folder
    folder: Path
    left_out: list[str]
    few: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the lines that say what was written and how to use it."""
        said = [f"exported {self.folder}  ({STORAGES[self.format].title})"]
        if self.left_out:
            said.append(f"16-bit   {', '.join(self.left_out)}: their widths are no multiples of a group")
        if self.few:
            more = f" and {len(self.few) - 8} more" if len(self.few) > 8 else ""
            said.append(f"nearest  too few tokens for {', '.join(self.few[:8])}{more}")
        said += [f"note     {note}" for note in self.notes]
        if self.format == "mlx":
            return [*said, "next", f"  mlx_lm.generate --model {self.folder} --prompt ..."]
        package = "gptqmodel optimum" if self.format in ("gptq", "awq") else "compressed-tensors"
        loading = f"  AutoModelForCausalLM.from_pretrained(...): pip install {package}"
        return [*said, "next", f"  vllm serve {self.folder}", loading]


def export_folder(
    format: Folder,
    model: str,
    adapter: str | None,
    data: Data | None,
    output: str,
    config: CalibrationConfig,
    base: Base | None = None,
    quant: QuantConfig | None = None,
    on_data: Callable[[Dataset], None] | None = None,
) -> Written:
    """Write a checkpoint's folder in a format of few bits.

    Args:
        data: the calibration examples; None: each weight gets the nearest code.
        base, quant: same as in `open_merged`.
        on_data: called with the dataset after it is read.

    Raises:
        UserError: same as `open_merged`, `read_rows` and `calibrate`; experts that the format cannot hold; no linear
            fits; no room on the disk; an output that exists.
    """
    storage, target = STORAGES[format], Path(output)
    device = pick_device(config.device)
    merged = open_merged(model, adapter, base, quant)
    matrices = matrices_of(merged)
    check_experts(merged, format, model)
    more, notes = mlx.model_fields(merged.model.modules.config) if format == "mlx" else ({}, [])
    if format in CALIBRATED and data is None and trained_for(adapter) != "gptq":
        notes = ["each weight has the nearest code; --data calibrates them, and keeps more of the model"]
    config = config.model_copy(
        update={"group_size": pick_group_size((K for _, K in matrices.values()), config.group_size)}
    )
    fitting = {n: s for n, s in matrices.items() if s[0] % 8 == 0 and s[1] % storage.width(config) == 0}
    if not fitting:
        raise UserError("a linear's width must be a multiple of 32", "none is", "export another format", model)
    left_out = [name for name in matrices if name not in fitting]
    experts = {name.removesuffix(".weight") for name in merged.experts.places}
    if not experts.isdisjoint(left_out):
        found = f"{left_out[0]} of shape {list(matrices[left_out[0]])}"
        do = "choose a smaller group_size, or another format"
        raise UserError("experts' widths must be multiples of a group", found, do, model)
    dtype = storage.scale_dtype(common_dtype(merged.shapes))
    shapes = result_shapes(merged, {name: storage.shapes(*shape, config, dtype) for name, shape in fitting.items()})
    check_room(target, num_bytes(shapes))
    how = Rounding(storage, merged, set(fitting), config, FLOAT_DTYPES.get(dtype, torch.float32))
    prepared = None
    if data is not None:
        layered = LayeredModel(merged, device)
        prepared = layered, read_rows(merged.checkpoint.folder, merged.adapter.folder, data, config, on_data)
    with new_folder(target) as folder:
        writer = Writer(folder, merged, shapes)
        if prepared is not None:
            for layer in calibrated_layers(*prepared, config):
                how.calibrated(layer, writer)
        how.nearest(writer)
        writer.copy_others()
        fields = storage.config_fields(config, list(fitting), in_16_bits(merged, fitting))
        write_others(
            folder, merged.checkpoint, {**merged.config, **fields, **more}, writer.places, merged.adapter.folder
        )
        if format == "gptq":
            text = json.dumps(fields["quantization_config"], indent=2)
            (folder / "quantize_config.json").write_text(text + "\n", encoding="utf-8")
    return Written(format, target, left_out, how.few, notes)


def calibrated_layers(layered: LayeredModel, dataset: Dataset, config: CalibrationConfig) -> Iterator[Layer]:
    """Yield the decoder layers in order, as `calibrate` does for the first rows of the data."""
    check_layers(layered, dataset.examples)
    shape = (config.max_seq_length, layered.is_packed)
    chosen, _ = first_batches(dataset.examples, *shape, config.num_rows)
    yield from calibrate(layered, layered.first_rows(chosen))


class Rounding:
    """How the weights of a folder become their stored tensors.

    Attributes:
        names: of the modules to quantize, in the checkpoint.
        dtype: of the scales.
        few: the experts that saw too few tokens.
    """

    def __init__(
        self, storage: Storage[Any], merged: Merged, names: set[str], config: CalibrationConfig, dtype: torch.dtype
    ):
        self.storage, self.merged, self.names, self.config, self.dtype = storage, merged, names, config, dtype
        self.few: list[str] = []

    def calibrated(self, layer: Layer, writer: Writer) -> None:
        """Write a layer's linears, what changes with them, and its experts."""
        assert isinstance(self.storage, Calibrated), "config/export.py takes data for no other format"
        modules = [f"{layer.name}.{name}" for name, _ in layer.module.named_modules()]
        names = {n.removeprefix(f"{layer.name}.") for n in modules if self.module_of(n) in self.names}
        for name, found in self.storage.quantize_layer(layer, names, self.config, self.dtype):
            if isinstance(found, Grouped):
                self.write(writer, self.module_of(f"{layer.name}.{name}"), found)
            else:
                writer.write(self.stored(f"{layer.name}.{name}"), found)
        method = (self.storage, self.config, self.dtype)
        matrices, few = quantize_experts(layer, self.merged.experts, *method)
        for name, found in matrices:
            self.write(writer, name.removesuffix(".weight"), found)
        self.few += few

    def nearest(self, writer: Writer) -> None:
        """Write the matrices that are left, rounded to the nearest codes."""
        left = [name for name in self.merged.shapes if name.removesuffix(".weight") in self.names - writer.written]
        parents: dict[str, list[str]] = {}
        for name in left:
            parents.setdefault(name.rsplit(".", 2)[0], []).append(name)
        for names in parents.values():
            peak = 0.0
            if self.storage.shares_scale:
                peak = max(slab.abs().max().item() for name in names for slab in self.merged.slabs(name))
            for name in names:
                W_NK = self.merged.read(name).float()
                check_finite(name, W_NK)
                self.write(
                    writer, name.removesuffix(".weight"), self.storage.nearest(W_NK, self.config, self.dtype, peak)
                )

    def write(self, writer: Writer, module: str, found: Any) -> None:
        """Write the tensors of a matrix."""
        for key, tensor in self.storage.tensors(found).items():
            writer.write(f"{module}.{key}", tensor)
        writer.written.add(module)

    def stored(self, name: str) -> str:
        """Return the checkpoint's name of a tensor of the model."""
        return self.merged.model.stored.get(name, name)

    def module_of(self, name: str) -> str:
        """Return the checkpoint's name of a linear of the model."""
        return self.stored(f"{name}.weight").removesuffix(".weight")


def check_experts(merged: Merged, format: Folder, model: str) -> None:
    """Raise UserError for experts that the format cannot hold."""
    places = merged.experts.places
    whole = next((name for name, place in places.items() if place.expert is None), None)
    do = "merge it in 16 bits, or use quantize, which has experts in 4 bits"
    if whole is not None:
        must = f"experts for {format} must be tensors of their own in the checkpoint"
        raise UserError(must, f"{whole}, which has all of a layer", do, model)
    if format in ALONE and places:
        raise UserError(f"a model for {format} must be without experts", next(iter(places)), ALONE[format], model)


def matrices_of(merged: Merged) -> Matrices:
    """Return the linears and experts' matrices of decoder layers."""
    names = [name for name in merged.shapes if name in merged.linears or name in merged.experts.places]
    found = {name: merged.shapes[name][1] for name in names if name not in merged.turned and IN_LAYER.search(name)}
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in found.items() if len(shape) == 2}


def in_16_bits(merged: Merged, fitting: Matrices) -> list[str]:
    """Return the matrices that a reader might expect in few bits and are not: linears by their name in the model and in
    the checkpoint, and the others of decoder layers, such as routers."""
    own = {f"{name}.weight" for name, m in merged.model.modules.named_modules() if isinstance(m, nn.Linear)}
    both = [name for weight in sorted(own) for name in (weight, merged.model.stored.get(weight, weight))]
    both += [name for name, (_, shape) in merged.shapes.items() if len(shape) == 2 and IN_LAYER.search(name)]
    quantized = {f"{name}.weight" for name in fitting}
    quantized |= {name for name, stored in merged.model.stored.items() if stored in quantized}
    return [n.removesuffix(".weight") for n in dict.fromkeys(both) if n.endswith(".weight") and n not in quantized]


def read_rows(
    model: str | Path,
    adapter: str | Path | None,
    data: Data,
    config: CalibrationConfig,
    on_data: Callable[[Dataset], None] | None,
) -> Dataset:
    """Read examples to calibrate on or to compare, with the adapter's tokenizer. `on_data` is called with them."""
    shared = CalibrationConfig.model_fields.keys() & DataConfig.model_fields.keys()
    reading = make_config(DataConfig, config.model_dump(include=set(shared)), "export")
    tokenizer = load_tokenizer(str(model), adapter)
    set_template(tokenizer, config.chat_template, config.template_variables)
    dataset = load_dataset(data, tokenizer, reading)
    if on_data:
        on_data(dataset)
    return dataset


def result_shapes(merged: Merged, quantized: dict[str, Shapes]) -> Shapes:
    """Return the dtype and shape of every tensor of the result. `quantized`: those of each module in few bits."""
    found: Shapes = {}
    for name, value in merged.shapes.items():
        module = name.removesuffix(".weight")
        own = quantized.get(module)
        found |= {name: value} if own is None else {f"{module}.{key}": stored for key, stored in own.items()}
    return found


class Writer:
    """The result's safetensors files: they have the base's names, and a tensor stays in its file.

    Attributes:
        written: the modules whose matrix is in few bits and written.
    """

    def __init__(self, folder: Path, merged: Merged, shapes: Shapes):
        self.merged, self.shapes = merged, shapes
        self.written: set[str] = set()
        files = {name: file for file, names in merged.files() for name in names}
        source = {name: name if name in merged.shapes else f"{name.rpartition('.')[0]}.weight" for name in shapes}
        self.places = {name: files[old] for name, old in source.items()}
        self.left = dict.fromkeys(shapes)
        self.files = {
            file: TensorFile(folder / file, {n: shapes[n] for n in shapes if self.places[n] == file})
            for file in dict.fromkeys(self.places.values())
        }

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that differs from the merged one."""
        self.files[self.places[name]].append(
            name, tensor.to("cpu", FLOAT_DTYPES.get(self.shapes[name][0], tensor.dtype))
        )
        del self.left[name]

    def copy_others(self) -> None:
        """Write the unchanged merged tensors, then close the files."""
        for name in self.left:
            write_tensor(self.files[self.places[name]], self.merged, name)
        for file in self.files.values():
            file.close()
