"""GPTQ and AWQ checkpoints: merged weights, calibrated layer by layer, streamed into files named like the base's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from onecard.config import CalibrationConfig, Data, DataConfig, QuantConfig, make_config
from onecard.data.chat.template import set_template
from onecard.data.dataset import Dataset
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.export.calibrated import awq, gptq
from onecard.export.calibrated.calibration import calibrate, first_batches
from onecard.export.calibrated.check import check_layers
from onecard.export.calibrated.layers import LayeredModel
from onecard.export.folder import Shapes, check_room, new_folder, write_others
from onecard.export.merge.merged import Base, Merged, num_bytes, open_merged, write_tensor
from onecard.hf.load import load_tokenizer, pick_device
from onecard.hf.stored import FLOAT_DTYPES
from onecard.hf.writer import TensorFile

Format = Literal["gptq", "awq"]
METHODS: dict[str, Any] = {"gptq": gptq, "awq": awq}
GROUP_SIZES = (128, 64, 32)


def export_calibrated(
    format: Format,
    model: str,
    adapter: str | None,
    data: Data,
    output: str,
    config: CalibrationConfig,
    base: Base | None = None,
    quant: QuantConfig | None = None,
    on_data: Callable[[Dataset], None] | None = None,
) -> tuple[Path, list[str]]:
    """Write a 4-bit checkpoint in GPTQ's or AWQ's format.

    Args:
        data: the calibration examples.
        base, quant: same as in `open_merged`.
        on_data: called with the dataset after it is read.

    Returns:
        the folder; the linears of decoder layers that stay in 16 bits because their widths do not fit.

    Raises:
        UserError: same as `open_merged`, `load_dataset` and `calibrate`; experts, which would stay in 16 bits; no
            linear fits; no room on the disk; an output that exists.
    """
    method, target = METHODS[format], Path(output)
    device = pick_device(config.device)
    merged = open_merged(model, adapter, base, quant)
    if merged.experts.stacks:
        do = "merge it in 16 bits, or use quantize, which has experts in 4 bits"
        raise UserError(f"a model for {format} must be without experts", next(iter(merged.experts.stacks)), do, model)
    layered = LayeredModel(merged, device)
    linears = linears_of(layered.layers)
    config = config.model_copy(update={"group_size": pick_group_size(linears, config.group_size)})
    fitting = {n: m for n, m in linears.items() if m.out_features % 8 == 0 and m.in_features % config.group_size == 0}
    if not fitting:
        raise UserError("a linear's width must be a multiple of 32", "none is", "export another format", model)
    shapes = result_shapes(merged, fitting, method, config.group_size)
    check_room(target, num_bytes(shapes))
    dataset = read_rows(merged.checkpoint.folder, merged.adapter.folder, data, config, on_data)
    left_out = [name for name in linears if name not in fitting]
    with new_folder(target) as folder:
        writer = Writer(folder, merged, shapes)
        check_layers(layered, dataset.examples)
        shape = (config.max_seq_length, layered.is_packed)
        chosen, _ = first_batches(dataset.examples, *shape, config.num_rows)
        for layer in calibrate(layered, layered.first_rows(chosen)):
            names = {n.removeprefix(f"{layer.name}.") for n in fitting if n.startswith(f"{layer.name}.")}
            for name, tensor in method.quantize_layer(layer, names, config):
                writer.write(f"{layer.name}.{name}", tensor)
        writer.copy_others()
        quantization = method.quantization_config(config, list(fitting), left_out)
        full_config = {**merged.config, "quantization_config": quantization}
        write_others(folder, merged.checkpoint, full_config, writer.places, merged.adapter.folder)
        if format == "gptq":
            (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=2) + "\n", encoding="utf-8")
    return target, left_out


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


def lines_of(format: str, folder: Path, left_out: list[str]) -> list[str]:
    """Return the lines that say what was written and how to use it."""
    said = [f"exported {folder}  ({format}, 4 bits)"]
    if left_out:
        said.append(f"16-bit   {', '.join(left_out)}: their widths are no multiples of a group")
    loading = "  AutoModelForCausalLM.from_pretrained(...): pip install gptqmodel optimum"
    return [*said, "next", f"  vllm serve {folder}", loading]


def linears_of(layers: dict[str, nn.Module]) -> dict[str, nn.Linear]:
    """Return all linears of decoder layers, by name in the model."""
    modules = {f"{name}.{key}": m for name, layer in layers.items() for key, m in layer.named_modules()}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}


def pick_group_size(linears: dict[str, nn.Linear], largest: int) -> int:
    """Return the group size that divides the widths of most linears, up to `largest`; in a tie, the larger size."""
    sizes = [size for size in GROUP_SIZES if size <= largest]
    return max(sizes, key=lambda size: (sum(m.in_features % size == 0 for m in linears.values()), size))


def result_shapes(merged: Merged, linears: dict[str, nn.Linear], method: Any, group_size: int) -> Shapes:
    """Return the dtype and shape of every tensor of the result."""
    found: Shapes = {}
    for name, (dtype, shape) in merged.shapes.items():
        module = name.removesuffix(".weight")
        if module in linears:
            found |= {f"{module}.{key}": value for key, value in method.shapes(*shape, group_size).items()}
        else:
            found[name] = (dtype, shape)
    return found


class Writer:
    """The result's safetensors files: they have the base's names, and a tensor stays in its file."""

    def __init__(self, folder: Path, merged: Merged, shapes: Shapes):
        self.merged, self.shapes = merged, shapes
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
