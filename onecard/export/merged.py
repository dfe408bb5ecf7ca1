"""An adapter merged into 16-bit weights, streamed tensor by tensor: memory for about one tensor, not for two models.

    W' = W + s B A        DoRA: W' = m (W + s B A) / ||W + s B A||, norms of rows (arXiv 2402.09353)

W is by default what training saw, the dequantized 4-bit weight, in every linear that had one; "original" takes the
checkpoint's own weights, which the adapter has never met. Sums are float32, rounded once to the checkpoint's dtype.
Experts' matrices are merged one by one, whether the checkpoint has them in tensors of their own or stacked.
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
from onecard.export.experts import matrix_factors, matrix_info, matrix_key, read_experts, stack_layers
from onecard.export.folder import DTYPES, check_room, new_folder, read_tensor, write_others
from onecard.hf.checkpoint import DTYPE_BITS, Checkpoint, inspect_checkpoint, read_json
from onecard.hf.experts import Place, expert_places
from onecard.hf.load import find_checkpoint
from onecard.hf.writer import TensorFile
from onecard.kernels import ops
from onecard.memory.plan import read_model
from onecard.memory.stacks import Stack
from onecard.quant.blockwise import state_absmax
from onecard.quant.state import BNB_KEYS, STATE_KEY, QuantState, from_bnb, part_of, read_facts

Base = Literal["dequantized", "original"]
Shapes = dict[str, tuple[str, tuple[int, ...]]]
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SUFFIXES = tuple(f".{key}" for key in BNB_KEYS)
PREFIX = "base_model.model."
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
    config: dict[str, Any] = field(default_factory=dict)  # peft's


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
    stacks: dict[str, Stack]
    places: dict[str, Place]  # of experts' tensors in stacks
    held: dict[str, tuple[Tensor, QuantState]] = field(default_factory=dict)  # stacked weights in 4 bits

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
            for expert in range(self.shapes[name][1][0]) if self.is_stack(name) else [None]:
                update = self.adapter.updates.get(name if expert is None else matrix_key(name, expert))
                for start, piece in self.base_slabs(name, expert):
                    piece = piece if update is None else update.add_to(piece, start)
                    yield piece.to(DTYPES[self.shapes[name][0]])

    def is_stack(self, name: str) -> bool:
        """Whether a tensor is a stacked weight, a matrix for each expert."""
        return name in self.places and self.places[name].expert is None

    def as_stored(self, name: str) -> bool:
        """Whether a tensor is in the base just as it will be in the result."""
        key = matrix_key(name, 0) if self.is_stack(name) else name
        return name not in self.full and name not in self.rounded and key not in self.adapter.updates

    def base_slabs(self, name: str, expert: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """A matrix of the base, (N, K), in float32: the first row's number and some rows.

        Args:
            expert: whose matrix of a stacked tensor.
        """
        N, K = self.shapes[name][1][-2:]
        rows = max(SLAB_VALUES // K, 1)
        if name not in self.rounded:
            info = self.checkpoint.tensors[name]
            W = read_tensor(info if expert is None else matrix_info(info, expert))
            yield from ((start, W[start : start + rows].float()) for start in range(0, N, rows))
            return
        (packed, state), first, place = self.in_4bit(name), 0, self.places.get(name)
        if place is not None:
            packed, state, skip = part_of(packed, state, place.expert if expert is None else expert)
            first = skip + place.part * N * K
        absmax = state_absmax(state)
        for start in range(0, N, rows):
            piece = dequantized(packed, absmax, state, first + start * K, min(rows, N - start) * K)
            yield start, piece.view(-1, K)

    def in_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        """Codes and state of a weight as training had it; of an expert's tensor, those of the whole stack."""
        if name not in self.places:
            return self.quantized(name)
        stack = self.places[name].stack
        if stack not in self.held:
            if len(self.held) == 2:  # those of one layer
                del self.held[next(iter(self.held))]
            self.held[stack] = self.quantized(name)
        return self.held[stack]

    def quantized(self, name: str) -> tuple[Tensor, QuantState]:
        quant, info, place = self.quant, self.checkpoint.tensors[name], self.places.get(name)
        how = (quant.quant_type, quant.blocksize, quant.double_quant)
        if info.dtype == "U8":
            return read_4bit(self.checkpoint, name)
        if place is None:
            return ops.quantize_4bit(read_tensor(info), *how, name)
        experts = read_experts(self.checkpoint, self.places, place.stack)
        return ops.quantize_stack(experts, self.stacks[place.stack].weight.shape, *how, place.stack)


def dequantized(packed: Tensor, absmax: Tensor, state: QuantState, first: int, count: int) -> Tensor:
    """`count` weights from number `first` on, float32, of a weight whose scales `absmax` are float32."""
    block = first // state.blocksize
    skip = first - block * state.blocksize
    out = torch.empty(skip + count)
    codes = packed.view(-1)[block * state.blocksize // 2 : (first + count + 1) // 2]
    weight = (codes, absmax[block:], None, None, state.quant_type, state.blocksize)
    ops.backend(out.device).dequantize_into(*weight, out)
    return out[skip:]


def open_merged(
    model: str, adapter: str | None, base: Base = "dequantized", quant: QuantConfig | None = None
) -> Merged:
    """The checkpoint that `model` and a trained adapter, or none, make together.

    Args:
        model: the checkpoint that the adapter was trained on, in 16 bits or in bitsandbytes' 4-bit format.
        base: "dequantized" adds to what training saw, "original" to the checkpoint's own weights.
        quant: how training stored a 16-bit base; the defaults if not given.

    Raises:
        UserError: an adapter that does not belong to the model or is of a kind not known here; the original weights
            of a checkpoint that has none.
    """
    checkpoint = inspect_checkpoint(find_checkpoint(model))
    if checkpoint.is_4bit and base == "original":
        found = "a checkpoint in 4 bits"
        raise UserError("the original weights must be in the checkpoint", found, "use the dequantized ones", model)
    tuned = read_adapter(Path(adapter)) if adapter is not None else Adapter()
    shapes, known = stored_shapes(checkpoint), read_model(checkpoint)
    places = expert_places(known.modules, known.stacks, shapes) if known.stacks else {}
    spread_over_experts(tuned, known.stacks, places)
    check_belongs(tuned, shapes, checkpoint.folder)
    rounded = {name for name in shapes if checkpoint.tensors[name].dtype == "U8"}
    if base == "dequantized":
        rounded |= set(places) | (set() if checkpoint.is_4bit else set(known.linears) & set(shapes))
    full, config = saved_tensors(tuned, checkpoint, shapes)
    for name, tensor in full.items():
        dtype = shapes[name][0] if name in shapes else common_dtype(shapes)
        shapes[name] = (dtype, tuple(tensor.shape))
    return Merged(checkpoint, tuned, quant or QuantConfig(), config, shapes, rounded, full, known.stacks, places)


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


def merge(model: str, adapter: str, output: str, base: Base = "dequantized", quant: QuantConfig | None = None) -> Path:
    """Write a 16-bit checkpoint with the adapter in it; its folder. Arguments and errors are open_merged's.

    Raises:
        UserError: no room on the disk; an output folder that is not new.
    """
    merged, target = open_merged(model, adapter, base, quant), Path(output)
    sizes = [DTYPE_BITS[dtype] // 8 * prod(shape) for dtype, shape in merged.shapes.values()]
    check_room(target, sum(sizes))
    places: dict[str, str] = {}
    with new_folder(target) as folder:
        for file in merged.checkpoint.files:
            infos = merged.checkpoint.tensors
            last = file == merged.checkpoint.files[-1]
            names = [n for n in merged.shapes if (infos[n].file == file if n in infos else last)]
            write_file(folder / file.name, merged, names)
            places |= dict.fromkeys(names, file.name)
        write_others(folder, merged.checkpoint, merged.config, places)
    return target


def write_file(path: Path, merged: Merged, names: list[str]) -> None:
    """One safetensors file with these tensors of the result."""
    file = TensorFile(path, {name: merged.shapes[name] for name in names})
    for name in names:
        if merged.as_stored(name):
            file.copy(name, merged.checkpoint.tensors[name])
            continue
        for slab in merged.slabs(name):
            file.append(name, slab)
    file.close()


def read_adapter(folder: Path) -> Adapter:
    """A peft folder of LoRA, rsLoRA or DoRA weights and modules saved in full."""
    config = read_json(folder / "adapter_config.json", "pass the run's adapter/ folder")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        found = f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError("an adapter must be LoRA without trained biases", found, "merge it with peft", str(folder))
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError("an adapter must hold adapter_model.safetensors", "no such file", "pass adapter/", str(folder))
    adapter, parts = Adapter(folder, config=config), {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  not a dict
            name = key.removeprefix(PREFIX)
            match = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name)
            if match:
                parts.setdefault(match[1], {})[match[2]] = file.get_tensor(key).float()
            elif "lora_" in name or not key.startswith(PREFIX):
                raise UserError("an adapter's tensors must be lora_A and lora_B", key, "merge it with peft", str(path))
            else:
                adapter.saved[name] = file.get_tensor(key)
    for module, part in parts.items():
        if not {"lora_A", "lora_B"} <= set(part):
            raise UserError("each lora_A must have its lora_B", module, "the adapter is damaged", str(path))
        A, B = part["lora_A"], part["lora_B"]
        scaling = scale_of(module, config, A.shape[0])
        adapter.updates[f"{module}.weight"] = Update(A, B, scaling, part.get("lora_magnitude_vector"))
    return adapter


def spread_over_experts(adapter: Adapter, stacks: dict[str, Stack], places: dict[str, Place]) -> None:
    """Replace an adapter's updates of stacked weights by one for each of their matrices in the checkpoint."""
    for layer, stack in stack_layers(stacks, adapter.config.get("target_parameters") or []).items():
        update, num_experts = adapter.updates.pop(f"{layer}.weight", None), stacks[stack].num_experts
        if update is None:
            continue
        rank, rest = divmod(update.A_RK.shape[0], num_experts)
        if rest or update.B_NR.shape[1] != rank * num_experts:
            found = f"lora_A {list(update.A_RK.shape)}, lora_B {list(update.B_NR.shape)}"
            must = f"an adapter of {stack} must have the same rank for each of {num_experts} experts"
            raise UserError(must, found, "use the model that the adapter was trained on", str(adapter.folder))
        scaling = scale_of(stack, adapter.config, rank)
        for name, place in places.items():
            if place.stack == stack:
                for key, A_RK, B_NR in matrix_factors(name, place, stacks[stack], update.A_RK, update.B_NR):
                    adapter.updates[key] = Update(A_RK, B_NR, scaling)


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
        dtype, found = shapes.get(name.partition("[")[0], (None, None))
        found = found and found[-2:]
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
    embedding = next((n for n in shapes if n.endswith("embed_tokens.weight")), None)
    tied = config.get("tie_word_embeddings") and "lm_head.weight" not in shapes
    trained = [name for name in saved if name == "lm_head.weight" or name.endswith("embed_tokens.weight")]
    if tied and trained:
        config["tie_word_embeddings"] = False
        if "lm_head.weight" not in saved and embedding is not None:
            saved["lm_head.weight"] = read_tensor(checkpoint.tensors[embedding])
    for name in set(saved) - set(shapes) - {"lm_head.weight"}:
        raise UserError("a module saved in full must be the model's", name, "use its own model", str(adapter.folder))
    for name in trained:
        config["vocab_size"] = adapter.saved[name].shape[0]
    return saved, config
