"""One update: micro-batches, gradients, clipping, AdamW; and what is done when memory runs out in it.

    N = supervised tokens of the window; for each micro-batch: backward(loss / N)       loss.py
    stop on NaN or Inf, clip, AdamW on the float32 masters, schedule

If an allocation fails, the optimizer's states leave the device if they may (paged_adamw), else micro-batches are split
at a document's end, and the window is repeated from its start with the same random numbers. Only when there is
nothing left to move or to split is it an error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.config import TrainConfig
from onecard.data.loader import Loader
from onecard.data.packing import split
from onecard.errors import UserError
from onecard.memory.measure import peak_memory_bytes
from onecard.optim.adamw import AdamW
from onecard.optim.schedule import learning_rate
from onecard.paging.pager import Pager
from onecard.paging.states import PagedStates
from onecard.train.loss import IGNORE, packed_loss

LossFunction = Callable[[PreTrainedModel, dict[str, Any], int], Tensor]
LARGEST_SCALE = 2.0**16


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
    num_recomputed: int = 0  # decoder layers whose activations are not kept
    step: int = 0
    loss_scale: float = 1.0
    num_parts: int = 1  # that a micro-batch is split into
    optimizer: AdamW = field(init=False)
    trainable: dict[str, torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.trainable, self.config)
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

    def saved_as_pages(self) -> AbstractContextManager:
        """Where the base is paged, autograd holds its pages by name only."""
        pager: Pager | None = getattr(self.base, "pager", None)
        return nullcontext() if pager is None else pager.saved_as_pages()

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


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def recompute_layers(base: PreTrainedModel, number: int) -> None:
    """Let the first `number` decoder layers make their activations again in the backward, the others keep them.

    The first ones: by the time that they are made again, the others' are gone.
    """
    if number == 0:
        return base.gradient_checkpointing_disable()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[number:]:
        layer.gradient_checkpointing = False


def update(run: Run) -> dict[str, Any]:
    """One optimizer step over one accumulation window; the row of metrics that tells of it."""
    start, epoch = time.perf_counter(), run.epoch
    size = run.config.gradient_accumulation_steps
    window = [run.loader.next_batch() for _ in range(min(size, run.num_batches - run.step * size))]
    num_tokens = sum(int((batch["labels"] != IGNORE).sum()) for batch in window)
    rate = learning_rate(run.step, run.num_steps, run.config)
    loss, norm = gradients(run, window, num_tokens)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
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
    }


def gradients(run: Run, window: list[dict[str, Any]], num_tokens: int) -> tuple[float, float]:
    """Fill .grad, clipped; loss and gradient norm of the window.

    Under float16 the loss is scaled against underflow; an overflow halves the scale and repeats the window with
    the same random numbers.
    """
    while True:
        generators = random_state(run.device)
        try:
            losses = [micro_batch(run, part, num_tokens) for batch in window for part in split(batch, run.num_parts)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or ["MemoryError"])[0]
        else:
            reason = None
        if reason is not None:  # here, where the error no longer holds the step's tensors
            run.optimizer.zero_grad(set_to_none=True)
            make_room(run, window, reason)
            restore_random(generators, run.device)
            continue
        total = torch.stack(losses).sum().item()
        for parameter in run.trainable.values():
            if parameter.grad is not None and run.loss_scale != 1.0:
                parameter.grad /= run.loss_scale
        norm = torch.nn.utils.clip_grad_norm_(run.trainable.values(), run.config.max_grad_norm).item()
        if math.isfinite(total) and math.isfinite(norm):
            return total, norm
        run.optimizer.zero_grad(set_to_none=True)
        if run.loss_scale <= 1.0 or not math.isfinite(total):
            raise not_finite(run, total, norm)
        run.loss_scale /= 2
        restore_random(generators, run.device)


def micro_batch(run: Run, batch: dict[str, Any], num_tokens: int) -> Tensor:
    """Add one micro-batch's gradients; its loss."""
    with run.saved_as_pages():
        loss = run.loss(run.base, to_device(batch, run.device), num_tokens)
    (loss * run.loss_scale).backward()
    return loss.detach()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error) or "failed to allocate memory" in str(error)


def make_room(run: Run, window: list[dict[str, Any]], reason: str) -> None:
    """After an allocation has failed: let something go, or split micro-batches. Raises UserError if neither can be."""
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    if run.optimizer.page_out():
        return
    if run.num_parts < max(len(batch["cu_seqlens"]) - 1 for batch in window):
        run.num_parts *= 2
        return
    raise UserError(
        "a step must fit in memory",
        f"{reason}; the optimizer's states are not in the way and each document goes alone",
        "--resume with --gradient-checkpointing or a smaller --weights-budget; or start again with a lower "
        "max_seq_length or r, or --optim paged_adamw_8bit",
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
