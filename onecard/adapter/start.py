"""A start of LoRA that corrects its 4-bit base: A and B of each linear, made while the base was quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onecard.adapter.layers import LoraLinear4bit
from onecard.errors import UserError

Start = dict[str, tuple[Tensor, Tensor]]  # by weight: A (R, K), B (N, R), float32; B A is the correction


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
            own_A[: len(A)] = A.to(own_A.device)  # B is zero behind the start's rank
            own_B[:, : len(A)] = B.to(own_B.device) / module.scaling[key]
    if left:
        raise not_fitting(f"{len(left)} linears without LoRA, first {min(left)}")


def not_fitting(found: str) -> UserError:
    return UserError(
        "a start must be of the linears that LoRA trains", found, "calibrate again in a new output", "start"
    )
