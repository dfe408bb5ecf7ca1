"""An adapter merged into 16-bit weights, streamed tensor by tensor: memory for about one tensor, not for two models.

    W' = W + s B A        DoRA: W' = m (W + s B A) / ||W + s B A||, norms of rows (arXiv 2402.09353)

W is by default what training saw, the dequantized 4-bit weight, in every linear that had one; "original" takes the
checkpoint's own weights, which the adapter has never met. Sums are float32, rounded once to the checkpoint's dtype.
4 bits again would undo most of the update, so the result is 16-bit. The output is written under a temporary name,
file by file as the base has them, and renamed when whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from onecard.config import QuantConfig
from onecard.errors import UserError
from onecard.export.folder import DTYPES, check_room, new_folder, read_tensor, write_others
from onecard.hf.checkpoint import DTYPE_BITS, Checkpoint, inspect_checkpoint, read_json
from onecard.hf.load import find_checkpoint
from onecard.hf.origin import check_sample, read_origin, sample_base, stored_as
from onecard.hf.writer import TensorFile
from onecard.kernels import ops
from onecard.memory.model import read_model
from onecard.quant.blockwise import state_absmax
from onecard.quant.state import BNB_KEYS, STATE_KEY, QuantState, from_bnb, read_facts

Base = Literal["dequantized", "original"]
Shapes = dict[str, tuple[str, tuple[int, ...]]]
HEAD = "lm_head.weight"
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SUFFIXES = tuple(f".{key}" for key in BNB_KEYS)
PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"  # by its name a difference, but it holds the rows themselves
SLAB_VALUES = 1 << 22


@dataclass
class Update:
    """One linear's part of an adapter: B (N, r), A (r, K), DoRA's magnitude (N,), all float32."""

    A_RK: Tensor
    B_NR: Tensor
    scaling: float
    magnitude_N: Tensor | None = None

    def add_to(self, W_NK: Tensor, start: int) -> Tensor:
        """Float32 rows of the weight, from row `start` on, with the update in them."""
        rows = slice(start, start + W_NK.shape[0])
        W_NK = W_NK + self.scaling * (self.B_NR[rows] @ self.A_RK)
        if self.magnitude_N is not None:
            W_NK *= self.magnitude_N[rows, None] / torch.linalg.vector_norm(W_NK, dim=1, keepdim=True)
        return W_NK


@dataclass
class Adapter:
    """A peft adapter folder, read and checked."""

    folder: Path | None = None
    updates: dict[str, Update] = field(default_factory=dict)  # by the name of the weight that each changes
    saved: dict[str, Tensor] = field(default_factory=dict)  # trained in full: these replace the base's
    tokens: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)  # trained rows of an embedding
    stays_tied: bool = False


@dataclass(frozen=True)
class Merged:
    """A base and an adapter as one 16-bit checkpoint, given tensor by tensor; nothing of it is written or kept.

    Attributes:
        config: config.json of the result.
        shapes: each of its tensors: dtype as safetensors spells it, shape.
    """

    checkpoint: Checkpoint
    adapter: Adapter
    quant: QuantConfig
    config: dict[str, Any]
    shapes: Shapes
    rounded: set[str]  # weights that stand in 4 bits first
    full: dict[str, Tensor]  # tensors that are not the base's
    linears: set[str]  # weights that training has in 4 bits

    @property
    def nbytes(self) -> int:
        return sum(DTYPE_BITS[dtype] // 8 * prod(shape) for dtype, shape in self.shapes.values())

    def files(self) -> Iterator[tuple[str, list[str]]]:
        """The result's tensors by file, as the base has them; new ones are in the last."""
        infos, files = self.checkpoint.tensors, self.checkpoint.files
        for file in files:
            names = [n for n in self.shapes if (infos[n].file == file if n in infos else file == files[-1])]
            yield file.name, names

    def read(self, name: str) -> Tensor:
        """One tensor of the result, whole."""
        return torch.cat(list(self.slabs(name))).view(self.shapes[name][1])

    def slabs(self, name: str) -> Iterator[Tensor]:
        """One tensor of the result, consecutive rows at a time."""
        if name in self.full:
            yield self.full[name].to(DTYPES[self.shapes[name][0]])
        elif self.as_stored(name):
            yield read_tensor(self.checkpoint.tensors[name])
        else:
            update = self.adapter.updates.get(name)
            for start, piece in self.base_slabs(name):
                piece = piece if update is None else update.add_to(piece, start)
                yield piece.to(DTYPES[self.shapes[name][0]])

    def as_stored(self, name: str) -> bool:
        """Whether a tensor is in the base just as it will be in the result."""
        return name not in self.full and name not in self.rounded and name not in self.adapter.updates

    def base_slabs(self, name: str, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """The base's weight, (N, K), in float32: the first row's number, and some rows, a multiple of `multiple`."""
        N, K = self.shapes[name][1]
        if name not in self.rounded:
            W, rows = read_tensor(self.checkpoint.tensors[name]), max(SLAB_VALUES // K // multiple, 1) * multiple
            yield from ((start, W[start : start + rows].float()) for start in range(0, N, rows))
            return
        packed, state = self.in_4bit(name)
        absmax, multiple = state_absmax(state), max(state.blocksize, multiple)  # both are powers of two
        rows = max(SLAB_VALUES // K // multiple, 1) * multiple  # so that a slab starts with a block
        for start in range(0, N, rows):
            yield start, dequantize_rows(packed, absmax, state, start, min(start + rows, N))

    def in_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        """Codes and state of a weight as training had it."""
        info, quant = self.checkpoint.tensors[name], self.quant
        if info.dtype == "U8":
            return read_4bit(self.checkpoint, name)
        return ops.quantize_4bit(read_tensor(info), quant.quant_type, quant.blocksize, quant.double_quant, name)


def dequantize_rows(packed: Tensor, absmax: Tensor, state: QuantState, start: int, end: int) -> Tensor:
    """Rows of a 4-bit weight, (N, K), in float32, from one that starts with a block."""
    piece, first = torch.empty(end - start, state.shape[1]), start * state.shape[1]
    codes = packed[first // 2 : (first + piece.numel() + 1) // 2]
    weight = (codes, absmax[first // state.blocksize :], None, None, state.quant_type, state.blocksize)
    ops.backend(piece.device).dequantize_into(*weight, piece)
    return piece


def open_merged(model: str, adapter: str | None, base: Base | None = None, quant: QuantConfig | None = None) -> Merged:
    """The checkpoint that `model` and a trained adapter, or none, make together.

    Args:
        model: the checkpoint that the adapter was trained on, in 16 bits or in bitsandbytes' 4-bit format.
        base: "dequantized" adds to what training saw, "original" to the checkpoint's own weights; None: what training
            saw, or without an adapter the checkpoint itself.
        quant: how training stored a 16-bit base; if not given, as the adapter's folder says, or the defaults.

    Raises:
        UserError: an adapter that does not belong to the model, was trained over another quantization or is of a
            kind not known here; the original weights of a checkpoint that has none.
    """
    checkpoint = inspect_checkpoint(find_checkpoint(model))
    base = base or ("dequantized" if adapter is not None or checkpoint.is_4bit else "original")
    if checkpoint.is_4bit and base == "original":
        found = "a checkpoint in 4 bits"
        raise UserError("the original weights must be in the checkpoint", found, "use the dequantized ones", model)
    tuned = read_adapter(Path(adapter)) if adapter is not None else Adapter()
    shapes = stored_shapes(checkpoint)
    check_belongs(tuned, shapes, checkpoint.folder)
    linears = {name for name in shapes if checkpoint.tensors[name].dtype == "U8"}
    if not checkpoint.is_4bit:
        linears = set(read_model(checkpoint).linears) & set(shapes)
    quant = trained_over(checkpoint, linears, adapter, quant)
    rounded = linears if base == "dequantized" else set()
    full, config = saved_tensors(tuned, checkpoint, shapes)
    for name, tensor in full.items():
        dtype = shapes[name][0] if name in shapes else common_dtype(shapes)
        shapes[name] = (dtype, tuple(tensor.shape))
    return Merged(checkpoint, tuned, quant, config, shapes, rounded, full, linears)


def trained_over(
    checkpoint: Checkpoint, linears: set[str], adapter: str | None, quant: QuantConfig | None
) -> QuantConfig:
    """How the adapter met the base. Raises UserError if that, or the base, is not what its folder says."""
    fields = {} if quant is None else quant.model_dump()
    if checkpoint.is_4bit:
        state = read_4bit(checkpoint, min(linears))[1]
        fields |= {"quant_type": state.quant_type, "blocksize": state.blocksize, "double_quant": state.nested}
    found, origin = stored_as(adapter, fields), read_origin(adapter) if adapter is not None else None
    if origin is not None and adapter is not None:
        sample = sample_base(checkpoint, linears, found.quant_type, found.blocksize)
        check_sample(sample, origin, adapter, checkpoint.folder)
    return found


def stored_shapes(checkpoint: Checkpoint) -> Shapes:
    """Dtype and shape of each tensor of a checkpoint, as it was before 4 bits."""
    shapes: Shapes = {}
    for name, info in checkpoint.tensors.items():
        if f"{name}.absmax" in checkpoint.tensors:
            states = {suffix: checkpoint.tensors.get(name + suffix) for suffix in SUFFIXES if STATE_KEY in suffix}
            facts = read_facts(name, {suffix: read_tensor(state) for suffix, state in states.items() if state})
            shapes[name] = (NAMES[getattr(torch, facts["dtype"])], tuple(facts["shape"]))
        elif not (checkpoint.is_4bit and name.endswith(SUFFIXES)):
            shapes[name] = (info.dtype, info.shape)
    return shapes


def read_4bit(checkpoint: Checkpoint, name: str) -> tuple[Tensor, QuantState]:
    """A weight of a bitsandbytes checkpoint: codes and state."""
    infos = {suffix: checkpoint.tensors.get(name + suffix) for suffix in ("", *SUFFIXES)}
    return from_bnb(name, {suffix: read_tensor(info) for suffix, info in infos.items() if info is not None})


def common_dtype(shapes: Shapes) -> str:
    """What most of a checkpoint's float tensors are stored in."""
    return Counter(dtype for dtype, _ in shapes.values() if dtype in DTYPES).most_common(1)[0][0]


def merge(model: str, adapter: str, output: str, base: Base | None = None, quant: QuantConfig | None = None) -> Path:
    """Write a 16-bit checkpoint with the adapter in it; its folder. Arguments and errors are open_merged's.

    Raises:
        UserError: no room on the disk; an output folder that is not new.
    """
    merged, target = open_merged(model, adapter, base, quant), Path(output)
    check_room(target, merged.nbytes)
    with new_folder(target) as folder:
        write_merged(merged, folder)
    return target


def write_merged(merged: Merged, folder: Path) -> None:
    """A whole checkpoint in a folder that is there."""
    places: dict[str, str] = {}
    for file_name, names in merged.files():
        file = TensorFile(folder / file_name, {name: merged.shapes[name] for name in names})
        for name in names:
            write_tensor(file, merged, name)
        file.close()
        places |= dict.fromkeys(names, file_name)
    write_others(folder, merged.checkpoint, merged.config, places, merged.adapter.folder)


def write_tensor(file: TensorFile, merged: Merged, name: str) -> None:
    """One tensor of the result, a few rows at a time."""
    if merged.as_stored(name):
        file.copy(name, merged.checkpoint.tensors[name])
        return
    for slab in merged.slabs(name):
        file.append(name, slab)


def read_adapter(folder: Path) -> Adapter:
    """A peft folder of LoRA, rsLoRA or DoRA weights, modules saved in full and rows trained for some tokens."""
    config = read_json(folder / "adapter_config.json", "pass the run's adapter/ folder")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        found = f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError("an adapter must be LoRA without trained biases", found, "merge it with peft", str(folder))
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError("an adapter must hold adapter_model.safetensors", "no such file", "pass adapter/", str(folder))
    adapter, parts = Adapter(folder, stays_tied=bool(config.get("ensure_weight_tying"))), {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  not a dict
            name = key.removeprefix(PREFIX)
            match = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name)
            if match:
                parts.setdefault(match[1], {})[match[2]] = file.get_tensor(key).float()
            elif "lora_" in name or not key.startswith(PREFIX):
                raise UserError("an adapter's tensors must be lora_A and lora_B", key, "merge it with peft", str(path))
            elif name.endswith(TOKENS):
                module = name.removesuffix(TOKENS)
                adapter.tokens[f"{module}.weight"] = (token_indices(module, config), file.get_tensor(key))
            elif ".original_module." not in name:  # which is the base's, with as many rows as it was given
                name = name.replace(".modules_to_save.", ".").replace(".token_adapter.base_layer.", ".")
                adapter.saved[name] = file.get_tensor(key)
    for module, part in parts.items():
        if not {"lora_A", "lora_B"} <= set(part):
            raise UserError("each lora_A must have its lora_B", module, "the adapter is damaged", str(path))
        A, B = part["lora_A"], part["lora_B"]
        scaling = scale_of(module, config, A.shape[0])
        adapter.updates[f"{module}.weight"] = Update(A, B, scaling, part.get("lora_magnitude_vector"))
    return adapter


def token_indices(module: str, config: dict[str, Any]) -> list[int]:
    """Which rows of an embedding its trained ones replace; a list is for the input embedding and what is tied to it."""
    found = config.get("trainable_token_indices") or []
    if isinstance(found, list):
        return found
    return next((v for name, v in found.items() if module == name or module.endswith(f".{name}")), [])


def scale_of(module: str, config: dict[str, Any], rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; alpha may have a pattern for this module, as peft matches it."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def check_belongs(adapter: Adapter, shapes: Shapes, folder: Path) -> None:
    """Every update must find its weight, in shape."""
    for name, update in adapter.updates.items():
        shape = (update.B_NR.shape[0], update.A_RK.shape[1])
        dtype, found = shapes.get(name, (None, None))
        if found != shape or dtype not in DTYPES:
            raise UserError(
                f"the model must have the adapter's {name} of shape {list(shape)}",
                "no such tensor" if found is None else f"{dtype} {list(found)}",
                "use the model that the adapter was trained on",
                str(folder),
            )


def saved_tensors(adapter: Adapter, checkpoint: Checkpoint, shapes: Shapes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors that are not the base's, and config.json for the result.

    A head or an embedding trained on its own unties the two; tokens added in training change the vocabulary's size.
    """
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    saved = dict(adapter.saved)
    embedding = next((n for n in shapes if n.endswith("embed_tokens.weight")), "")
    for name, (rows, values) in adapter.tokens.items():
        stored = checkpoint.tensors.get(name if name in shapes else embedding)
        if stored is None or len(rows) != len(values):
            found = f"{len(values)} rows for {len(rows)} tokens of {name}"
            raise UserError("trained tokens must be an embedding's", found, "use their own model", str(adapter.folder))
        W = saved[name].clone() if name in saved else read_tensor(stored)
        W[rows] = values.to(W.dtype)
        saved[name] = W
    for name in set(saved) - set(shapes) - {HEAD}:
        raise UserError("a module saved in full must be the model's", name, "use its own model", str(adapter.folder))
    trained = {embedding, HEAD} & set(adapter.saved)
    if trained and config.get("tie_word_embeddings") and HEAD not in shapes:
        config["tie_word_embeddings"] = settle_ties(adapter, saved, embedding, checkpoint)
    if trained:
        found = {name: tensor.shape[0] for name, tensor in saved.items() if name in (embedding, HEAD)}
        found = {name: shapes[name][1][0] for name in (embedding, HEAD) if name in shapes} | found
        if len(set(found.values())) > 1:
            do = "train both in full: modules_to_save embed_tokens and lm_head"
            raise UserError("embedding and head must have the same tokens", str(found), do, str(adapter.folder))
        config["vocab_size"] = min(found.values())
    return saved, config


def settle_ties(adapter: Adapter, saved: dict[str, Tensor], embedding: str, checkpoint: Checkpoint) -> bool:
    """Give `saved` an embedding and a head where the base has one for both; whether they are still the same."""
    base = read_tensor(checkpoint.tensors[embedding])
    head = saved.pop(HEAD, None)
    if adapter.stays_tied:
        head = saved.get(embedding, head)
        saved[embedding] = base if head is None else head
    head = base if head is None else head
    if torch.equal(head, saved.setdefault(embedding, base)):
        return True
    saved[HEAD] = head
    return False
