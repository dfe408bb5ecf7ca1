"""The training loop: the only file that sees both data and model.

    for each update:  N = supervised tokens of the window
                      for each micro-batch: backward(loss / N)        loss.py
                      stop on NaN or Inf, clip, AdamW on the float32 masters, schedule

All that an update depends on is in the checkpoint (adapter, AdamW's states, random generators, data cursor), so a
run that is killed and resumed ends in the same bits as one that was not.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from onecard.config import TrainConfig
from onecard.data.dataset import Dataset
from onecard.data.loader import Loader
from onecard.data.packing import collate
from onecard.errors import UserError
from onecard.hf.attention import supports_packing, use_packed_attention
from onecard.memory.plan import peak_memory_bytes
from onecard.optim.schedule import learning_rate
from onecard.paging.pager import Pager
from onecard.train.loss import IGNORE, packed_loss, plain_loss
from onecard.train.metrics import Metrics
from onecard.train.state import State, save_state

LossFunction = Callable[[PreTrainedModel, dict[str, Any], int], Tensor]
LARGEST_SCALE = 2.0**16
FREE_TO_CHANGE = {
    "gradient_checkpointing",  # the same bits either way
    "output",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "eval_steps",
    "loggers",
    "sample_prompts",
}


class Interrupted(Exception):
    """Ctrl-C: the step was finished and the checkpoint written."""


@dataclass
class Run:
    """A model in training and all that its next update depends on."""

    config: TrainConfig
    model: Any  # peft's model around transformers'
    loader: Loader
    num_steps: int
    identity: dict[str, str]
    loss: LossFunction = packed_loss
    step: int = 0
    loss_scale: float = 1.0
    optimizer: torch.optim.AdamW = field(init=False)
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

    @property
    def epoch(self) -> float:
        return self.loader.epoch + self.loader.batch / self.loader.num_batches(self.loader.epoch)


def make_optimizer(trainable: dict[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in float32 (arXiv 1711.05101) over the adapter's masters."""
    return torch.optim.AdamW(
        list(trainable.values()),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def count_steps(loader: Loader, config: TrainConfig) -> int:
    """Updates in the run: max_steps, or as many as num_train_epochs fills; a last short window counts."""
    if config.max_steps is not None:
        return config.max_steps
    whole, part = divmod(config.num_train_epochs, 1)
    batches = sum(loader.num_batches(epoch) for epoch in range(int(whole)))
    batches += math.ceil(part * loader.num_batches(int(whole))) if part else 0
    return max(1, math.ceil(batches / config.gradient_accumulation_steps))


def choose_loss(model: Any, examples: Dataset) -> tuple[LossFunction, str | None]:
    """The packed path if it reproduces the model's own logits on two short documents, else the plain one.

    Returns:
        the function, and why it is the slow one (None for the fast one).
    """
    base = model.get_base_model()
    if not supports_packing(base):
        return plain_loss, f"{base.config.model_type} has attention of its own kind"
    batch = to_device(probe_batch(examples), base.get_input_embeddings().weight.device)
    num_tokens = int((batch["labels"] != IGNORE).sum())
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = plain_loss(base, batch, num_tokens).item()
        with use_packed_attention(base):
            found = packed_loss(base, batch, num_tokens).item()
    model.train(training)
    # Both sum the same float32 losses of logits that differ by the compute dtype's rounding, about 2^-8 in bfloat16.
    bound = 32 * torch.finfo(base.config.quantization_config.bnb_4bit_compute_dtype).eps * max(1.0, abs(expected))
    if abs(found - expected) > bound:
        return plain_loss, f"the packed loss differs from the model's own ({found:.5f}, {expected:.5f})"
    return packed_loss, None


def probe_batch(examples: Dataset) -> dict[str, Any]:
    """Two short documents with every token learned."""
    batch = collate([*examples.examples[:2], examples.examples[0]][:2])
    spans = list(zip(batch["cu_seqlens"], batch["cu_seqlens"][1:]))
    ids = [batch["input_ids"][0, start : min(end, start + 24)] for start, end in spans]
    labels = [torch.cat([torch.tensor([IGNORE]), piece[1:]]) for piece in ids]
    return {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(piece)) for piece in ids])[None],
        "cu_seqlens": [0, len(ids[0]), len(ids[0]) + len(ids[1])],
    }


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def train(
    run: Run,
    metrics: Metrics,
    validation: Dataset | None,
    on_step: Callable[[dict[str, Any]], None],
    checkpoints: Path,
) -> None:
    """Run the updates that are left, writing metrics and checkpoints.

    Raises:
        UserError: NaN or Inf in a loss or gradient, before the update.
        Interrupted: after Ctrl-C, with a checkpoint written.
    """
    config = run.config
    save_steps = config.save_steps or max(1, math.ceil(run.num_steps / 10))
    run.model.train()
    if config.gradient_checkpointing:
        run.base.gradient_checkpointing_enable({"use_reentrant": False})
        run.base.enable_input_require_grads()
    packed = use_packed_attention(run.base) if run.loss is packed_loss else nullcontext()
    with packed, finish_step_on_interrupt() as interrupted:
        while run.step < run.num_steps:
            row = update(run)
            last = run.step == run.num_steps
            if validation and (last or (config.eval_steps and run.step % config.eval_steps == 0)):
                row["eval_loss"] = mean_loss(run.base, validation, run.loss)
            if last or run.step % config.logging_steps == 0 or "eval_loss" in row:
                metrics.log(**row)
            on_step(row)
            if last or run.step % save_steps == 0 or interrupted:
                checkpoint(run, checkpoints)
            if interrupted and not last:
                raise Interrupted
    if config.gradient_checkpointing:
        run.base.gradient_checkpointing_disable()
    run.model.eval()


@contextmanager
def finish_step_on_interrupt() -> Iterator[list[int]]:
    """Inside, Ctrl-C fills the list instead of raising; a second one raises as usual."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread: nothing to catch here
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def update(run: Run) -> dict[str, Any]:
    """One optimizer step over one accumulation window; the row of metrics that tells of it."""
    start, epoch = time.perf_counter(), run.epoch
    window = [run.loader.next_batch() for _ in range(run.config.gradient_accumulation_steps)]
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
        losses = []
        for batch in window:
            with run.saved_as_pages():
                loss = run.loss(run.base, to_device(batch, run.device), num_tokens)
            (loss * run.loss_scale).backward()
            losses.append(loss.detach())
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


def not_finite(run: Run, loss: float, norm: float) -> UserError:
    found = f"loss {loss}, gradient norm {norm} at step {run.step + 1}; the update was not made"
    return UserError(
        "loss and gradients must be finite",
        found,
        "lower learning_rate, raise warmup_ratio, or use compute_dtype bfloat16 or float32; "
        "--resume goes on from the last checkpoint",
    )


def mean_loss(model: PreTrainedModel, dataset: Dataset, loss: LossFunction) -> float:
    """Mean cross-entropy a supervised token, in nats; attention must already be `loss`'s own."""
    training = model.training
    model.eval()
    total, num_tokens = 0.0, 0
    device = next(model.parameters()).device
    loader = Loader(dataset.examples, dataset.max_seq_length, True, 1, 0)
    with torch.no_grad():
        for _ in range(loader.num_batches(0)):
            batch = to_device(loader.next_batch(), device)
            count = int((batch["labels"] != IGNORE).sum())
            total += loss(model, batch, count).item() * count
            num_tokens += count
    model.train(training)
    return total / num_tokens


def evaluate(model: Any, dataset: Dataset) -> float:
    """`mean_loss` of a model as loaded, adapter or not, by the fast path where it fits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    loss = packed_loss if supports_packing(base) else plain_loss
    with use_packed_attention(base) if loss is packed_loss else nullcontext():
        return mean_loss(base, dataset, loss)


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


def checkpoint(run: Run, root: Path) -> None:
    """Write all that the next update depends on."""
    states = run.optimizer.state
    tensors = {
        "adapter": {name: p.detach().cpu().contiguous() for name, p in run.trainable.items()},
        "optimizer": {
            f"{name}.{key}": value.cpu().contiguous()
            for name, p in run.trainable.items()
            for key, value in states[p].items()
        },
        "random": random_state(run.device),
    }
    progress = {
        "step": run.step,
        "num_steps": run.num_steps,
        "loss_scale": run.loss_scale,
        "num_threads": torch.get_num_threads(),
        "loader": run.loader.state_dict(),
    }
    config = run.config.model_dump()
    documents = {"progress": progress, "config": config, "identity": run.identity}
    save_state(root, run.step, tensors, documents, run.config.save_total_limit)


def resume(run: Run, state: State) -> None:
    """Put a run where a checkpoint stands.

    Raises:
        UserError: base, data, tokenizer or settings are not those of the checkpoint.
    """
    check_unchanged(run, state)
    for name, parameter in run.trainable.items():
        parameter.data.copy_(state.tensors["adapter"][name])
        entry = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = state.tensors["optimizer"][f"{name}.{key}"]
            entry[key] = value.to(parameter.device)
        run.optimizer.state[parameter] = entry
    progress = state.documents["progress"]
    run.step, run.loss_scale = progress["step"], progress["loss_scale"]
    run.loader.load_state_dict(progress["loader"])
    restore_random(state.tensors["random"], run.device)


def check_unchanged(run: Run, state: State) -> None:
    """Raise UserError naming the first thing that is not as it was."""
    now = {k: v for k, v in run.config.model_dump().items() if k not in FREE_TO_CHANGE}
    before = state.documents["config"]
    changed = [(key, before.get(key), value) for key, value in now.items() if before.get(key) != value]
    if changed:
        key, old, new = changed[0]
        raise UserError(
            "a resumed run must have the settings it began with",
            f"{key} is {new!r}, was {old!r}",
            "give the old value, or start a new run in another folder",
            str(state.path),
        )
    for what, digest in run.identity.items():
        if state.documents["identity"].get(what) != digest:
            raise UserError(
                f"a resumed run must have the {what} it began with",
                f"the {what} has changed",
                "put the old one back, or start a new run in another folder",
                str(state.path),
            )
