"""A peft adapter folder: its LoRA updates, and the weights that it trained in full."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from onecard.adapter.load import WEIGHTS, modules_of, read_config, stored_tensors
from onecard.errors import UserError
from onecard.hf.quantizer import check_finite
from onecard.nn.grid import add_update
from onecard.patterns import first_match

PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"  # despite its name it holds the rows, not differences
NOT_ADDED = ("alora_invocation_tokens",)  # its update applies to some tokens only


@dataclass
class Update:
    """One linear's update: B (N, r), A (r, K), DoRA's magnitude (N,), all float32."""

    A_RK: Tensor
    B_NR: Tensor
    scaling: float
    magnitude_N: Tensor | None = None

    def add_to(self, W_NK: Tensor, start: int) -> Tensor:
        """Return the weight's float32 rows with the update added. W_NK holds its rows from `start` on."""
        rows = slice(start, start + W_NK.shape[0])
        W_NK = add_update(W_NK, self.A_RK, self.B_NR[rows], self.scaling)
        if self.magnitude_N is not None:
            W_NK *= self.magnitude_N[rows, None] / torch.linalg.vector_norm(W_NK, dim=1, keepdim=True)
        return W_NK


@dataclass
class Adapter:
    """The contents of a peft adapter folder, after the checks of `read_adapter`."""

    folder: Path | None = None
    updates: dict[str, Update] = field(default_factory=dict)  # by the name of the weight
    saved: dict[str, Tensor] = field(default_factory=dict)  # trained in full: they replace the base's
    biases: dict[str, Tensor] = field(default_factory=dict)  # lora_bias, scaled: they are added to the base's biases
    tokens: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)  # an embedding's trained rows
    stays_tied: bool = False
    config: dict[str, Any] = field(default_factory=dict)  # adapter_config.json

    def renamed(self, names: dict[str, str]) -> Adapter:
        """Return the adapter under other names for the model's weights, such as a checkpoint's."""
        updates, saved, biases, tokens = (
            {names.get(name, name): value for name, value in found.items()}
            for found in (self.updates, self.saved, self.biases, self.tokens)
        )
        return replace(self, updates=updates, saved=saved, biases=biases, tokens=tokens)


def read_adapter(folder: Path) -> Adapter:
    """Read a peft folder of LoRA, rsLoRA or DoRA weights, modules saved in full, and trained rows of an embedding.

    Raises:
        UserError: a file is missing or damaged; a value is not finite; an adapter that merge cannot add.
    """
    stored = stored_tensors(folder)
    config = read_config(folder, modules_of(stored))
    more = [f"{key} {config[key]}" for key in NOT_ADDED if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or more:
        found = ", ".join([f"peft_type {config.get('peft_type')}", f"bias {config.get('bias')}", *more])
        must = "an adapter must be LoRA on linears without trained biases"
        raise UserError(must, found, "merge it with peft", str(folder))
    path = folder / WEIGHTS
    adapter, parts = Adapter(folder, stays_tied=bool(config.get("ensure_weight_tying")), config=config), {}
    with safe_open(path, "pt") as file:
        for key in stored:
            tensor = file.get_tensor(key)
            check_finite(f"{path}: {key}", tensor)
            name = key.removeprefix(PREFIX)
            match = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|lora_B\.bias)(?:\.weight)?", name)
            if match:
                parts.setdefault(match[1], {})[match[2]] = tensor.float()
            elif "lora_" in name or not key.startswith(PREFIX):
                raise UserError("an adapter's tensors must be lora_A and lora_B", key, "merge it with peft", str(path))
            elif name.endswith(TOKENS):
                module = name.removesuffix(TOKENS)
                adapter.tokens[f"{module}.weight"] = (token_indices(module, config), tensor)
            elif ".original_module." not in name:  # a copy of the base's weight
                name = name.replace(".modules_to_save.", ".").replace(".token_adapter.base_layer.", ".")
                adapter.saved[name] = tensor
    for module, part in parts.items():
        if not {"lora_A", "lora_B"} <= set(part):
            found = f"{PREFIX}{module} with {next(iter(part))} alone"
            raise UserError("each lora_A must have its lora_B", found, "use another copy of the adapter", str(path))
        A, B = part["lora_A"], part["lora_B"]
        scaling = scale_of(module, config, A.shape[0])
        adapter.updates[f"{module}.weight"] = Update(A, B, scaling, part.get("lora_magnitude_vector"))
        if "lora_B.bias" in part:
            adapter.biases[f"{module}.bias"] = scaling * part["lora_B.bias"]
    return adapter


def token_indices(module: str, config: dict[str, Any]) -> list[int]:
    """Return the rows of an embedding that were trained. A list is for the input embedding and its tied head."""
    found = config.get("trainable_token_indices") or []
    if isinstance(found, list):
        return found
    return next((v for name, v in found.items() if module == name or module.endswith(f".{name}")), [])


def scale_of(module: str, config: dict[str, Any], rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA. alpha_pattern may set a module's alpha."""
    alpha = first_match(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
