"""A run: the model in training and everything that its next update depends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from onecard.config import TrainConfig
from onecard.data.loader import Loader
from onecard.memory.inputs import MemoryStrategy
from onecard.nn.experts import has_experts
from onecard.optim.make import Optimizer, make_optimizer
from onecard.paging.activations import Offload
from onecard.paging.mover import Statistics
from onecard.paging.pager import Pager
from onecard.train.best import Best, best_of
from onecard.train.graphs import DecoderGraphs
from onecard.train.loss import packed_loss
from onecard.train.noise import EmbeddingNoise
from onecard.train.owners import Owners
from onecard.train.ranks import Ranks

LossFunction = Callable[[PreTrainedModel, dict[str, Any], int], Tensor]
FIRST_SCALE = 2.0**16  # of the loss in float16; it and GROWTH_INTERVAL are GradScaler's
GROWTH_INTERVAL = 2000  # updates without an overflow after which the scale doubles


class Objective(Protocol):
    """What a run learns in place of tokens: preferences (preference.py), or a classification head (head.py)."""

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]: ...
    def totals(self, window: list[dict[str, Any]]) -> Any: ...
    def loss(self, batch: dict[str, Any], totals: Any, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
    def metrics(self, parts: list[float], totals: Any) -> dict[str, float]: ...
    def evaluate(self) -> dict[str, float]: ...


@dataclass
class Run:
    """A model in training and all that its next update depends on."""

    config: TrainConfig
    model: Any  # peft's model around transformers'
    loader: Loader
    num_steps: int
    identity: dict[str, str]
    loss: LossFunction = packed_loss
    date: str = ""  # the date that chat templates use
    strategy: MemoryStrategy = field(default_factory=MemoryStrategy)  # what is recomputed, offloaded and split
    step: int = 0
    best: Best | None = field(init=False)  # the best evaluation so far; None if none is sought
    loss_scale: float = 1.0
    num_finite_steps: int = 0  # in float16: updates since the loss scale last changed
    graphs: DecoderGraphs | None = None
    ranks: Ranks = field(default_factory=Ranks)
    objective: Objective | None = None  # if it is not the loss of tokens
    held_out: Mapping[str, Objective] = field(default_factory=dict)  # its eval files by name
    max_forward_tokens: int | None = field(init=False)  # most tokens in one forward
    offload: Offload | None = field(init=False, default=None)
    paged: Statistics = field(default_factory=Statistics)  # in all steps so far
    owners: Owners = field(init=False)  # who has the optimizer's states of which weights
    optimizer: Optimizer = field(init=False)
    noise: EmbeddingNoise | None = field(init=False, default=None)
    trainable: dict[str, torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.owners = Owners.of(self.trainable, self.ranks, self.config.shard_optimizer)
        self.optimizer = make_optimizer(self.owners.own, self.config)
        if self.optimizer.paged is not None:
            self.optimizer.paged.crowded = self.strategy.offload_optimizer_states
        self.best = best_of(self.config)
        if self.config.neftune_noise_alpha is not None:
            self.noise = EmbeddingNoise(self.base, self.config.neftune_noise_alpha)
        self.max_forward_tokens = self.strategy.max_forward_tokens
        if self.strategy.num_offloaded:
            self.offload = Offload(self.device, Path(self.config.output))
        if self.compute_dtype == torch.float16:
            self.loss_scale = FIRST_SCALE

    @property
    def base(self) -> PreTrainedModel:
        """transformers' model, with the adapters inside."""
        return self.model.get_base_model()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.base.config.quantization_config.bnb_4bit_compute_dtype

    def scale_loss(self, overflowed: bool) -> None:
        """Halve the loss scale of float16 after an overflow, or double it after GROWTH_INTERVAL updates without one."""
        self.num_finite_steps = 0 if overflowed else self.num_finite_steps + 1
        if overflowed:
            self.loss_scale /= 2
        elif self.compute_dtype == torch.float16 and self.num_finite_steps == GROWTH_INTERVAL:
            self.loss_scale, self.num_finite_steps = 2 * self.loss_scale, 0

    @property
    def device(self) -> torch.device:
        return next(iter(self.trainable.values())).device

    @property
    def is_sharded(self) -> bool:
        return hasattr(self.base, "sharded_base")

    @property
    def pager(self) -> Pager | None:
        return getattr(self.base, "pager", None)

    def drop_gradients(self) -> None:
        """Drop all gradients, also those of weights that another process updates."""
        for parameter in self.trainable.values():
            parameter.grad = None

    def split_as(self, max_forward_tokens: int | None, mlp_chunk: int | None) -> None:
        """Compute in the parts of the checkpoint's process, for bit-identical results, or in smaller ones."""
        self.max_forward_tokens = smaller(self.max_forward_tokens, max_forward_tokens)
        chunk = smaller(self.strategy.mlp_chunk, mlp_chunk)
        if chunk is not None:
            self.strategy = replace(self.strategy, mlp_chunk=chunk, keep_dequantized_weights=False)
            self.graphs = None

    def saved_as_pages(self) -> AbstractContextManager:
        """Make autograd save references to a paged base's pages instead of their tensors."""
        return nullcontext() if self.pager is None else self.pager.saved_as_pages()

    def take_statistics(self) -> dict[str, float]:
        """Return what was paged since the last call, as fields of a metrics row. Empty if nothing can be paged."""
        users = [user for user in (self.pager, self.offload, self.optimizer.paged) if user is not None]
        if not users:
            return {}
        found = Statistics()
        for user in users:
            found, user.statistics = found + user.statistics, Statistics()
        self.paged += found
        row = {"paged_in_bytes": found.bytes_in, "paged_out_bytes": found.bytes_out}
        hit_rate = {"page_hit_rate": found.hits / found.touches} if found.touches else {}
        return {**row, **hit_rate, "page_stall_seconds": found.stall_seconds}

    @cached_property
    def num_batches(self) -> int:
        """Micro-batches in the whole run; the last window may be short."""
        return count_batches(self.loader, self.config)

    @property
    def is_over(self) -> bool:
        """Whether no update follows: all are made, or early stopping ends the run."""
        return self.step >= self.num_steps or (self.best is not None and self.best.is_over)


def smaller(one: int | None, other: int | None) -> int | None:
    return min((number for number in (one, other) if number is not None), default=None)


def count_batches(loader: Loader, config: TrainConfig) -> int:
    """Count the run's micro-batches: max_steps full windows, or those of num_train_epochs."""
    if config.max_steps is not None:
        return config.max_steps * config.gradient_accumulation_steps
    whole, part = divmod(config.num_train_epochs, 1)
    batches = sum(loader.num_batches(epoch) for epoch in range(int(whole)))
    return batches + (math.ceil(part * loader.num_batches(int(whole))) if part else 0)


def make_graphs(run: Run, limit: int) -> DecoderGraphs | None:
    """Return CUDA graphs if enabled and possible: on a GPU, with the packed loss, all resident and kept, no experts,
    no noise on embeddings, no training for a file.

    Args:
        limit: bytes of device memory that the run may use.
    """
    held = run.strategy == MemoryStrategy() and run.loss is packed_loss and not has_experts(run.base)
    held = held and run.noise is None and not run.is_sharded and run.config.train_for is None
    if run.device.type != "cuda" or not run.config.cuda_graphs or not held:
        return None
    return DecoderGraphs(run.base, run.trainable.values(), limit)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def gathered_random(run: Run) -> dict[str, Tensor]:
    """Return the states of all processes' generators: cpu, cuda, and of process 1 cpu.1, cuda.1."""
    states = run.ranks.gather({key: state.tolist() for key, state in random_state(run.device).items()})
    named = {key + f".{i}" * (i > 0): state for i, each in enumerate(states) for key, state in each.items()}
    return {key: torch.tensor(state, dtype=torch.uint8) for key, state in named.items()}


def restore_own_random(run: Run, stored: dict[str, Tensor]) -> None:
    """Restore this process's generators. Without a state, as of fewer processes before, they stay as they are."""
    own = f".{run.ranks.number}" * (run.ranks.number > 0)
    found = {key.removesuffix(own): state for key, state in stored.items() if key.endswith(own)}
    if "cpu" in found:
        restore_random(found, run.device)
