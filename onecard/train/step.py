"""One update: micro-batches, gradients, clipping, AdamW; and what is done when memory runs out in it.

    N = supervised tokens of the window; for each micro-batch: backward(loss / N)       loss.py
    stop on NaN or Inf, clip, AdamW on the float32 masters, schedule

If an allocation fails, wherever it is, what can leave the device leaves it (the states of paged_adamw), and what
failed is done again: the gradients of the window from its start with the same random numbers, AdamW from the parameter
that it came to. That is the same update to the bit. If it fails again, micro-batches are split at documents' ends,
ever smaller; only when there is nothing left to move or to split is it an error.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.config import TrainConfig
from onecard.data.loader import Loader
from onecard.data.packing import split
from onecard.errors import UserError
from onecard.kernels.cpu import allocator
from onecard.kernels.dequantize import saved_weights
from onecard.memory.inputs import MemoryStrategy
from onecard.memory.measure import is_out_of_memory, peak_memory_bytes
from onecard.nn.experts import has_experts
from onecard.optim.adamw import AdamW
from onecard.optim.schedule import learning_rate
from onecard.paging.activations import Offload
from onecard.paging.pager import Pager, Statistics
from onecard.paging.states import PagedStates
from onecard.train.graphs import DecoderGraphs
from onecard.train.loss import IGNORE, head_loss, packed_loss, supervised

LossFunction = Callable[[PreTrainedModel, dict[str, Any], int], Tensor]
LARGEST_SCALE = 2.0**16
T = TypeVar("T")


@dataclass
class Run:
    """A model in training and all that its next update depends on."""

    config: TrainConfig
    model: Any  # peft's model around transformers'
    loader: Loader
    num_steps: int
    identity: dict[str, str]
    loss: LossFunction = packed_loss
    date: str = ""  # that chat templates were given
    strategy: MemoryStrategy = field(default_factory=MemoryStrategy)  # what is recomputed, offloaded and split
    step: int = 0
    loss_scale: float = 1.0
    graphs: DecoderGraphs | None = None
    max_forward_tokens: int | None = field(init=False)  # most tokens that go through the model at a time
    offload: Offload | None = field(init=False, default=None)
    paged: Statistics = field(default_factory=Statistics)  # in all steps so far
    optimizer: AdamW = field(init=False)
    trainable: dict[str, torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.trainable, self.config)
        if self.optimizer.paged is not None:
            self.optimizer.paged.crowded = self.strategy.offload_optimizer_states
        self.max_forward_tokens = self.strategy.max_forward_tokens
        if self.strategy.num_offloaded:
            self.offload = Offload(self.device, Path(self.config.output))
        if self.compute_dtype == torch.float16:
            self.loss_scale = LARGEST_SCALE

    @property
    def base(self) -> PreTrainedModel:
        """transformers' model, adapters inside it."""
        return self.model.get_base_model()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.base.config.quantization_config.bnb_4bit_compute_dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.trainable.values())).device

    @property
    def pager(self) -> Pager | None:
        return getattr(self.base, "pager", None)

    def saved_as_pages(self) -> AbstractContextManager:
        """Where the base is paged, autograd holds its pages by name only."""
        return nullcontext() if self.pager is None else self.pager.saved_as_pages()

    def take_statistics(self) -> dict[str, float]:
        """What was paged since the last call, as a row of metrics tells it; nothing where nothing can be."""
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
    def epoch(self) -> float:
        return self.loader.epoch + self.loader.batch / self.loader.num_batches(self.loader.epoch)


def count_batches(loader: Loader, config: TrainConfig) -> int:
    """Micro-batches of max_steps full windows, or those of num_train_epochs and no more."""
    if config.max_steps is not None:
        return config.max_steps * config.gradient_accumulation_steps
    whole, part = divmod(config.num_train_epochs, 1)
    batches = sum(loader.num_batches(epoch) for epoch in range(int(whole)))
    return batches + (math.ceil(part * loader.num_batches(int(whole))) if part else 0)


def make_optimizer(trainable: dict[str, torch.nn.Parameter], config: TrainConfig) -> AdamW:
    """The optimizer that `optim` names, over the adapter's float32 masters."""
    return AdamW(
        trainable.values(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        state_bits=8 if config.optim.endswith("8bit") else 32,
        paged=PagedStates(Path(config.output)) if config.optim.startswith("paged") else None,
    )


def make_graphs(run: Run, limit: int) -> DecoderGraphs | None:
    """Where graphs can hold what a micro-batch does: on a CUDA GPU, with nothing given up for memory and no experts.

    Args:
        limit: bytes of the device's memory that the run may take.
    """
    held = run.strategy == MemoryStrategy() and run.loss is packed_loss and not has_experts(run.base)
    if run.device.type != "cuda" or not run.config.cuda_graphs or not held:
        return None
    return DecoderGraphs(run.base, run.trainable.values(), limit)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A micro-batch where the model is, without waiting for it; labels stay on the host (`supervised` says why)."""
    position, target = supervised(batch["labels"])
    tensors = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    moved = {key: upload(tensor, device) for key, tensor in tensors.items()}
    return {**batch, **moved, "supervised": (upload(position, device), upload(target, device))}


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def recompute_layers(
    base: PreTrainedModel,
    number: int,
    offload: Offload | None = None,
    num_offloaded: int = 0,
    keep_dequantized_weights: bool = False,
) -> None:
    """Recompute the activations of the first `number` decoder layers in the backward; the others keep theirs.

    The inputs of the first `num_offloaded` of them are offloaded meanwhile. With keep_dequantized_weights, the weights
    that a layer dequantizes for the recomputation stay for its backward.
    """
    if number == 0:
        return base.gradient_checkpointing_disable()
    kept: dict[str, Any] = {"context_fn": saved_weights} if keep_dequantized_weights else {}
    base.gradient_checkpointing_enable({"use_reentrant": False, **kept})
    base.enable_input_require_grads()
    layers: list[Any] = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[:num_offloaded]:
        assert offload is not None
        layer._gradient_checkpointing_func = partial(offload.checkpoint, **kept)
    for layer in layers[number:]:
        layer.gradient_checkpointing = False


def optimizer_step(run: Run) -> dict[str, Any]:
    """One optimizer step over one accumulation window; the row of metrics that tells of it."""
    start, epoch = time.perf_counter(), run.epoch
    window, num_tokens = retry_on_oom(run, lambda: next_window(run))
    rate = learning_rate(run.step, run.num_steps, run.config)
    loss, norm = gradients(run, window, num_tokens)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    retry_on_oom(run, run.optimizer.step)
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    seconds = time.perf_counter() - start
    return {
        "step": run.step,
        "epoch": epoch,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "num_supervised_tokens": num_tokens,
        "supervised_tokens_per_second": num_tokens / seconds,
        "memory_bytes": peak_memory_bytes(run.device),
        "seconds": seconds,
        **run.take_statistics(),
    }


def next_window(run: Run) -> tuple[list[dict[str, Any]], int]:
    """The next update's micro-batches and their supervised tokens; the loader stays where it is if that fails."""
    before = run.loader.state_dict()
    try:
        size = run.config.gradient_accumulation_steps
        window = [run.loader.next_batch() for _ in range(min(size, run.num_batches - run.step * size))]
        return window, sum(int((batch["labels"] != IGNORE).sum()) for batch in window)
    except BaseException:
        run.loader.load_state_dict(before)
        raise


def gradients(run: Run, window: list[dict[str, Any]], num_tokens: int) -> tuple[float, float]:
    """Fill .grad, clipped; loss and gradient norm of the window.

    Under float16 the loss is scaled against underflow; an overflow halves the scale and repeats the window with
    the same random numbers.
    """
    generators = random_state(run.device)
    while True:
        total, norm = retry_on_oom(run, lambda: try_gradients(run, window, num_tokens, generators), window)
        if math.isfinite(total) and math.isfinite(norm):
            return total, norm
        if run.loss_scale <= 1.0 or not math.isfinite(total):
            raise not_finite(run, total, norm)
        run.loss_scale /= 2


def try_gradients(
    run: Run, window: list[dict[str, Any]], num_tokens: int, generators: dict[str, Tensor]
) -> tuple[float, float]:
    """One attempt at them, from the same start each time."""
    run.optimizer.zero_grad(set_to_none=True)
    if run.graphs is not None:
        run.graphs.attach_gradients()
    restore_random(generators, run.device)
    losses = [micro_batch(run, part, num_tokens) for batch in window for part in split(batch, run.max_forward_tokens)]
    for parameter in run.trainable.values():
        if parameter.grad is not None and run.loss_scale != 1.0:
            parameter.grad /= run.loss_scale
    clipped = torch.nn.utils.clip_grad_norm_(run.trainable.values(), run.config.max_grad_norm)
    # The update's only wait for a GPU; what is left after it is AdamW, a launch or two.
    total, norm = torch.stack([torch.stack(losses).sum(), clipped.float()]).tolist()
    return total, norm


def micro_batch(run: Run, batch: dict[str, Any], num_tokens: int) -> Tensor:
    """Add one micro-batch's gradients; its loss."""
    batch = to_device(batch, run.device)
    if run.graphs is not None:
        loss = head_loss(run.base, run.graphs(batch), batch, num_tokens)
    else:
        with run.saved_as_pages():
            loss = run.loss(run.base, batch, num_tokens)
    (loss * run.loss_scale).backward()
    return loss.detach()


def retry_on_oom(run: Run, act: Callable[[], T], window: list[dict[str, Any]] | None = None) -> T:
    """What act() gives; where an allocation fails in it, room is made and it is called again.

    Args:
        window: whose micro-batches may be split.

    Raises:
        UserError: it fails again, and there is nothing left to move or to split.
    """
    again = False
    while True:
        try:
            return act()
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or ["MemoryError"])[0]
        free_memory(run, window or [], reason, again)  # here, where the error no longer holds the step's tensors
        again = True


def free_memory(run: Run, window: list[dict[str, Any]], reason: str, again: bool) -> None:
    """After an allocation has failed, the first time or `again`: let go of what can go, or else split micro-batches.

    Raises:
        UserError: neither can be.
    """
    gc.collect()
    allocator.release()
    gave = run.graphs is not None and run.graphs.release()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    if gave or run.optimizer.page_out() or not again:
        return
    parts = [part for batch in window for part in split(batch, run.max_forward_tokens)]
    half = max((part["cu_seqlens"][-1] for part in parts), default=0) // 2
    if sum(len(split(batch, half)) for batch in window) > len(parts):
        run.max_forward_tokens = half
        return
    raise UserError(
        "a step must fit in memory",
        f"{reason}; the optimizer's states are not in the way and each document goes alone",
        "--resume with --gradient-checkpointing, a smaller --weights-budget or --device-memory; or start again with a "
        "lower max_seq_length or r, or --optim paged_adamw_8bit; `onecard plan` says what would fit",
    )


def not_finite(run: Run, loss: float, norm: float) -> UserError:
    found = f"loss {loss}, gradient norm {norm} at step {run.step + 1}; the update was not made"
    return UserError(
        "loss and gradients must be finite",
        found,
        "start again with a lower learning_rate, a larger warmup_ratio, or compute_dtype bfloat16 or float32",
    )


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
