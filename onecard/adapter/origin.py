"""What an adapter was trained on: onecard.json in its folder says which base it was and how the base was quantized.

peft's files hold neither. Without it, an adapter trained over fp4 would load on an nf4 base without an error, and so
would an adapter of another model of the same shape. A sample identifies the base: the 4-bit codes of the first values
of each linear, and the mean of their scales. The codes are the same whether its checkpoint is in 16 bits or in 4, the
scales up to the error of double quantization. A linear that stays in the checkpoint's own few bits has these codes.

The JSON also holds the form of the training prompts, and the sha256 of each file of the folder. A changed file is an
error wherever the adapter is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import torch
from pydantic import Field
from transformers.pytorch_utils import Conv1D

from onecard.config import LoadConfig, QuantConfig, QuantType, TrainFor, make_config
from onecard.documents import Own, hold, read_object
from onecard.errors import UserError
from onecard.files import sha256
from onecard.hf.checkpoint import Checkpoint, inspect_checkpoint
from onecard.hf.head import labels_of
from onecard.hf.load import find_checkpoint
from onecard.hf.names import stored_names
from onecard.hf.quantizer import quantization_of
from onecard.hf.skeleton import kept_packed, meta_model, read_config
from onecard.hf.stored import TensorInfo, read_bytes, read_packed, read_rows, read_tensor
from onecard.kernels import ops
from onecard.nn.linear import Linear4bit
from onecard.quant.codebook import dynamic_map
from onecard.quant.mxfp4 import exponent_map
from onecard.quant.nested import dequantize_absmax
from onecard.quant.scales import state_absmax
from onecard.quant.state import STATE_KEY, read_facts

FILE = "onecard.json"
SAMPLE_VALUES = 4096  # values of each linear: a multiple of every blocksize
STORED = ("quant_type", "blocksize", "double_quant")
LATER = ("scales", "train_for")  # fields that were added, in an Origin
ROUNDING = 1e-6  # of a mean of at most 128 float32 scales


class Sample(NamedTuple):
    """What identifies a base.

    Attributes:
        codes: sha256 of the first codes of each linear.
        scales: for each linear, in the order of names, the mean of their scales and by how much double quantization may
            have moved it: float32 pairs, little-endian, in hexadecimal.
    """

    codes: str
    scales: str

    def is_of(self, other: Sample) -> bool:
        """Whether two samples can be of the same weights."""
        if self.codes != other.codes or len(self.scales) != len(other.scales):
            return False
        (one, slack), (two, more) = self.pairs().T, other.pairs().T
        return bool((abs(one - two) <= slack + more + ROUNDING * abs(one)).all())

    def digest(self) -> str:
        return hashlib.sha256(f"{self.codes}{self.scales}".encode()).hexdigest()

    def pairs(self) -> numpy.ndarray:
        """Return float64 (linears, 2)."""
        return numpy.frombuffer(bytes.fromhex(self.scales), "<f4").astype(float).reshape(-1, 2)


class Form(Own):
    """The form of the training prompts, which inference must use again.

    Attributes:
        prompt: how most rows' prompts were written: "chat" by the chat template; "completion" without a template;
            "alpaca" under alpaca's headings; "text" for rows of text, which have no prompt.
        template: sha256 of the chat template.
        end_tokens: ids that ended the supervised turns, the most frequent first.
    """

    prompt: Literal["chat", "completion", "alpaca", "text"]
    template: str | None = None
    end_tokens: tuple[int, ...] = Field((), strict=False)  # JSON has lists only


class Origin(Own):
    """The base of a training run, as onecard.json holds it.

    Attributes:
        model: its name, as the user wrote it.
        quant_type, blocksize, double_quant: how its linears were quantized in memory, but those that stay as stored.
        sample, scales: its `sample_base`. Files of an older release have no scales.
        form: None in a file of an older release.
        train_for: the format that the run rounded to in its forward passes.
        files: sha256 of each other file of the folder, by name.
        sha256: digest of all other fields.
    """

    model: str
    quant_type: QuantType
    blocksize: int
    double_quant: bool
    sample: str = Field(pattern="^[0-9a-f]{64}$")
    scales: str | None = Field(None, pattern="^([0-9a-f]{16})+$")
    form: Form | None = None
    train_for: TrainFor | None = None
    files: dict[str, str] = Field(default_factory=dict)
    sha256: str | None = None

    @property
    def quant(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in STORED}

    def digest(self) -> str:
        """Return the sha256 of all fields except `sha256`, and those that a file of an older release does not have."""
        later = {name for name in LATER if getattr(self, name) is None}
        content = self.model_dump(mode="json", exclude={"sha256", *later})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def origin_of(model: Any, name: str) -> Origin:
    """Return the origin of adapters that are trained on this loaded 4-bit model."""
    quant = quantization_of(model)
    sample = sample_base(*sources_of(model), quant["quant_type"], quant["blocksize"])
    return Origin(model=name, **quant, sample=sample.codes, scales=sample.scales)


def sources_of(model: Any) -> tuple[Checkpoint, Any, list[str]]:
    """Return a loaded model's checkpoint, its modules without weights, and the names of its linears' weights."""
    named = model.named_modules()  # names have peft's wrappers if an adapter is loaded
    linears = [f"{n.replace('.base_layer', '')}.weight" for n, m in named if isinstance(m, Linear4bit)]
    checkpoint, labels = inspect_checkpoint(find_checkpoint(model.name_or_path)), labels_of(model.config)
    where = str(checkpoint.folder / "config.json")
    return checkpoint, meta_model(read_config(checkpoint.folder), where, checkpoint, labels), linears


def write_origin(folder: Path, origin: Origin) -> None:
    """Write onecard.json into an adapter folder whose other files are complete."""
    files = {name: sha256(folder / name) for name in sealed_files(folder)}
    found = origin.model_copy(update={"files": files})
    found = found.model_copy(update={"sha256": found.digest()})
    (folder / FILE).write_text(json.dumps(found.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def sealed_files(folder: Path) -> list[str]:
    """Return the names of the files that determine what the adapter computes: all but the model card and FILE."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in (FILE, "README.md"))


def read_origin(adapter: str | Path) -> Origin | None:
    """Read an adapter folder's onecard.json; None if onecard did not train the adapter.

    Raises:
        UserError: a file of the folder, or the JSON itself, has changed since training wrote it.
    """
    folder = Path(adapter)
    path = folder / FILE
    if not path.is_file():
        return None
    do = "train again, or delete it to use the adapter without what it says"
    origin = hold(Origin, read_object(path, do), str(path), do)
    make_config(QuantConfig, origin.quant, str(path))
    if origin.sha256 not in (None, origin.digest()):
        raise changed(path, "other values than its own sha256 says")
    for name, expected in origin.files.items():
        file = folder / Path(name).name
        if not file.is_file():
            raise changed(file, "no such file")
        if sha256(file) != expected:
            raise changed(file, "other bytes than the sha256 in " + FILE)
    return origin


def form_beside(adapter: str | Path | None) -> Form | None:
    """Return the form of an adapter's prompts; None if its folder does not record one."""
    origin = read_origin(adapter) if adapter is not None else None
    return origin.form if origin is not None else None


def trained_for(adapter: str | Path | None) -> TrainFor | None:
    """Return the format that an adapter's run rounded to; None if it did not."""
    origin = read_origin(adapter) if adapter is not None else None
    return origin.train_for if origin is not None else None


def written_otherwise(adapter: str | Path | None, written: str, is_nearest: bool) -> list[str]:
    """Return a note for the user if an adapter was trained for another file than the one that is written.

    Args:
        written: the file's format, a value of train_for or another one.
        is_nearest: whether its codes are the nearest ones, as in training.
    """
    expected = trained_for(adapter)
    if expected is None or (written == expected and is_nearest):
        return []
    found = f"{written} with other codes than the nearest" if written == expected else written
    return [f"the adapter was trained for {expected}, and this is {found}: its effect may differ"]


def changed(path: Path, found: str) -> UserError:
    return UserError(
        "an adapter's files must be as training wrote them",
        found,
        f"copy the adapter again; if you changed the file on purpose, delete {path.parent / FILE}",
        str(path),
    )


def stored_as(adapter: str | Path | None, fields: dict[str, Any]) -> LoadConfig:
    """Return how to quantize a base: as the adapter's run did; if its folder does not record it, by `fields`.

    Args:
        fields: the flags that the user set.

    Raises:
        UserError: a field contradicts the run's.
    """
    origin = read_origin(adapter) if adapter is not None else None
    if origin is None:
        return make_config(LoadConfig, fields, "command line")
    for key, value in origin.quant.items():
        if fields.get(key, value) != value:
            raise UserError(
                f"the base must be stored as the adapter met it, with {key} {value}",
                str(fields[key]),
                f"leave {key} out",
                str(Path(adapter or "") / FILE),
            )
    return make_config(LoadConfig, {**fields, **origin.quant}, "command line")


def check_origin(model: Any, adapter: str) -> None:
    """Raise UserError if a loaded model is not the base that the adapter's onecard.json records."""
    expected = read_origin(adapter)
    if expected is None:
        return
    stored_as(adapter, quantization_of(model))
    check_sample(*sources_of(model), expected, adapter)


def check_sample(
    checkpoint: Checkpoint, modules: Any, linears: Iterable[str], expected: Origin, adapter: str | Path
) -> None:
    """Raise UserError unless the checkpoint is the base which the adapter's onecard.json records."""
    names = list(linears)

    def is_base(keeps: bool) -> bool:
        found = sample_base(checkpoint, modules, names, expected.quant_type, expected.blocksize, keeps)
        return found.is_of(Sample(expected.sample, expected.scales or found.scales))

    if is_base(True):
        return
    do = f"pass that model, or delete {Path(adapter) / FILE} to use the adapter on this one all the same"
    if kept_packed(modules, checkpoint) and is_base(False):
        kinds = ", ".join(checkpoint.kinds)
        found = (
            f"a base that stays in {kinds}; the adapter's run, of an older release, rounded it to {expected.quant_type}"
        )
        must, do = "the base must be stored as the adapter met it", do.replace("pass that model", "train again")
        raise UserError(must, found, do, str(checkpoint.source))
    must = f"the base must be the one that the adapter was trained on, {expected.model}"
    raise UserError(must, "other weights", do, str(checkpoint.source))


def sample_base(
    checkpoint: Checkpoint,
    modules: Any,
    linears: Iterable[str],
    quant_type: str,
    blocksize: int,
    keeps: bool = True,
) -> Sample:
    """Return the sample of a checkpoint. It reads a few KiB of each linear.

    Args:
        modules: transformers' model of the checkpoint, without weights.
        linears: names of their weights in it; a weight that transformers builds from other tensors is left out.
        keeps: whether linears that the checkpoint stores in few bits stay so. Older releases quantized them.
    """
    kept = kept_packed(modules, checkpoint) if keeps else {}
    codes: list[bytes] = []
    scales: list[tuple[float, float]] = []
    stored = stored_names(modules, checkpoint.tensors)
    infos = {name: checkpoint.tensors[stored[name]] for name in sorted(linears) if name in stored}
    for name, info in infos.items():
        if name in kept:
            head, scale = stored_sample(info)
            scales.append((scale, 0.0))
            codes.append(name.encode() + head)
            continue
        is_4bit = info.dtype == "U8"
        is_turned = not is_4bit and isinstance(modules.get_submodule(name.removesuffix(".weight")), Conv1D)
        num_values, width = SAMPLE_VALUES // (2 if is_4bit else 1), info.shape[0 if is_turned else 1]
        rows = -(-num_values // width)
        head = read_tensor(info)[:, :rows].T if is_turned else read_rows(info, 0, rows)
        head = head.reshape(-1)[:num_values]
        if is_4bit:
            scales.append(stored_scale(checkpoint, stored[name], -(-2 * len(head) // blocksize)))
        else:
            head, state = ops.quantize_4bit(head, quant_type, blocksize, False, name)
            absmax = exponent_map()[state.absmax.long()] if quant_type == "mxfp4" else state.absmax
            scales.append((absmax.double().mean().item(), 0.0))
        codes.append(name.encode() + head.numpy().tobytes())
    found = numpy.array(scales, "<f4").tobytes().hex()
    return Sample(hashlib.sha256(b"".join(codes)).hexdigest(), found)


def stored_sample(info: TensorInfo) -> tuple[bytes, float]:
    """Return the first codes of a weight that stays packed, and the mean of their scales."""
    packed, state = read_packed(info, 0, min(-(-SAMPLE_VALUES // info.shape[1]), info.shape[0]))
    absmax = state_absmax(state)[: SAMPLE_VALUES // state.blocksize]
    return packed.view(-1)[: SAMPLE_VALUES // 2].numpy().tobytes(), absmax.double().mean().item()


def stored_scale(checkpoint: Checkpoint, name: str, num_blocks: int) -> tuple[float, float]:
    """Return the mean of a stored 4-bit weight's first scales, and by how much double quantization may have moved it,
    which is half of the widest gap of its map."""
    info = checkpoint.tensors[f"{name}.absmax"]
    absmax = read_bytes(info, info.begin, info.nbytes // info.shape[0] * num_blocks)
    if absmax.dtype != torch.uint8:
        return absmax.double().mean().item(), 0.0
    keys = [key for key in checkpoint.tensors if key.startswith(f"{name}.{STATE_KEY}")]
    facts = read_facts(name, {key.removeprefix(name): read_tensor(checkpoint.tensors[key]) for key in keys})
    largest, levels = read_tensor(checkpoint.tensors[f"{name}.nested_absmax"]).flatten()[:1], dynamic_map()
    absmax = dequantize_absmax(absmax, largest, torch.tensor(facts.nested_offset))
    return absmax.double().mean().item(), levels.diff().max().item() / 2 * largest.item()
