"""The training loop. Only this module and step.py use both data and model.

A checkpoint holds all that an update depends on: adapter, AdamW's states, random generators and data cursor. So a
killed and resumed run ends with the same bits as an undisturbed run.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from onecard.config import TrainConfig
from onecard.data.dataset import Dataset
from onecard.data.loader import Loader
from onecard.hf.attention import use_packed_attention
from onecard.kernels.cpu.contention import sharing_cores
from onecard.train import signals
from onecard.train.checkpoint import checkpoint
from onecard.train.evaluate import mean_loss
from onecard.train.loss import packed_loss
from onecard.train.metrics import Metrics
from onecard.train.recompute import recompute_layers
from onecard.train.run import Run, count_batches
from onecard.train.step import optimizer_step


class Interrupted(Exception):
    """A signal arrived; the step is finished and its checkpoint is written."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def count_steps(loader: Loader, config: TrainConfig) -> int:
    """Count the updates of the run; a last short window counts too."""
    return math.ceil(count_batches(loader, config) / config.gradient_accumulation_steps)


def train(
    run: Run,
    metrics: Metrics,
    validation: Dataset | None,
    on_step: Callable[[dict[str, Any]], None],
    checkpoints: Path,
) -> None:
    """Run the remaining updates, and write metrics and checkpoints.

    Raises:
        UserError: NaN or Inf in a loss or gradient, before the update.
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, with a checkpoint written.
    """
    config = run.config
    save_steps = config.save_steps or max(1, math.ceil(run.num_steps / 10))
    run.model.train()
    if run.preference is not None:  # log-probabilities are compared without dropout, as in trl
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
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
                row |= check(run, validation)
            if last or run.step % config.logging_steps == 0 or "eval_loss" in row:
                metrics.log(**row)
            if last or run.step % save_steps == 0 or interrupted:
                checkpoint(run, checkpoints)
            on_step(row)  # after the checkpoint: after a signal, the terminal may be closed
            if interrupted and not last:
                raise Interrupted(interrupted[0])
    recompute_layers(run.base, 0)
    run.model.eval()


def check(run: Run, validation: Dataset) -> dict[str, float]:
    """Return the validation loss, and preferences' metrics, in the attention that `run.loss` needs."""
    if run.held_out is not None:
        return run.held_out.evaluate()
    return {"eval_loss": mean_loss(run.base, validation, run.loss)}


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Exclude all existing objects from Python's garbage collection. Scanning the half a million objects of model and
    libraries every other step took 10 % of a small model's step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
