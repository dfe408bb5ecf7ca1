"""A start of LoRA that corrects its 4-bit base: A and B of each linear.

LoftQ (arXiv 2310.08659) starts from the best B A of rank r for what rounding to 4 bits left, D = W - W_4bit, where W is
the checkpoint's weight. This is its first step, and peft's `replace_lora_weights_loftq`: the base stays as it is. With
`calibrate` the start is made with the base instead (`export/calibrated`).

The best rank r part of D is U U^T D, with U the first eigenvectors of D D^T, or D V V^T. One weight is in memory at a
time. Unlike peft's, our B is divided by LoRA's scale, so that the linears compute W_4bit + B A at any lora_alpha.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from onecard.adapter.layers import LoraLinear4bit, adapted_linears
from onecard.config import LoraSettings
from onecard.errors import UserError
from onecard.hf.checkpoint import Checkpoint, inspect_checkpoint
from onecard.hf.names import stored_names
from onecard.hf.skeleton import kept_packed, read_model
from onecard.hf.stored import FLOAT_DTYPES, TensorInfo, read_tensor

Start = dict[str, tuple[Tensor, Tensor]]  # by weight: A (R, K), B (N, R), float32; B A is the correction


def residual_sources(checkpoint: Checkpoint, model: Any, linears: Iterable[str]) -> dict[str, TensorInfo]:
    """Return the tensor of the checkpoint of each linear, by the linear's name.

    Args:
        model: transformers' model of the checkpoint; its weights may be on the meta device.

    Raises:
        UserError: the checkpoint has codes instead of weights, or stores the linears in another form.
    """
    stored = stored_names(model, checkpoint.tensors)
    found = {name: checkpoint.tensors[stored[f"{name}.weight"]] for name in linears if f"{name}.weight" in stored}
    kept = kept_packed(model, checkpoint)
    exact = {name for name in found if found[name].dtype in FLOAT_DTYPES and f"{name}.weight" not in kept}
    missing = [name for name in linears if name not in exact]
    if missing:
        must = "init_lora_weights loftq needs the linears' weights as the checkpoint stores them, in 16 or 32 bits"
        what = "in 4 bits" if missing[0] in found else "made from other tensors"
        do = "pass the checkpoint in 16 bits, or use another start"
        raise UserError(must, f"{missing[0]} is {what}", do, str(checkpoint.folder))
    return found


def check_loftq(checkpoint: Checkpoint, modules: Any, linears: Iterable[str], settings: LoraSettings) -> None:
    """Raise UserError, same as `residual_sources`, for the linears that the settings give a LoRA."""
    residual_sources(checkpoint, modules, adapted_linears(settings, linears))


@torch.no_grad()
def set_loftq(model: Any, folder: Path) -> None:
    """Set the LoRA weights of a peft model, whose base was loaded from `folder`, to LoftQ's start."""
    checkpoint = inspect_checkpoint(folder)
    modules = read_model(checkpoint).modules
    named = {p.removeprefix("base_model.model."): m for p, m in model.named_modules() if isinstance(m, LoraLinear4bit)}
    for name, info in residual_sources(checkpoint, modules, list(named)).items():
        layer = named[name]
        base: Any = layer.get_base_layer()
        W_4bit = base.dequantize()
        D = read_tensor(info).to(W_4bit.device, torch.float32, copy=True)
        D = D.T if isinstance(modules.get_submodule(name), Conv1D) else D
        D -= W_4bit
        del W_4bit
        (key,) = layer.active_adapters
        set_start_of(layer, key, *low_rank(D, layer.r[key]))


def low_rank(D_NK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (R, K) and B (N, R) of the B A that is nearest to D, float32 (N, K), each with half of its strength."""
    N, K = D_NK.shape
    if N > K:
        B_T, A_T = low_rank(D_NK.T, rank)
        return A_T.T, B_T.T
    U_NR = torch.linalg.eigh(D_NK @ D_NK.T)[1][:, -rank:].flip(1)  # the largest first
    A_RK = U_NR.T @ D_NK
    root_R = A_RK.norm(dim=1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return A_RK / root_R[:, None], U_NR * root_R


def set_start_of(layer: LoraLinear4bit, key: str, A: Tensor, B: Tensor) -> None:
    """Set an adapter's weights of one layer to A (R, K) and B / scale (N, R), with zeros behind a smaller rank."""
    own_A: Any = layer.lora_A[key].weight
    own_B: Any = layer.lora_B[key].weight
    own_A[: len(A)] = A.to(own_A.device)  # B is zero behind the start's rank
    own_B[:, : len(A)] = B.to(own_B.device) / layer.scaling[key]


def set_start(model: Any, start: Start) -> None:
    """Set the LoRA weights of a peft model so that the linears compute W + B A. B is divided by LoRA's scale.

    Raises:
        UserError: the start is of linears that the model has no LoRA on, or of a larger rank.
    """
    left = dict(start)
    with torch.no_grad():
        for path, module in model.named_modules():
            name = f"{path.removeprefix('base_model.model.')}.weight"
            if not isinstance(module, LoraLinear4bit) or name not in left:
                continue
            (key,) = module.active_adapters
            A, B = left.pop(name)
            own_A: Any = module.lora_A[key].weight
            own_B: Any = module.lora_B[key].weight
            if len(A) > len(own_A) or (A.shape[1], B.shape[0]) != (own_A.shape[1], own_B.shape[0]):
                raise not_fitting(f"A {list(A.shape)} and B {list(B.shape)} for {name}")
            set_start_of(module, key, A, B)
    if left:
        raise not_fitting(f"{len(left)} linears without LoRA, first {min(left)}")


def not_fitting(found: str) -> UserError:
    return UserError(
        "a start must be of the linears that LoRA trains", found, "calibrate again in a new output", "start"
    )
