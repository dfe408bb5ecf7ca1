"""metrics.jsonl and metrics.csv with a line per logged step, readable after any kill; other loggers on request."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from onecard.config import TrainConfig, eval_key
from onecard.config.evaluation import EVALUATED
from onecard.documents import parse_json
from onecard.errors import UserError
from onecard.faults import about

COLUMNS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "num_supervised_tokens",
    "supervised_tokens_per_second", "memory_bytes", "eval_loss", "seconds",
    "paged_in_bytes", "paged_out_bytes", "page_hit_rate", "page_stall_seconds",
)  # fmt: skip
PREFERENCE_COLUMNS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "nll_loss", "kl",
)  # fmt: skip
HEAD_COLUMNS = ("accuracy", "margin")
SCORE = re.compile(r"eval_[\w/-]{1,200}")  # what an evaluation computes
ROW = TypeAdapter(dict[str, int | float], config=ConfigDict(strict=True))
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


class Rows:
    """Keeps the numbers of each logged step in memory, for the processes that do not write."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, step: int, **values: float | None) -> None:
        self.rows.append({"step": step, **{key: value for key, value in values.items() if value is not None}})

    def close(self) -> None:
        """Nothing is open."""


class Metrics:
    """Writes the numbers of each logged step. A resumed run first drops the rows of the steps that it repeats.

    Args:
        scores: names of what an evaluation computes.
    """

    def __init__(
        self,
        output: Path,
        loggers: Sequence[str],
        config: dict[str, Any],
        resume_step: int = 0,
        scores: Sequence[str] = (),
    ):
        output.mkdir(parents=True, exist_ok=True)
        self.path = output / "metrics.jsonl"
        self.rows = [row for row in read_rows(self.path) if row["step"] <= resume_step]
        own = COLUMNS if config.get("loss", "sft") == "sft" else (*COLUMNS, *PREFERENCE_COLUMNS)
        own += HEAD_COLUMNS if config.get("task", "causal_lm") != "causal_lm" else ()
        self.columns = tuple(dict.fromkeys([*own, *scores, *chain(*self.rows)]))
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        replace_text(output / "metrics.csv", csv_text(self.columns, self.rows, header=True))
        self.jsonl = self.path.open("a", encoding="utf-8")
        self.csv = (output / "metrics.csv").open("a", encoding="utf-8", newline="")
        self.loggers = [started(name, output, config) for name in loggers]

    def log(self, step: int, **values: float | None) -> None:
        """Write one row. Every name must be a column."""
        row = {"step": step, **{key: value for key, value in values.items() if value is not None}}
        assert set(row) <= set(self.columns), row
        self.rows.append(row)
        with about(self.path):
            self.jsonl.write(json.dumps(row) + "\n")
            self.jsonl.flush()
        with about(self.path.with_suffix(".csv")):
            self.csv.write(csv_text(self.columns, [row]))
            self.csv.flush()
        for log, _ in self.loggers:
            log({key: value for key, value in row.items() if key != "step"}, step)

    def close(self) -> None:
        with ExitStack() as stack:  # close each, even if another fails
            for each in (self.jsonl.close, self.csv.close, *(close for _, close in self.loggers)):
                stack.callback(each)


def score_columns(config: TrainConfig) -> list[str]:
    """Return the names of all that an evaluation may compute."""
    more = EVALUATED.get(config.objective, ()) if config.has_head else ()
    more = more if config.loss == "sft" else PREFERENCE_COLUMNS
    names = ("loss", *config.metric_names, *more)
    return [eval_key(data, name) for data in config.eval_names for name in names]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl. Skip a line that a kill has cut."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = ROW.validate_python(parse_json(line, infinities=True))
        except ValueError:  # includes ValidationError
            continue
        if type(row.get("step")) is int and all(
            name in (*COLUMNS, *PREFERENCE_COLUMNS, *HEAD_COLUMNS) or SCORE.fullmatch(name) for name in row
        ):
            rows.append(row)
    return rows


def csv_text(columns: Sequence[str], rows: list[dict[str, Any]], header: bool = False) -> str:
    """Format rows as CSV lines, after a line of the column names if `header`."""
    buffer = io.StringIO()
    writer: Any = csv.DictWriter(buffer, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with about(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def import_logger(name: str) -> Any:
    """Import a logger's module. Raises UserError if its package is not installed."""
    try:
        return import_module(MODULES[name])
    except ImportError as error:
        do = f'pip install "onecard[{name}]"'
        raise UserError(f"the logger {name} must be installed", str(error), do, "loggers") from None


def started(name: str, output: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """Same as `open_logger`. Any failure of a service to start (its address, a login, its store) is a UserError."""
    try:
        return open_logger(name, output, config)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        do = "set the logger up, or leave it out of --loggers"
        raise UserError(f"the logger {name} must start", reason, do, "loggers") from None


def open_logger(name: str, output: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """Open a logger and return its (log(values, step), close())."""
    module = import_logger(name)
    if name == "tensorboard":
        writer = module.SummaryWriter(str(output / "tensorboard"))
        return (lambda values, step: [writer.add_scalar(k, v, step) for k, v in values.items()]), writer.close
    if name == "mlflow":
        module.start_run(run_name=output.name)
        module.log_params({key: str(value)[:250] for key, value in config.items()})
        return (lambda values, step: module.log_metrics(values, step=step)), module.end_run
    run = module.init(project="onecard", name=output.name, config=config)
    return (lambda values, step: run.log(values, step=step)), run.finish
