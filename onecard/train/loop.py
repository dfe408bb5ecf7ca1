"""The training loop: with step.py the only place that sees both data and model.

All that an update depends on is in the checkpoint (adapter, AdamW's states, random generators, data cursor), so a
run that is killed and resumed ends in the same bits as one that was not.
"""

from __future__ import annotations

import datetime
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from transformers import PreTrainedModel

from onecard.config import TrainConfig
from onecard.data.dataset import Dataset
from onecard.data.loader import Loader
from onecard.data.packing import collate
from onecard.documents import Own, hold
from onecard.errors import UserError
from onecard.hf.attention import NotPacked, supports_packing, use_packed_attention
from onecard.hf.fused import unfuse, unfused
from onecard.infer.check import check_computes
from onecard.kernels.cpu.contention import sharing_cores
from onecard.kernels.cpu_info import arithmetic
from onecard.train import signals
from onecard.train.checkpoint import State, save_state
from onecard.train.loss import IGNORE, packed_loss, plain_loss
from onecard.train.metrics import Metrics
from onecard.train.step import (
    LossFunction,
    Run,
    count_batches,
    optimizer_step,
    random_state,
    recompute_layers,
    restore_random,
    to_device,
)

FREE_TO_CHANGE = {
    "model",  # wherever it lies: identity tells whether model and data are the same
    "data",
    "eval_data",
    "gradient_checkpointing",  # the same bits either way
    "device_memory",
    "weights_budget",
    "cuda_graphs",
    "output",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "eval_steps",
    "loggers",
    "sample_prompts",
}


class Interrupted(Exception):
    """A signal: the step was finished and the checkpoint written."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def count_steps(loader: Loader, config: TrainConfig) -> int:
    """Updates in the run; a last short window counts."""
    return math.ceil(count_batches(loader, config) / config.gradient_accumulation_steps)


def choose_loss(model: Any, examples: Dataset) -> tuple[LossFunction, str | None]:
    """The packed path if it reproduces the loss of the model's own modules on two short documents, else the plain one.

    Fused modules that change the loss of the plain path get their own classes again.

    Returns:
        the function, and why it is the slow one (None for the fast one).
    """
    base = inner(model)
    batch = to_device(probe_batch(examples), base.get_input_embeddings().weight.device)
    check_computes(base, batch["input_ids"][:, : batch["cu_seqlens"][1]])
    num_tokens = int((batch["labels"] != IGNORE).sum())
    # The mean of some 46 losses, of logits that differ by a few roundings of the compute dtype, half an eps each.
    eps = torch.finfo(base.config.quantization_config.bnb_4bit_compute_dtype).eps

    def same(found: float, expected: float) -> bool:
        return abs(found - expected) <= max(4 * eps, 1e-4) * max(1.0, abs(expected))

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with unfused():
                expected = plain_loss(base, batch, num_tokens).item()
            why = f"{base.config.model_type} has attention of its own kind"
            if supports_packing(base):
                try:
                    with use_packed_attention(base):
                        found = packed_loss(base, batch, num_tokens).item()
                    if same(found, expected):
                        return packed_loss, None
                    why = f"the packed loss differs from the model's own ({found:.5f}, {expected:.5f})"
                except NotPacked:
                    why = f"{base.config.model_type} does not hand the documents' ends on to its attention"
            if not same(plain_loss(base, batch, num_tokens).item(), expected):
                unfuse(base)
            return plain_loss, why
    finally:
        model.train(training)


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
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, with a checkpoint written.
    """
    config = run.config
    save_steps = config.save_steps or max(1, math.ceil(run.num_steps / 10))
    run.model.train()
    strategy = run.strategy
    recompute_layers(
        run.base, strategy.num_recomputed, run.offload, strategy.num_offloaded, strategy.keep_dequantized_weights
    )
    packed = use_packed_attention(run.base) if run.loss is packed_loss else nullcontext()
    with packed, frozen_objects(), sharing_cores(), signals.noted() as interrupted:
        while run.step < run.num_steps:
            row = optimizer_step(run)
            last = run.step == run.num_steps
            if validation and (last or (config.eval_steps and run.step % config.eval_steps == 0)):
                row["eval_loss"] = mean_loss(run.base, validation, run.loss)
            if last or run.step % config.logging_steps == 0 or "eval_loss" in row:
                metrics.log(**row)
            if last or run.step % save_steps == 0 or interrupted:
                checkpoint(run, checkpoints)
            on_step(row)  # after the checkpoint: with a signal, its terminal may be gone
            if interrupted and not last:
                raise Interrupted(interrupted[0])
    recompute_layers(run.base, 0)
    run.model.eval()


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Inside, Python's collector leaves alone what was there before: going over a model's and the libraries' half a
    million objects every other step took 10 % of a small model's step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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


def inner(model: Any) -> Any:
    """transformers' model, whether or not peft's is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_size(config: Any) -> tuple[int | None, int | None]:
    """A model's vocabulary and positions, as its config tells them."""
    text = config.get_text_config()
    return getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)


def evaluate(model: Any, dataset: Dataset, loss: LossFunction | None = None) -> float:
    """`mean_loss` of a model as loaded, adapter or not.

    Args:
        loss: what choose_loss has given for the model; None asks it, which takes two passes.
    """
    base = inner(model)
    dataset.check_fits(*model_size(base.config))
    loss = loss or choose_loss(model, dataset)[0]
    with use_packed_attention(base) if loss is packed_loss else nullcontext(), sharing_cores():
        return mean_loss(base, dataset, loss)


class LoaderPosition(Own):
    """Where the loader stands."""

    epoch: int = Field(ge=0)
    batch: int = Field(ge=0)


class Position(Own):
    """Where a run stands: progress.json of its checkpoint."""

    step: int = Field(ge=0)
    num_steps: int
    loss_scale: float = Field(gt=0)
    max_forward_tokens: int | None = None
    num_threads: int | None = None
    arithmetic: str | None = None
    date: str = ""
    loader: LoaderPosition

    @field_validator("date")
    @classmethod
    def _a_date(cls, value: str) -> str:
        if value:
            datetime.date.fromisoformat(value)
        return value


def position_of(state: State) -> Position:
    """Where a checkpoint's run stood. Raises UserError for a checkpoint that does not tell."""
    do = "start a new run in another folder"
    missing = {"progress", "config", "identity"} - set(state.documents) | {"adapter", "random"} - set(state.tensors)
    if missing:
        raise UserError("a checkpoint must hold its run's state", f"no {min(missing)}", do, str(state.path))
    return hold(Position, state.documents["progress"], str(state.path / "progress.json"), do)


def checkpoint(run: Run, root: Path) -> None:
    """Write all that the next update depends on."""
    tensors = {
        "adapter": {name: p.detach().cpu().contiguous() for name, p in run.trainable.items()},
        "optimizer": {
            f"{name}.{key}": value.contiguous()
            for name, p in run.trainable.items()
            for key, value in run.optimizer.state_tensors(p).items()
        },
        "random": random_state(run.device),
    }
    position = Position(
        step=run.step,
        num_steps=run.num_steps,
        loss_scale=run.loss_scale,
        max_forward_tokens=run.max_forward_tokens,
        num_threads=torch.get_num_threads(),
        arithmetic=arithmetic(run.device),
        date=run.date,
        loader=LoaderPosition(**run.loader.state_dict()),
    )
    config = run.config.model_dump()
    documents = {"progress": position.model_dump(), "config": config, "identity": run.identity}
    save_state(root, run.step, tensors, documents, run.config.save_total_limit)


def resume(run: Run, state: State) -> None:
    """Put a run where a checkpoint stands. Raises UserError as check_unchanged does."""
    check_unchanged(run.config, run.identity, state)
    for name, parameter in run.trainable.items():
        parameter.data.copy_(state.tensors["adapter"][name])
        found = {key: value for key, value in state.tensors["optimizer"].items() if key.rpartition(".")[0] == name}
        found = {key.rpartition(".")[2]: value.clone() for key, value in found.items()}  # not a part of the file's
        run.optimizer.state[parameter] = run.optimizer.placed(parameter, found)
    position = position_of(state)
    run.step, run.loss_scale = position.step, position.loss_scale
    before = position.max_forward_tokens
    if run.max_forward_tokens is None or (before is not None and before < run.max_forward_tokens):
        run.max_forward_tokens = before  # as it was split, so that the bits are the same
    run.loader.load_state_dict(position.loader.model_dump())
    restore_random(state.tensors["random"], run.device)


def check_unchanged(config: TrainConfig, identity: dict[str, str], state: State) -> None:
    """Raise UserError naming the first of the settings, or of what `identity` tells, that is not as it was."""
    now = {k: v for k, v in config.model_dump().items() if k not in FREE_TO_CHANGE}
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
    for what, digest in identity.items():
        if state.documents["identity"].get(what) != digest:
            raise UserError(
                f"a resumed run must have the {what} it began with",
                f"the {what} has changed",
                "put the old one back, or start a new run in another folder",
                str(state.path),
            )
