"""A model, or an adapter alone, as one GGUF file for llama.cpp, Ollama and LM Studio, streamed tensor by tensor.

The whole model is the merged checkpoint (`onecard.export.merge.merged`) under llama.cpp's names. Matrices have the
types of llama.cpp's mixes (mix.py): BF16, F16, or blocks of codes and scales (blocks.py). Vectors and norms are F32.
Experts that the checkpoint has in MXFP4 stay in it.
Memory holds one tensor as stored, some of its rows in float32, its blocks, and its merge.

An adapter alone has A (r, K) and B (N, r) in F32 for each weight. llama.cpp adds alpha / r * B A with one alpha for
the file. Other factors of a module's scale (rsLoRA, alpha patterns) are multiplied into its B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from shlex import quote

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from onecard.adapter.origin import form_beside
from onecard.adapter.update import Adapter
from onecard.config import GgufConfig, QuantConfig
from onecard.errors import UserError
from onecard.export.folder import check_room, new_file, new_folder
from onecard.export.gguf.architecture import Architecture
from onecard.export.gguf.blocks import LAYOUTS, quantize
from onecard.export.gguf.importance import Source
from onecard.export.gguf.mix import Mix
from onecard.export.gguf.modelfile import modelfile
from onecard.export.gguf.vocabulary import add_vocabulary
from onecard.export.merge.experts import matrix_key
from onecard.export.merge.merged import Base, Merged, open_merged
from onecard.hf.documents import read_generation_document
from onecard.hf.load import load_tokenizer
from onecard.infer.decoding import end_tokens

F16_END = 65520  # numbers from here on are no F16; a block's scale is less than its largest weight
PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
SLAB_VALUES = 1 << 22


@dataclass(frozen=True)
class Part:
    """A tensor of the file: its name, shape and kind, and a function that yields its values, some rows at a time.

    Attributes:
        importance: of each matrix's inputs, (K,) or None; empty: there is none.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    slabs: Callable[[], Iterable[Tensor]]
    importance: Sequence[Tensor | None] = ()

    @property
    def nbytes(self) -> int:
        values, size = gguf.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // values * size


@dataclass(frozen=True)
class Exported:
    """The paths of the file and its Modelfile, the file's size, and notes for the user."""

    file: Path
    modelfile: Path
    nbytes: int
    notes: list[str]
    is_adapter: bool

    def lines(self) -> list[str]:
        """Return the lines that say what was written and how to use it, with the notes."""
        said = [f"exported {self.file}  ({self.nbytes:,} bytes)", f"Ollama   {self.modelfile}"]
        said += [f"note     {note}" for note in self.notes]
        file, recipe = quote(str(self.file)), quote(str(self.modelfile))
        run = f"-m {file}"
        if self.is_adapter:
            run = f"-m BASE.gguf --lora {file}      BASE.gguf: the same export without --adapter and --adapter-only"
        name = quote(self.file.stem.lower())
        more = [] if self.is_adapter else [f"  lms import {file}"]
        return [*said, "next", f"  llama-cli {run}", f"  ollama create {name} -f {recipe}", *more]


def export_gguf(
    model: str,
    adapter: str | None,
    output: str,
    config: GgufConfig,
    base: Base | None = None,
    quant: QuantConfig | None = None,
    importance: Source | None = None,
) -> Exported:
    """Write a GGUF file and a Modelfile next to it.

    Args:
        output: a new folder, or a new file if its name ends in .gguf.
        base, quant: same as in `open_merged`.
        importance: makes the importance of inputs, as `importance_of` returns it.

    Raises:
        UserError: a model, tokenizer or adapter that GGUF or llama.cpp's graph cannot represent; weights beyond F16's
            range; no room on the disk; an output that exists; same as `open_merged`.
    """
    target = Path(output)
    merged = open_merged(model, adapter, base, quant)
    if target.suffix == ".gguf":
        recipe = target.with_suffix(".Modelfile")
        with new_file(recipe) as second, new_file(target) as first:
            size, notes = write(merged, config, first, second, target.name, importance)
        return Exported(target, recipe, size, notes, config.adapter_only)
    name = f"{target.name}-{'lora' if config.adapter_only else config.outtype}.gguf"
    with new_folder(target) as folder:
        size, notes = write(merged, config, folder / name, folder / "Modelfile", name, importance)
    return Exported(target / name, target / "Modelfile", size, notes, config.adapter_only)


def write(
    merged: Merged, config: GgufConfig, file: Path, recipe: Path, name: str, importance: Source | None = None
) -> tuple[int, list[str]]:
    """Write both files. Return the first one's size in bytes, and notes.

    Args:
        name: the first file's final name.
        importance: same as in `export_gguf`.
    """
    arch, folder = Architecture(merged.config), merged.checkpoint.folder.resolve()
    tokenizer = load_tokenizer(str(folder), merged.adapter.folder)
    form = form_beside(merged.adapter.folder)
    configured = read_generation_document(folder).eos_token_id
    end_ids = end_tokens(configured, tokenizer, form.end_tokens if form else ())
    writer = gguf.GGUFWriter(None, arch.name)
    if config.adapter_only:
        parts, notes = adapter_parts(merged.adapter, arch), []
        add_adapter_metadata(writer, merged.adapter)
        start = f"FROM {folder}\nADAPTER ./{name}"
    else:
        is_tied = all(arch.tensor_name(source) != "output.weight" for source in merged.shapes)
        mix = Mix(config.outtype, arch, is_tied, importance is not None)
        parts = list(model_parts(merged, arch, mix))
        notes = [*arch.notes, *mix.notes()]
        vocab_size = next(part.shape[0] for part in parts if part.name == "token_embd.weight")
        add_model_metadata(writer, folder.name, mix)
        arch.add_metadata(writer, vocab_size)
        notes += add_vocabulary(writer, tokenizer, vocab_size, end_ids)
        start = f"FROM ./{name}"
    text, more = modelfile(start, tokenizer, end_ids, form)
    recipe.write_text(text, encoding="utf-8")
    check_room(file, sum(part.nbytes for part in parts))
    if importance is not None:
        found = importance(merged, arch)
        parts = [
            replace(part, importance=found.of(part.name, part.shape)) if part.kind in LAYOUTS else part
            for part in parts
        ]
        writer.add_uint32("quantize.imatrix.entries_count", len(found.sums))
        more += found.notes()
    return write_parts(writer, file, parts), notes + more


def add_model_metadata(writer: gguf.GGUFWriter, name: str, mix: Mix) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(mix.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_adapter_metadata(writer: gguf.GGUFWriter, adapter: Adapter) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, file_alpha(adapter))


def file_alpha(adapter: Adapter) -> float:
    """Return the alpha that llama.cpp divides by each rank: the first module's, so that plain LoRA's B is unchanged."""
    first = next(iter(adapter.updates.values()))
    return first.scaling * first.A_RK.shape[0]


def model_parts(merged: Merged, arch: Architecture, mix: Mix) -> Iterator[Part]:
    """Yield the whole model's tensors."""
    for name, factors in arch.rope_factors().items():
        yield Part(name, tuple(factors.shape), Kind.F32, lambda factors=factors: [factors])
    for stack, weight in merged.experts.stacks.items():
        yield from expert_parts(merged, arch, mix, stack, tuple(weight.weight.shape))
    for source, (_, shape) in merged.shapes.items():
        if source in merged.experts.places:
            continue
        if source.removesuffix("_bias") in merged.experts.stacks:
            yield from expert_biases(merged, arch, source, shape)
            continue
        name = arch.tensor_name(source)
        if name is not None:
            yield Part(name, shape, mix.kind(name, shape), lambda s=source: slabs(merged, arch, s))


def expert_parts(merged: Merged, arch: Architecture, mix: Mix, stack: str, shape: tuple[int, ...]) -> Iterator[Part]:
    """Yield the tensors of a stack of experts' matrices, (E, N, K)."""
    names, is_turned = arch.expert_names(stack), merged.experts.stacks[stack].is_transposed
    N, K = shape[:0:-1] if is_turned else shape[1:]
    for i, name in enumerate(names):
        rows, made = arch.expert_rows(i, len(names), N), (shape[0], N // len(names), K)
        kind = Kind.MXFP4 if stays_in_mxfp4(merged, stack) else mix.kind(name, made)
        yield Part(name, made, kind, lambda rows=rows: ((W.T if is_turned else W)[rows] for W in merged.stack(stack)))


def stays_in_mxfp4(merged: Merged, stack: str) -> bool:
    """Whether a stack of experts is in MXFP4 in the checkpoint, and no adapter changes it."""
    names = [name for _, parts in merged.experts.parts(stack) for name in parts]
    return merged.mxfp4.issuperset(names) and matrix_key(names[0], 0) not in merged.adapter.updates


def expert_biases(merged: Merged, arch: Architecture, source: str, shape: tuple[int, ...]) -> Iterator[Part]:
    """Yield the tensors of a stack of experts' biases, (E, N)."""
    names = arch.expert_names(source.removesuffix("_bias"))
    for i, name in enumerate(names):
        rows, made = arch.expert_rows(i, len(names), shape[1]), (shape[0], shape[1] // len(names))
        name = f"{name.removesuffix('.weight')}.bias"
        yield Part(name, made, Kind.F32, lambda rows=rows: [merged.read(source)[:, rows]])


def slabs(merged: Merged, arch: Architecture, name: str) -> Iterator[Tensor]:
    """Yield a tensor's rows, some at a time, in the order and with the shift of the file."""
    order, shift = arch.row_order(name), arch.shift(name)
    for slab in merged.slabs(name) if order is None else [merged.read(name)[order]]:
        yield slab.float() + shift if shift else slab


def adapter_parts(adapter: Adapter, arch: Architecture) -> list[Part]:
    """Return A and B of each weight.

    Raises:
        UserError: no adapter; an adapter with more than LoRA's A and B; a weight that the base's file does not have.
    """
    do = "leave out --adapter-only, which merges it"
    if not adapter.updates:
        raise UserError("--adapter-only needs an adapter with LoRA weights", "none", "give --adapter", "adapter")
    if adapter.saved:
        raise UserError("a GGUF adapter holds LoRA only", f"{next(iter(adapter.saved))} trained in full", do)
    if adapter.tokens:
        raise UserError("a GGUF adapter holds A and B only", "rows of new tokens", do)
    if adapter.biases:
        raise UserError("a GGUF adapter holds A and B only", f"lora_bias, as in {next(iter(adapter.biases))}", do)
    if any(update.magnitude_N is not None for update in adapter.updates.values()):
        raise UserError("a GGUF adapter holds A and B only", "DoRA's magnitudes", do)
    parts, alpha = [], file_alpha(adapter)
    for source, update in adapter.updates.items():
        name, order = arch.tensor_name(source), arch.row_order(source)
        if name is None:
            raise UserError("an adapted weight must be in the base's file", f"{source}, tied to the embedding", do)
        rank = update.A_RK.shape[0]
        B_NR = update.B_NR if update.scaling * rank == alpha else update.B_NR * (update.scaling * rank / alpha)
        for suffix, tensor in (("lora_a", update.A_RK), ("lora_b", B_NR if order is None else B_NR[order])):
            parts.append(Part(f"{name}.{suffix}", tuple(tensor.shape), Kind.F32, lambda tensor=tensor: [tensor]))
    return parts


def write_parts(writer: gguf.GGUFWriter, file: Path, parts: list[Part]) -> int:
    """Write the metadata, then each tensor as it is read. Return the file's size in bytes."""
    for part in parts:
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), part.nbytes, raw_dtype=part.kind)
    writer.write_header_to_file(file)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            writer.write_tensor_data(encode(part))
    finally:
        writer.close()
    return file.stat().st_size


def encode(part: Part) -> np.ndarray:
    """Return a tensor's bytes, (nbytes,) uint8."""
    out, at = np.empty(part.nbytes, np.uint8), 0
    for number, piece in pieces(part):
        if part.kind not in (Kind.F32, Kind.BF16, Kind.MXFP4) and not piece.abs().max() < F16_END:  # NaN neither
            found = f"values up to {piece.abs().max().item():g}"
            raise UserError("F16 must hold every weight", found, "choose --outtype bf16", part.name)
        made = encode_rows(piece, part.kind, part.importance[number] if part.importance else None)
        out[at : at + made.size] = made
        at += made.size
    assert at == out.size, part.name
    return out


def pieces(part: Part) -> Iterator[tuple[int, Tensor]]:
    """Yield some rows of a tensor at a time, (M, K), with the number of the matrix that they are of."""
    K, N = part.shape[-1], part.shape[-2] if len(part.shape) > 1 else 1
    at, most = 0, max(SLAB_VALUES // K, 1)
    for slab in part.slabs():
        left = slab.reshape(-1, K)
        while len(left):
            piece = left[: min(most, N - at % N)]
            yield at // N, piece
            at, left = at + len(piece), left[len(piece) :]


def encode_rows(piece: Tensor, kind: Kind, importance: Tensor | None) -> np.ndarray:
    """Encode some rows, (nbytes,) uint8."""
    if kind in PLAIN:
        return piece.to(PLAIN[kind]).contiguous().view(torch.uint8).reshape(-1).numpy()
    return quantize(piece, kind, importance)
