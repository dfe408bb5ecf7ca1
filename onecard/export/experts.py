"""Experts in an export: their stacked weights read from a checkpoint expert by expert, and their part of an adapter.

peft names a layer on a stacked weight by the experts' module alone. Where both weights have one, the layer on the
first, gate_up_proj, lies inside that on the second: `experts.base_layer.lora_A` and `experts.lora_A`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from onecard.export.folder import read_tensor
from onecard.hf.checkpoint import Checkpoint, TensorInfo
from onecard.hf.experts import Place
from onecard.memory.stacks import Stack


def matrix_key(name: str, expert: int) -> str:
    """How an adapter's updates name a matrix of a stacked tensor."""
    return f"{name}[{expert}]"


def matrix_info(info: TensorInfo, expert: int) -> TensorInfo:
    """A stacked tensor's part."""
    size = info.nbytes // info.shape[0]
    return replace(info, shape=info.shape[1:], begin=info.begin + expert * size, nbytes=size)


def read_experts(checkpoint: Checkpoint, places: dict[str, Place], stack: str) -> Iterator[Tensor]:
    """The matrices of a stacked weight in its order."""
    parts: dict[int | None, list[tuple[int, str]]] = {}
    for name, place in places.items():
        if place.stack == stack:
            parts.setdefault(place.expert, []).append((place.part, name))
    if None in parts:
        whole = checkpoint.tensors[parts[None][0][1]]
        yield from (read_tensor(matrix_info(whole, expert)) for expert in range(whole.shape[0]))
    else:
        for expert in sorted(number for number in parts if number is not None):
            yield torch.cat([read_tensor(checkpoint.tensors[name]) for _, name in sorted(parts[expert])])


def stack_layers(stacks: dict[str, Stack], target_parameters: list[str]) -> dict[str, str]:
    """The stacked weight that each of peft's layers on one is for, by the layer's name."""
    modules: dict[str, list[str]] = {}
    for stack in stacks:
        if any(f".{stack}".endswith(f".{target}") for target in target_parameters):
            modules.setdefault(stack.rpartition(".")[0], []).append(stack)
    return {
        module + ".base_layer" * depth: stack
        for module, named in modules.items()
        for depth, stack in enumerate(reversed(named))
    }


def matrix_factors(
    name: str, place: Place, stack: Stack, A_RK: Tensor, B_NR: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A and B of each matrix of a tensor, with its key, from peft's A (E R, K) and B (N, R E) of the whole stack."""
    E, rows = stack.num_experts, stack.weight.shape[1] // place.num_parts
    A_ERK, B_NRE = A_RK.view(E, -1, A_RK.shape[1]), B_NR.view(B_NR.shape[0], -1, E)
    for expert in range(E) if place.expert is None else [place.expert]:
        A, B = A_ERK[expert], B_NRE[:, :, expert]
        if stack.is_transposed:
            A, B = B.T, A.T
        key = matrix_key(name, expert) if place.expert is None else name
        yield key, A, B[place.part * rows : (place.part + 1) * rows]
