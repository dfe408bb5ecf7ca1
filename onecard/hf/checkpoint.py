"""Checks a checkpoint folder by its headers, before the load.

transformers and safetensors load some damaged checkpoints without an error. Here each kind of damage is an error that
names file and tensor. Format of a safetensors file: 8 bytes of header length (little-endian), the header as JSON
(name -> dtype, shape, [begin, end)), then the data without holes.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from onecard.documents import AGAIN, Foreign, brief, hold, parse_json, read_object
from onecard.errors import UserError
from onecard.hf.documents import Mxfp4, Quantization, Size, read_generation_document, read_model_document
from onecard.hf.fp8 import without_fp8
from onecard.hf.gguf.folder import source_in, tensors_of
from onecard.hf.int4 import without_int4
from onecard.hf.mlx import without_mlx
from onecard.hf.nvfp4 import without_nvfp4
from onecard.hf.stored import DTYPE_BITS, TensorInfo, kinds_of
from onecard.quant.mxfp4 import BLOCKS, SCALES, check_mxfp4

FLOATS = ("F64", "F32", "F16", "BF16")
COUNTED = ("I64", "BOOL")  # dtypes of positions, masks and tables that models hold in addition to weights
MAX_HEADER_BYTES = 32 << 20  # also of an index; about 300,000 tensors
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d{5,9})-of-(\d{5,9})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with valid headers: its tensors in file order, and its config.json.

    Attributes:
        labels: of the classification head that its model gets; empty for a causal language model.
    """

    folder: Path
    files: list[Path]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    labels: tuple[str, ...] = ()

    @property
    def source(self) -> Path:
        """What the user passes as the model: the folder, or a GGUF file."""
        return source_in(self.folder) or self.folder

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def num_weights(self) -> int:
        """An upper bound of its number of weights: each uint8 value counts as two weights (codes)."""
        return sum(prod(info.shape) * (2 if info.dtype == "U8" else 1) for info in self.tensors.values())

    @property
    def kinds(self) -> list[str]:
        """What the tensors are stored in that are converted to 16 bits when they are read, such as FP8."""
        return kinds_of(self.tensors.values())

    @property
    def is_4bit(self) -> bool:
        """Whether its linears have bitsandbytes' 4-bit format."""
        return "quantization_config" in self.config and not self.is_mxfp4

    @property
    def is_mxfp4(self) -> bool:
        """Whether it stores experts in MXFP4. Its linears are in 16 bits."""
        return is_mxfp4(self.config.get("quantization_config"))

    @property
    def weights(self) -> dict[str, TensorInfo]:
        """`tensors`, in which the blocks of a weight in MXFP4 have the weight's name. Its scales have theirs."""
        packed = self.is_mxfp4
        return {
            name.removesuffix(BLOCKS) if packed and info.dtype == "U8" else name: info
            for name, info in self.tensors.items()
        }


class TensorEntry(Foreign):
    """The entry of a tensor in a safetensors header."""

    dtype: str
    shape: list[Size] = Field(max_length=16)
    data_offsets: list[Size] = Field(min_length=2, max_length=2)

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPE_BITS:
            raise ValueError(f"must be one of {', '.join(DTYPE_BITS)}")
        return value

    @model_validator(mode="after")
    def _bytes_fit(self) -> TensorEntry:
        begin, end = self.data_offsets
        if prod(self.shape) * DTYPE_BITS[self.dtype] != 8 * (end - begin):
            raise ValueError("a tensor's bytes must fit its shape and dtype")
        return self


class Index(Foreign):
    """model.safetensors.index.json: tensor -> file."""

    metadata: dict[str, Any]  # transformers needs it
    weight_map: dict[str, Any] = Field(min_length=1)


def inspect_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json, generation_config.json, the index and all headers.

    Raises:
        UserError: no or pickled weights; a wrong header, offset, dtype or size; an index that names
            files outside the folder, missing files or tensors; integer weights.
    """
    config = read_model_document(folder)
    read_generation_document(folder)
    if (file := source_in(folder)) is not None:
        return Checkpoint(folder, *tensors_of(file, folder), config)
    if (folder / "adapter_config.json").exists():  # transformers would load the adapter's base instead
        found = "adapter_config.json among its files"
        raise UserError(
            "the base must be a folder without an adapter", found, "pass the adapter by itself", str(folder)
        )
    index = folder / INDEX
    single = folder / "model.safetensors"
    mapping: dict[str, str] | None = None
    if single.is_file():
        files = [single]
    elif index.is_file():
        mapping = read_index(index)
        files = [folder / name for name in dict.fromkeys(sorted(mapping.values()))]
        if not all(file.is_file() for file in files) and (found := shards_of(folder)):  # shards of another count
            files, mapping = found, None
            check_complete(files, set(read_index(index)), index)
    else:
        files = shards_of(folder)
        if not files:
            raise no_weights(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not file.is_file():
            raise UserError("every file of the index must exist", "no such file", AGAIN, str(file))
        for name, info in read_header(file).items():
            if name in tensors:
                raise UserError(
                    "a tensor must be in one file", f"{name} also in {tensors[name].file.name}", AGAIN, str(file)
                )
            tensors[name] = info
    if mapping is not None:
        check_index(mapping, tensors, index)
    tensors, config = without_mlx(*without_int4(*without_fp8(*without_nvfp4(tensors, config))))
    check_dtypes(tensors, config)
    return Checkpoint(folder, files, tensors, config)


def read_index(path: Path) -> dict[str, str]:
    """Return tensor -> file name. Each file name must be a plain name in the same folder."""
    content = read_object(path, max_bytes=MAX_HEADER_BYTES)
    if "metadata" not in content:
        do = 'add "metadata": {}, which transformers wants'
        raise UserError("the index must hold its metadata", "none", do, str(path))
    mapping = hold(Index, content, str(path)).weight_map
    for tensor, name in mapping.items():
        if not isinstance(name, str) or "\0" in name or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                "the index must name .safetensors files of its own folder",
                f"{tensor} in {brief(name)}",
                "do not use this checkpoint unless you know why it does so",
                str(path),
            )
    return mapping


def shards_of(folder: Path) -> list[Path]:
    """Return a complete set of shards, model-00001-of-0000N.safetensors to N, or an empty list if there is none.

    Raises:
        UserError: a shard of the set is missing, or there are two sets.
    """
    found = {path: match for path in folder.glob("*.safetensors") if (match := SHARD.fullmatch(path.name))}
    sets = {(match[1], match[3]) for match in found.values()}
    if len(sets) > 1:
        names = " and ".join(f"{stem}-*-of-{count}" for stem, count in sorted(sets))
        raise UserError("shards without their index must be of one set", names, "remove the others", str(folder))
    for stem, count in sets:
        names = [f"{stem}-{number:0{len(count)}d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
        missing = [name for name in names if folder / name not in found]
        if missing:
            raise UserError("every shard of a set must exist", f"no {missing[0]}", AGAIN, str(folder))
        return [folder / name for name in names]
    return []


def check_complete(files: list[Path], wanted: set[str], index: Path) -> None:
    """Raise UserError unless shards that the index does not name hold exactly its tensors."""
    found = {name for file in files for name in read_header(file)}
    different = sorted(wanted ^ found)
    if different:
        what = f"{different[0]} is in {'the index' if different[0] in wanted else 'the shards'} alone"
        raise UserError("shards must hold the tensors of the index", what, AGAIN, str(index))


@contextmanager
def as_indexed(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield a folder from which transformers can read the checkpoint: its own, or if no index names its shards, a
    temporary folder of links with a correct index."""
    index = checkpoint.folder / INDEX
    names = {file.name for file in checkpoint.files}
    single = names == {"model.safetensors"}
    if single or (index.is_file() and set(read_index(index).values()) == names):
        yield checkpoint.folder
        return
    with tempfile.TemporaryDirectory() as made:
        for path in checkpoint.folder.iterdir():
            if path.name != INDEX:
                (Path(made) / path.name).symlink_to(path.absolute())
        mapping = {name: info.file.name for name, info in checkpoint.tensors.items()}
        content = {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": mapping}
        (Path(made) / INDEX).write_text(json.dumps(content), encoding="utf-8")
        yield Path(made)


def no_weights(folder: Path) -> UserError:
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        return UserError(
            "weights must be safetensors",
            f"{pickled[0]}, a pickle: opening it can run any code",
            "load it with transformers on an isolated machine, and save it with save_pretrained()",
            str(folder),
        )
    ggufs = sorted(p.name for p in folder.glob("*.gguf"))
    if ggufs:
        must = "a checkpoint folder must hold safetensors; a GGUF model is passed as its file"
        return UserError(must, f"a folder with {ggufs[0]}", f"pass {folder / ggufs[0]}", str(folder))
    return UserError("a checkpoint must hold model.safetensors or its index", "neither", AGAIN, str(folder))


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one file in file order, after a check of every offset."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":  # how a git-lfs pointer begins
            must = "a safetensors file must hold its tensors"
            raise UserError(must, "a pointer of git-lfs", "fetch the files themselves: git lfs pull", str(file))
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            found = f"a header of {length:,} bytes in a file of {size:,}"
            raise UserError("a safetensors file must hold its whole header", found, AGAIN, str(file))
        raw = stream.read(length)
    try:
        header = parse_json(raw, max_bytes=MAX_HEADER_BYTES)
    except ValueError as error:
        raise UserError("a safetensors header must be JSON", str(error), AGAIN, str(file)) from None
    if not isinstance(header, dict):
        raise UserError("a safetensors header must be an object", type(header).__name__, AGAIN, str(file))
    header.pop("__metadata__", None)
    infos = {name: tensor_info(name, entry, file, 8 + length) for name, entry in header.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    at = 8 + length
    for name, info in ordered.items():
        if info.begin != at:
            what = "overlaps the tensor before it" if info.begin < at else "leaves a hole before it"
            raise UserError(
                "tensors must follow each other without gaps or overlaps", f"{name} {what}", AGAIN, str(file)
            )
        at += info.nbytes
    if at != size:
        what = "truncated" if at > size else "longer than its tensors"
        raise UserError(
            "the file must end where its last tensor ends", f"{size:,} bytes for {at:,}: {what}", AGAIN, str(file)
        )
    return ordered


def tensor_info(name: str, content: Any, file: Path, data_begin: int) -> TensorInfo:
    """Check one entry of a header and return it."""
    entry = hold(TensorEntry, content, f"{file}: {name}")
    begin, end = entry.data_offsets
    return TensorInfo(entry.dtype, tuple(entry.shape), data_begin + begin, end - begin, file)


def check_index(mapping: dict[str, str], tensors: dict[str, TensorInfo], index: Path) -> None:
    """Raise UserError unless the index and the headers agree."""
    for name, file in mapping.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError("a file must hold what the index says", f"no {name} in {file}", AGAIN, str(index))
    extra = sorted(set(tensors) - set(mapping))
    if extra:
        found = f"{extra[0]} of {tensors[extra[0]].file.name} is not"
        raise UserError("every tensor must be in the index", found, AGAIN, str(index))


def check_dtypes(tensors: dict[str, TensorInfo], config: dict[str, Any]) -> None:
    """Raise UserError unless tensors are floats, or in bitsandbytes' 4-bit format if config.json says so.

    transformers would load the integers of a damaged or quantized tensor as weights.
    """
    quantization = config.get("quantization_config")
    if is_mxfp4(quantization):
        hold(Mxfp4, quantization, "config.json: quantization_config")
    elif quantization is not None and not quantization.get("load_in_4bit"):
        raise UserError(
            "the base must be in 16 or 32 bits, or in a quantized format that docs/formats.md lists",
            f"a checkpoint quantized with {quantization.get('quant_method', 'unknown')}",
            "use the original checkpoint",
            "config.json",
        )
    elif quantization is not None:
        hold(Quantization, quantization, "config.json: quantization_config")
    for name, info in tensors.items():
        in_4bit = f"{name}.absmax" in tensors or name.endswith(".absmax") or ".quant_state." in name
        packed = quantization is not None and info.dtype == "U8" and in_4bit
        packed = packed or (is_mxfp4(quantization) and info.dtype == "U8" and is_mxfp4_tensor(name, tensors))
        is_counted = info.dtype in COUNTED and not name.endswith((".weight", ".bias"))
        if info.dtype not in FLOATS and not packed and not is_counted:
            raise UserError(
                "weights must be float tensors", f"{info.dtype}", "use the original checkpoint", f"{info.file}: {name}"
            )


def is_mxfp4(quantization: dict[str, Any] | None) -> bool:
    return quantization is not None and quantization.get("quant_method") == "mxfp4"


def is_mxfp4_tensor(name: str, tensors: dict[str, TensorInfo]) -> bool:
    """Whether a tensor is the blocks or the scales of a weight in MXFP4. Raises UserError unless it has both, and their
    shapes fit."""
    weight = name.removesuffix(BLOCKS).removesuffix(SCALES)
    if weight == name:
        return False
    blocks, scales = (tensors.get(weight + suffix) for suffix in (BLOCKS, SCALES))
    if blocks is None or scales is None or {blocks.dtype, scales.dtype} != {"U8"}:
        pair = ((BLOCKS, blocks), (SCALES, scales))
        found = ", ".join(f"{suffix} {info.dtype if info else 'missing'}" for suffix, info in pair)
        raise UserError("a weight in MXFP4 must have blocks and scales in U8", found, AGAIN, weight)
    check_mxfp4(weight, blocks.shape, scales.shape)
    return True


def zeros_at_end(file: Path, step: int = 1 << 20) -> int:
    """Return the number of zero bytes at the end of a file."""
    size = end = file.stat().st_size
    with file.open("rb") as stream:
        while end > 0:
            begin = max(0, end - step)
            stream.seek(begin)
            piece = stream.read(end - begin)
            kept = len(piece.rstrip(b"\0"))
            if kept:
                return size - begin - kept
            end = begin
    return size


def config_fingerprint(checkpoint: Checkpoint) -> str:
    """Return sha256 of the content of config.json, independent of key order and white space."""
    return hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """Return sha256 of the tokenizer's files."""
    digest = hashlib.sha256()
    for pattern in ("tokenizer*", "special_tokens_map.json", "*.jinja", "*.model", "vocab*", "merges.txt"):
        for path in sorted(p for p in folder.glob(pattern) if p.is_file()):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
