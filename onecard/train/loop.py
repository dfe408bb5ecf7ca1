"""The training loop. Only this module and step.py use both data and model.

A checkpoint holds all that an update depends on: adapter, AdamW's states, random generators and data cursor. So a
killed and resumed run ends with the same bits as an undisturbed run (on a GPU with deterministic.py).
"""

from __future__ import annotations

import gc
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from onecard.config import TrainConfig
from onecard.config.evaluation import Interval
from onecard.data.loader import Loader
from onecard.errors import UserError
from onecard.kernels.cpu.contention import sharing_cores
from onecard.memory.inputs import MemoryStrategy
from onecard.train import signals
from onecard.train.checkpoint import checkpoint
from onecard.train.evaluate import attention_of
from onecard.train.metrics import Metrics, Rows
from onecard.train.recompute import recompute_layers
from onecard.train.run import Run, count_batches
from onecard.train.step import optimizer_step

Evaluate = Callable[[Run], dict[str, float]]


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
    metrics: Metrics | Rows,
    evaluate: Evaluate | None,
    on_step: Callable[[dict[str, Any]], None],
    checkpoints: Path,
) -> None:
    """Run the remaining updates, and write metrics and checkpoints. Early stopping may end them before num_steps.

    Args:
        evaluate: returns each metric of an evaluation by its name; None without eval data.

    Raises:
        UserError: NaN or Inf in a loss or gradient, before the update; rows of a stream that cannot be read, with a
            checkpoint written.
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, with a checkpoint written.
    """
    config = run.config
    save_steps = config.save_steps or max(1, math.ceil(run.num_steps / 10))
    run.model.train()
    if run.config.loss != "sft":  # log-probabilities are compared without dropout, as in trl
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    recompute_layers(run.base, run.strategy, run.offload)
    with attention_of(run.base, run.loss), frozen_objects(), sharing_cores(), signals.noted() as interrupted:
        while not run.is_over:
            epochs, before = run.loader.num_epochs_done, run.loader.state_dict()
            try:
                row = optimizer_step(run)
            except UserError:
                if run.step and run.ranks.count == 1 and run.loader.state_dict() == before:
                    checkpoint(run, checkpoints)  # rows could not be read, and nothing of the update has begun
                raise
            at_end, last = run.loader.num_epochs_done > epochs, run.step == run.num_steps
            is_best = False
            evaluates = is_due(config.eval_strategy, config.eval_steps, run.step, at_end, last)
            if evaluate is not None and evaluates:
                with run.optimizer.averaged():
                    scores = evaluate(run)
                row |= scores
                is_best = run.best is not None and run.best.update(run.step, scores.get(run.best.metric, math.nan))
            if run.is_over or run.step % config.logging_steps == 0 or (evaluate is not None and evaluates):
                metrics.log(**row)
            saves = is_due(config.save_strategy, save_steps, run.step, at_end, run.is_over)
            stops = run.ranks.any(bool(interrupted))  # a signal may reach only some of several processes
            if saves or (is_best and config.load_best_model_at_end) or stops:
                checkpoint(run, checkpoints)
            on_step(row)  # after the checkpoint: after a signal, the terminal may be closed
            if stops and not run.is_over:
                raise Interrupted(interrupted[0] if interrupted else signal.SIGTERM)
    recompute_layers(run.base, MemoryStrategy())
    run.optimizer.finish()
    if run.noise is not None:
        run.noise.remove()
    run.model.eval()


def is_due(strategy: Interval, steps: int | None, step: int, epoch_ended: bool, last: bool) -> bool:
    """Whether a strategy acts after an update. All but "no" act after the last one."""
    if strategy == "no":
        return False
    return last or (epoch_ended if strategy == "epoch" else steps is not None and step % steps == 0)


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
