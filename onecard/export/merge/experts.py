"""Experts in an export: their stacked weights, read from a checkpoint matrix by matrix, and their adapter updates.

peft names a layer on a stacked weight only by the experts' module. If both weights have one, the layer on the first,
gate_up_proj, is inside the layer on the second: `experts.base_layer.lora_A` and `experts.lora_A`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from onecard.adapter.update import Adapter, Update, scale_of
from onecard.errors import UserError
from onecard.hf.checkpoint import Checkpoint
from onecard.hf.experts import Place, expert_places
from onecard.hf.stacks import Stack
from onecard.hf.stored import TensorInfo, read_tensor
from onecard.kernels import ops
from onecard.nn.experts import turns
from onecard.quant.state import QuantState, part_of

LAYER_STACKS = 2  # stacked weights of a layer; a checkpoint may interleave their matrices


def matrix_key(name: str, expert: int | None) -> str:
    """Return the key of a matrix in an adapter's updates: of a tensor, or of `expert`'s part of a stacked one."""
    return name if expert is None else f"{name}[{expert}]"


def matrix_info(info: TensorInfo, expert: int) -> TensorInfo:
    """Return the location of one expert's matrix in a stacked tensor."""
    assert info.form is None, "forms have matrices only"
    size = info.nbytes // info.shape[0]
    return replace(info, shape=info.shape[1:], begin=info.begin + expert * size, nbytes=size)


def part_in_4bit(packed: Tensor, state: QuantState, place: Place, expert: int | None) -> tuple[Tensor, QuantState, int]:
    """Return a stack's codes and state that contain a tensor's matrix, and how many weights in them precede it."""
    number = place.expert if expert is None else expert
    assert number is not None
    codes, found, skip = part_of(packed, state, number)
    return codes, found, skip + place.part * (state.shape[1:].numel() // place.num_parts)


@dataclass(frozen=True)
class Experts:
    """The places of a checkpoint's expert tensors, and the last layer's stacks in 4 bits."""

    checkpoint: Checkpoint
    stacks: dict[str, Stack]
    places: dict[str, Place]
    held: dict[str, tuple[Tensor, QuantState]] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Any) -> Experts:
        """Args: model: `read_model` of the checkpoint."""
        stacks = model.stacks
        return cls(checkpoint, stacks, expert_places(model.modules, stacks, checkpoint.tensors) if stacks else {})

    def is_stack(self, name: str) -> bool:
        """Whether a tensor is a whole stacked weight."""
        return name in self.places and self.places[name].expert is None

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor's matrices are (K, N) in the model."""
        return self.stacks[self.places[name].stack].is_transposed

    def parts(self, stack: str) -> list[tuple[int | None, list[str]]]:
        """Return each expert's tensors of a stack, in its order; the expert is None if one tensor holds all of them."""
        found: dict[int | None, list[tuple[int, str]]] = {}
        for name, place in self.places.items():
            if place.stack == stack:
                found.setdefault(place.expert, []).append((place.part, name))
        ordered = sorted(found, key=lambda expert: expert or 0)
        return [(expert, [name for _, name in sorted(found[expert])]) for expert in ordered]

    def matrices(self, stack: str) -> Iterator[Tensor]:
        """Yield a stacked weight's matrices from the checkpoint, in its order."""
        for expert, names in self.parts(stack):
            infos = [self.checkpoint.tensors[name] for name in names]
            if expert is None:
                yield from (read_tensor(matrix_info(infos[0], number)) for number in range(infos[0].shape[0]))
            else:
                yield torch.cat([read_tensor(info) for info in infos])

    def in_4bit(
        self, stack: str, how: tuple[str, int, bool], read: Callable[[], tuple[Tensor, QuantState]] | None
    ) -> tuple[Tensor, QuantState]:
        """Return a stacked weight's codes and state as training had them. `read` loads them from a 4-bit checkpoint."""
        if stack not in self.held:
            if len(self.held) == LAYER_STACKS:
                del self.held[next(iter(self.held))]
            shape, matrices = self.stacks[stack].weight.shape, self.matrices(stack)
            if turns(self.stacks[stack].is_transposed, how[0]):
                shape, matrices = shape[:1] + shape[:0:-1], (W.mT for W in matrices)
            self.held[stack] = read() if read else ops.quantize_stack(matrices, shape, *how, stack)
        return self.held[stack]

    def spread(self, adapter: Adapter) -> None:
        """Replace an adapter's updates of stacked weights by updates of their matrices in the checkpoint."""
        for layer, stack in self.layers(adapter.config.get("target_parameters") or []).items():
            update = adapter.updates.pop(f"{layer}.weight", None)
            for name, place in self.places.items():
                if update is not None and place.stack == stack:
                    adapter.updates |= self.matrix_updates(name, update, adapter)

    def layers(self, target_parameters: list[str]) -> dict[str, str]:
        """Return the stacked weight of each of peft's layers on one, by the layer's name."""
        modules: dict[str, list[str]] = {}
        for stack in self.stacks:
            if any(f".{stack}".endswith(f".{target}") for target in target_parameters):
                modules.setdefault(stack.rpartition(".")[0], []).append(stack)
        return {
            module + ".base_layer" * depth: stack
            for module, named in modules.items()
            for depth, stack in enumerate(reversed(named))
        }

    def matrix_updates(self, name: str, update: Update, adapter: Adapter) -> dict[str, Update]:
        """Return the update of each matrix of a tensor, from peft's A (E R, K) and B (N, R E) of its stack."""
        place = self.places[name]
        stack, E = self.stacks[place.stack], self.stacks[place.stack].num_experts
        rank, rest = divmod(update.A_RK.shape[0], E)
        if rest or update.B_NR.shape[1] != rank * E:
            found = f"lora_A {list(update.A_RK.shape)}, lora_B {list(update.B_NR.shape)}"
            must = f"an adapter of {place.stack} must have the same rank for each of {E} experts"
            raise UserError(must, found, "use the model that the adapter was trained on", str(adapter.folder))
        scaling, rows = scale_of(place.stack, adapter.config, rank), stack.weight.shape[1] // place.num_parts
        A_ERK, B_NRE = update.A_RK.view(E, rank, -1), update.B_NR.view(-1, rank, E)
        found = {}
        for expert in range(E) if place.expert is None else [place.expert]:
            A, B = A_ERK[expert], B_NRE[:, :, expert]
            A, B = (B.T, A.T) if stack.is_transposed else (A, B)
            key = matrix_key(name, expert if place.expert is None else None)
            found[key] = Update(A, B[place.part * rows : (place.part + 1) * rows], scaling)
        return found
