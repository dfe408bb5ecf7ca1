"""The importance of a matrix's inputs: the mean of each one's squares on the user's rows, llama.cpp's imatrix.

    importance[k] = (sum over tokens of x[k]^2) / tokens

A block's scale is chosen for the least sum of importance[k] (w[k] - w'[k])^2, which is the expected squared error of
the output if inputs are not correlated. The statistics are collected one decoder layer at a time, with the adapter
merged in. Embedding and head have none, as in llama.cpp. Its files (tools/imatrix) hold for each tensor `in_sum2`,
(K,) or (E, K), and `counts` of tokens, (1,) or (E, 1), in F32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import torch
from torch import Tensor

from onecard.config import ExportConfig
from onecard.data.dataset import Dataset
from onecard.errors import UserError
from onecard.export.calibrated.calibration import calibrate, count_tokens, first_batches
from onecard.export.calibrated.check import check_layers
from onecard.export.calibrated.experts import RoutedExperts
from onecard.export.calibrated.layers import LayeredModel
from onecard.export.calibrated.writer import read_rows
from onecard.export.folder import check_room, new_file
from onecard.export.gguf.architecture import Architecture
from onecard.export.merge.merged import Merged
from onecard.hf.gguf.header import Header, read_header
from onecard.hf.load import pick_device

SUMS, COUNTS = ".in_sum2", ".counts"
HOW = "make it with llama-imatrix of 2025 or later, or give --data"
Source = Callable[[Merged, Architecture], "Importance"]


@dataclass
class Importance:
    """Sums of squared inputs by tensor of the GGUF file, float32 (E, K), and numbers of tokens, (E,). E is 1 for a
    matrix that is not an expert's.

    Attributes:
        origin: where they come from, for the user.
        chunks, chunk_tokens: number of rows, and their length.
    """

    origin: str
    chunks: int
    chunk_tokens: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def of(self, name: str, shape: tuple[int, ...]) -> list[Tensor | None]:
        """Return the importance of the inputs of each of a tensor's matrices, (K,); None where no token came.

        Raises:
            UserError: the statistics are of another shape.
        """
        num_matrices = shape[0] if len(shape) == 3 else 1
        if name not in self.sums:
            if name.startswith("blk."):
                self.missing.append(name)
            return [None] * num_matrices
        sums, counts = self.sums[name], self.counts[name]
        if tuple(sums.shape) != (num_matrices, shape[-1]):
            must = f"an importance matrix must have {num_matrices} x {shape[-1]} inputs of {name}"
            raise UserError(must, " x ".join(map(str, sums.shape)), "use one that was made of this model", self.origin)
        self.missing += [f"{name}, expert {i}" for i in range(num_matrices) if counts[i] == 0]
        return [total / count if count else None for total, count in zip(sums, counts)]

    def notes(self) -> Iterator[str]:
        """Yield what to tell the user, after `of` was called for all tensors."""
        yield f"importance of inputs from {self.origin}"
        if self.missing:
            few = ", ".join(self.missing[:8]) + (f" and {len(self.missing) - 8} more" if len(self.missing) > 8 else "")
            yield f"without importance, which has no tokens for them: {few}"

    def write(self, file: Path) -> None:
        """Write llama.cpp's file."""
        writer = gguf.GGUFWriter(None, "imatrix")
        writer.add_type("imatrix")
        writer.add_array(gguf.Keys.IMatrix.DATASETS, [self.origin])
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, self.chunks)
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, self.chunk_tokens)
        for name, sums in self.sums.items():
            writer.add_tensor(name + SUMS, sums.numpy())
            writer.add_tensor(name + COUNTS, self.counts[name].float()[:, None].numpy())
        writer.write_header_to_file(file)
        try:
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def importance_of(config: ExportConfig, on_data: Callable[[Dataset], None] | None = None) -> Source | None:
    """Return what makes an export's importance; None if its config has none. A file is read at once.

    Args:
        on_data: called with the dataset after it is read.

    Raises:
        UserError: same as `read_importance`; a file to write that exists. From the result: same as `calibrate`.
    """
    file = Path(config.imatrix) if config.imatrix is not None else None
    if config.data is None:
        if file is None:
            return None
        found = read_importance(file)
        return lambda merged, arch: found
    if file is not None and file.exists():
        do = "choose another --imatrix, or leave --data out, which reads it"
        raise UserError("a new importance matrix must be a new file", "it exists", do, str(file))

    def make(merged: Merged, arch: Architecture) -> Importance:
        found = collect(merged, arch, config, on_data)
        if file is not None:
            with new_file(file) as path:
                check_room(path, sum(4 * sums.numel() for sums in found.sums.values()))
                found.write(path)
        return found

    return make


def collect(
    merged: Merged, arch: Architecture, config: ExportConfig, on_data: Callable[[Dataset], None] | None
) -> Importance:
    """Run a model layer by layer on the data's first rows and sum the squares of its linears' inputs."""
    assert config.data is not None, "checked by the caller"
    dataset = read_rows(merged.checkpoint.folder, merged.adapter.folder, config.data, config, on_data)
    layered = LayeredModel(merged, pick_device(config.device))
    check_layers(layered, dataset.examples)
    chosen, _ = first_batches(dataset.examples, config.max_seq_length, layered.is_packed, config.num_rows)
    origin = f"{count_tokens(chosen):,} tokens of the data"
    found = Importance(origin, len(chosen), config.max_seq_length)
    for layer in calibrate(layered, layered.first_rows(chosen), with_H=False):
        for one in layer.inputs:
            for name in one.names:
                own = f"{layer.name}.{name}.weight"
                place = arch.tensor_name(merged.model.stored.get(own, own))
                if place is not None:
                    found.sums[place] = one.square_K.cpu()[None]
                    found.counts[place] = torch.tensor([one.num_tokens])
        for name, routed in layer.routed.items():
            add_experts(found, arch, f"{layer.name}.{name}", RoutedExperts(layer.module.get_submodule(name), routed))
    check(found)
    return found


def add_experts(found: Importance, arch: Architecture, path: str, experts: RoutedExperts) -> None:
    """Add the sums of a module with stacked experts: for each expert, over the tokens that the router sends to it."""
    for key in ("gate_up_proj", "down_proj"):
        inputs = [experts.inputs(key, i) for i in range(len(experts.module.down_proj))]
        for place in arch.expert_names(f"{path}.{key}"):
            found.sums[place] = torch.stack([x_MK.square().sum(0) for x_MK in inputs]).cpu()
            found.counts[place] = torch.tensor([len(x_MK) for x_MK in inputs])


def read_importance(file: Path) -> Importance:
    """Read llama.cpp's file.

    Raises:
        UserError: no such file; the older format without GGUF; a damaged file; NaN, Inf or a number below 0.
    """
    if not file.is_file():
        raise UserError("an importance matrix must be a file", "no such file", HOW, str(file))
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            do = "convert it: llama-imatrix --in-file OLD -o NEW.gguf"
            raise UserError("an importance matrix must be a GGUF file", "another file, such as a .dat", do, str(file))
    header = read_header(file)
    if header.metadata.get("general.type") != "imatrix":
        found = str(header.metadata.get("general.type", "a file without general.type"))
        raise UserError("general.type of an importance matrix must be imatrix", found, HOW, str(file))
    chunks, tokens = (header.metadata.get(f"imatrix.{key}", 0) for key in ("chunk_count", "chunk_size"))
    found = Importance(file.name, int(chunks), int(tokens))
    for name in header.tensors:
        if name.endswith(SUMS):
            place = name.removesuffix(SUMS)
            counts = read_floats(header, place + COUNTS).reshape(-1)
            sums = read_floats(header, name).reshape(-1)
            if len(sums) % len(counts):
                must = f"{name} must have the same inputs for each of {len(counts)} matrices"
                raise UserError(must, f"{len(sums)} sums", HOW, str(file))
            found.sums[place] = sums.view(len(counts), -1)
            found.counts[place] = counts
    check(found)
    return found


def read_floats(header: Header, name: str) -> Tensor:
    """Read a tensor of F32. Raises UserError if there is none."""
    stored = header.tensors.get(name)
    if stored is None or stored.kind != "F32":
        found = "none" if stored is None else stored.kind
        raise UserError(f"an importance matrix must hold {name} in F32", found, HOW, str(header.file))
    with stored.file.open("rb") as stream:
        stream.seek(stored.begin)
        return torch.frombuffer(bytearray(stream.read(stored.nbytes)), dtype=torch.float32).view(stored.shape)


def check(found: Importance) -> None:
    """Raise UserError unless all sums and counts are finite, none is below 0, and there is one."""
    if not found.sums:
        raise UserError("an importance matrix must hold statistics", "none", HOW, found.origin)
    for name in found.sums:
        for what in (found.sums[name], found.counts[name]):
            if not ((what >= 0) & what.float().isfinite()).all():
                must = "an importance must be finite and not below 0"
                raise UserError(must, "NaN, Inf or a number below 0", HOW, f"{found.origin}: {name}")
