"""An adapter merged into 16-bit weights, streamed tensor by tensor: memory for about one tensor, not for two models.

    W' = W + s B A        DoRA: W' = m (W + s B A) / ||W + s B A||, norms of rows (arXiv 2402.09353)

W is by default what training saw, the dequantized 4-bit weight, in every linear that had one; "original" takes the
checkpoint's own weights, which the adapter has never met. Sums are float32, rounded once to the checkpoint's dtype.
4 bits again would undo most of the update, so the result is 16-bit. The output is written under a temporary name,
file by file as the base has them, and renamed when whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from onecard.config import QuantConfig
from onecard.errors import UserError
from onecard.export.folder import DTYPES, check_room, new_folder, read_tensor, write_others
from onecard.hf.checkpoint import Checkpoint, TensorInfo, inspect_checkpoint, read_json
from onecard.hf.load import find_checkpoint
from onecard.hf.writer import TensorFile
from onecard.kernels import ops
from onecard.memory.model import read_model
from onecard.quant.blockwise import state_absmax

Base = Literal["dequantized", "original"]
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PREFIX = "base_model.model."
SLAB_VALUES = 1 << 22


@dataclass
class Update:
    """One linear's part of an adapter: B (N, r), A (r, K), DoRA's magnitude (N,), all float32."""

    A_RK: Tensor
    B_NR: Tensor
    scaling: float
    magnitude_N: Tensor | None = None


@dataclass
class Adapter:
    """A peft adapter folder, read and checked."""

    folder: Path
    updates: dict[str, Update] = field(default_factory=dict)  # by the name of the weight that each changes
    saved: dict[str, Tensor] = field(default_factory=dict)  # trained in full: these replace the base's


def merge(model: str, adapter: str, output: str, base: Base = "dequantized", quant: QuantConfig | None = None) -> Path:
    """Write a 16-bit checkpoint with the adapter in it; its folder.

    Args:
        model: the checkpoint that the adapter was trained on.
        base: "dequantized" adds to what training saw, "original" to the checkpoint's own weights.
        quant: how training stored the base; the defaults if not given.

    Raises:
        UserError: an adapter that does not belong to the model or is of a kind not known here; no room on the disk;
            an output folder that is not new.
    """
    checkpoint, target = inspect_checkpoint(find_checkpoint(model)), Path(output)
    tuned = read_adapter(Path(adapter))
    check_belongs(tuned, checkpoint)
    check_room(target, checkpoint.nbytes)
    linears = set(read_model(checkpoint).linears) if base == "dequantized" else set()
    more, config = extra_tensors(tuned, checkpoint)
    places: dict[str, str] = {}
    with new_folder(target) as folder:
        for file in checkpoint.files:
            extra = more if file == checkpoint.files[-1] else {}
            names = write_file(folder / file.name, checkpoint, tuned, linears, quant or QuantConfig(), extra)
            places |= dict.fromkeys(names, file.name)
        write_others(folder, checkpoint, config, places)
    return target


def read_adapter(folder: Path) -> Adapter:
    """A peft folder of LoRA, rsLoRA or DoRA weights and modules saved in full."""
    config = read_json(folder / "adapter_config.json", "pass the run's adapter/ folder")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        found = f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError("an adapter must be LoRA without trained biases", found, "merge it with peft", str(folder))
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError("an adapter must hold adapter_model.safetensors", "no such file", "pass adapter/", str(folder))
    adapter, parts = Adapter(folder), {}
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


def scale_of(module: str, config: dict[str, Any], rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; alpha may have a pattern for this module, as peft matches it."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def check_belongs(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Every update must find its weight, in shape."""
    for name, update in adapter.updates.items():
        info = checkpoint.tensors.get(name)
        shape = (update.B_NR.shape[0], update.A_RK.shape[1])
        if info is None or info.shape != shape or info.dtype not in DTYPES:
            found = "no such tensor" if info is None else f"{info.dtype} {list(info.shape)}"
            raise UserError(
                f"the model must have the adapter's {name} of shape {list(shape)}",
                found,
                "use the model that the adapter was trained on",
                str(checkpoint.folder),
            )


def extra_tensors(adapter: Adapter, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors that the base's files do not have, and config.json for the result.

    A head or an embedding trained on its own unties the two; tokens added in training change the vocabulary's size.
    """
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    more = {name: tensor for name, tensor in adapter.saved.items() if name not in checkpoint.tensors}
    embedding = next((n for n in checkpoint.tensors if n.endswith("embed_tokens.weight")), None)
    tied = config.get("tie_word_embeddings") and "lm_head.weight" not in checkpoint.tensors
    trained = [name for name in adapter.saved if name == "lm_head.weight" or name.endswith("embed_tokens.weight")]
    if tied and trained:
        config["tie_word_embeddings"] = False
        if "lm_head.weight" not in adapter.saved and embedding is not None:
            more["lm_head.weight"] = read_tensor(checkpoint.tensors[embedding])
    for name in set(more) - {"lm_head.weight"}:
        raise UserError("a module saved in full must be the model's", name, "use its own model", str(adapter.folder))
    for name in trained:
        config["vocab_size"] = adapter.saved[name].shape[0]
    return more, config


def write_file(
    path: Path, checkpoint: Checkpoint, adapter: Adapter, linears: set[str], quant: QuantConfig, more: dict[str, Tensor]
) -> list[str]:
    """One safetensors file as the base has it, tensor by tensor, with `more`; the names in it."""
    source = checkpoint.folder / path.name
    infos = {name: info for name, info in checkpoint.tensors.items() if info.file == source}
    full = {**{name: tensor for name, tensor in adapter.saved.items() if name in infos}, **more}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {name: (info.dtype, info.shape) for name, info in infos.items()}
    for name, tensor in full.items():
        shapes[name] = (NAMES[stored_dtype(name, tensor, infos)], tuple(tensor.shape))
    file = TensorFile(path, shapes)
    for name in shapes:
        if name in full:
            file.append(name, full[name].to(stored_dtype(name, full[name], infos)))
        elif name in adapter.updates or name in linears:
            for slab in merged_slabs(infos[name], adapter.updates.get(name), name in linears, quant, name):
                file.append(name, slab)
        else:
            file.copy(name, infos[name])
    file.close()
    return list(shapes)


def stored_dtype(name: str, tensor: Tensor, infos: dict[str, TensorInfo]) -> torch.dtype:
    """A tensor trained in full goes back to its place's dtype; a new one keeps its own, at most that of a place."""
    if name in infos:
        return DTYPES[infos[name].dtype]
    return next((DTYPES[info.dtype] for info in infos.values() if info.dtype in DTYPES), tensor.dtype)


def merged_slabs(
    info: TensorInfo, update: Update | None, dequantized: bool, quant: QuantConfig, name: str
) -> Iterator[Tensor]:
    """The merged weight, some rows at a time, in the dtype of the checkpoint."""
    W = read_tensor(info)
    N, K = W.shape
    rows = max(SLAB_VALUES // K // quant.blocksize, 1) * quant.blocksize  # so that a slab starts with a block
    packed = absmax = None
    if dequantized:
        packed, state = ops.quantize_4bit(W, quant.quant_type, quant.blocksize, quant.double_quant, name)
        absmax = state_absmax(state)
    for start in range(0, N, rows):
        piece = W[start : start + rows].float()
        if packed is not None and absmax is not None:
            first = start * K
            codes = packed[first // 2 : (first + piece.numel() + 1) // 2]
            scales = absmax[first // quant.blocksize :]
            weight = (codes, scales, None, None, quant.quant_type, quant.blocksize)
            ops.backend(piece.device).dequantize_into(*weight, piece)
        if update is not None:
            piece += update.scaling * (update.B_NR[start : start + rows] @ update.A_RK)
            if update.magnitude_N is not None:
                norm = torch.linalg.vector_norm(piece, dim=1, keepdim=True)
                piece *= update.magnitude_N[start : start + rows, None] / norm
        yield piece.to(W.dtype)
