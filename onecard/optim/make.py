"""The optimizer that `optim` names, its groups of parameters, and the bytes of its states.

LoRA+ (arXiv 2402.12354) gives lora_B, and vectors, loraplus_lr_ratio times the learning rate. The groups are those of
peft's create_loraplus_optimizer. A bias of lora_B has no weight decay, as in transformers and peft.

Muon (torch.optim.Muon) orthogonalizes the momentum of each matrix. It takes LoRA's matrices, and AdamW takes all else.
Its step is scaled to AdamW's root mean square, so that the learning rates of AdamW fit.
"""

from __future__ import annotations

from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch

from onecard.config import ADAMW, TrainConfig
from onecard.errors import UserError
from onecard.optim.adamw import SMALL, AdamW
from onecard.optim.library import LibraryOptimizer
from onecard.optim.lion import Lion
from onecard.paging.states import PagedStates
from onecard.quant.dynamic import STATE_BLOCKSIZE

Optimizer = AdamW | LibraryOptimizer


def make_optimizer(trainable: dict[str, torch.nn.Parameter], config: TrainConfig) -> Optimizer:
    """Create the optimizer for the trainable weights."""
    name = config.optim
    groups = parameter_groups(trainable, config)
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    betas = (config.adam_beta1, config.adam_beta2)
    if name in ADAMW:
        return AdamW(
            groups,
            betas=betas,
            eps=config.adam_epsilon,
            state_bits=8 if name.endswith("8bit") else 32,
            paged=PagedStates(Path(config.output)) if name.startswith("paged") else None,
            **common,
        )
    if name == "muon":
        matrices = {n: p for n, p in trainable.items() if is_lora_matrix(n, p)}
        others = {n: p for n, p in trainable.items() if n not in matrices}
        found: list[Any] = []
        if matrices:
            found.append(torch.optim.Muon(parameter_groups(matrices, config), adjust_lr_fn="match_rms_adamw", **common))
        if others:
            found.append(AdamW(parameter_groups(others, config), betas=betas, eps=config.adam_epsilon, **common))
        return LibraryOptimizer(found)
    if name in ("lion", "lion_32bit"):
        return LibraryOptimizer([Lion(groups, betas=betas, **common)])
    if name == "sgd":
        return LibraryOptimizer([torch.optim.SGD(groups, **common)])
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return LibraryOptimizer([Adafactor(groups, scale_parameter=False, relative_step=False, **common)])
    check_package(name)
    from schedulefree import AdamWScheduleFree

    return LibraryOptimizer([AdamWScheduleFree(groups, betas=betas, eps=config.adam_epsilon, **common)])


def check_package(name: str) -> None:
    """Raise UserError unless the package that an optimizer needs is installed."""
    if name == "schedule_free_adamw" and find_spec("schedulefree") is None:
        do = 'pip install "onecard[schedulefree]"'
        raise UserError("schedule_free_adamw needs the package schedulefree", "none", do, "optim")


def parameter_groups(trainable: dict[str, torch.nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """Return the parameters by their learning rate, as a multiple "lr_ratio" of the run's, and their weight decay."""
    ratio = config.loraplus_lr_ratio or 1.0
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, p in trainable.items():
        is_fast = ratio != 1.0 and ("lora_B" in name or p.ndim == 1)
        decays = not (".lora_B." in name and name.endswith(".bias"))
        key = (ratio if is_fast else 1.0, config.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(p)
    rate = config.learning_rate
    return [{"params": ps, "lr": rate * r, "lr_ratio": r, "weight_decay": wd} for (r, wd), ps in groups.items()]


def is_lora_matrix(name: str, p: torch.nn.Parameter) -> bool:
    return p.ndim == 2 and ("lora_A" in name or "lora_B" in name)


def owners_of(sizes: list[int], count: int) -> list[int]:
    """Return which of `count` processes has the states of each tensor, if they are sharded: the one with the fewest
    weights so far. `sizes` are the tensors' numbers of weights."""
    held, owners = [0] * count, []
    for size in sizes:
        owners.append(held.index(min(held)))
        held[owners[-1]] += size
    return owners


def largest_share(sizes: list[int], num_bytes: list[int], count: int) -> int:
    """Return the bytes of the states of the process that has most of them, of `count`.

    Args:
        sizes, num_bytes: each tensor's number of weights, and the bytes of its states.
    """
    own = [0] * count
    for owner, size in zip(owners_of(sizes, count), num_bytes):
        own[owner] += size
    return max(own)


def state_bytes(optim: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a float32 parameter's states."""
    n = prod(shape)
    if optim.endswith("8bit") and n >= SMALL:
        return 2 * n + 8 * -(-n // STATE_BLOCKSIZE)
    if optim == "adafactor" and len(shape) == 2:
        return 4 * sum(shape)
    if optim in ("lion", "lion_32bit", "adafactor") or (optim == "muon" and len(shape) == 2):
        return 4 * n
    return 0 if optim == "sgd" else 8 * n


def state_formula(optim: str) -> str:
    """Return the formula of `state_bytes` for all LoRA weights."""
    if optim.endswith("8bit"):
        return f"(2 + 8 / {STATE_BLOCKSIZE}) P_l, small tensors 8 P_l"
    if optim == "adafactor":
        return "4 bytes a row and a column"
    return "0" if optim == "sgd" else "4 P_l" if optim in ("lion", "lion_32bit", "muon") else "8 P_l"
