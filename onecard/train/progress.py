"""Progress display of a run: a bar on a terminal, plain lines elsewhere.

The remaining time is shown at every width. Other parts are dropped, the least important first, until the line
fits.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.table import Column

from onecard.memory.measure import format_bytes

SECONDS_BETWEEN_LINES = 10.0
TIME_WIDTH, BAR_WIDTH, SMALL_BAR_WIDTH = 8, 12, 5  # columns, each with the space before it
WANTED = (
    "step",
    "loss",
    "margin",
    "memory",
    "validation",
    "speed",
    "rate",
    "norm",
    "accuracy",
    "process",
)  # parts of a line, the most important first


class Progress:
    """Shows each step's metrics and the remaining time.

    Args:
        process_bytes: memory of the process itself, which `planned_bytes` does not include.
    """

    def __init__(self, console: Console, num_steps: int, done: int, planned_bytes: int, process_bytes: int):
        self.console, self.num_steps, self.first = console, num_steps, done
        self.planned_bytes, self.process_bytes = planned_bytes, process_bytes
        self.start = self.shown = time.perf_counter()
        self.bar: bars.Progress | None = None
        if console.is_terminal and not console.quiet:
            text = bars.TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
            left = bars.TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=TIME_WIDTH - 1))
            bar_width = (BAR_WIDTH if console.width >= 60 else SMALL_BAR_WIDTH) - 1
            self.bar = bars.Progress(text, bars.BarColumn(bar_width), left, console=console)
            self.task = self.bar.add_task("", total=num_steps, completed=done, text="starting")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar:
            with suppress(OSError):
                self.bar.stop()

    def step(self, row: dict[str, Any]) -> None:
        with suppress(OSError):  # a closed terminal must not end the run
            self.show(row)

    def show(self, row: dict[str, Any]) -> None:
        parts = self.parts(row)
        if self.bar:
            bar_width = BAR_WIDTH if self.console.width >= 60 else SMALL_BAR_WIDTH
            text = fitted(parts, self.console.width - TIME_WIDTH - bar_width)
            self.bar.update(self.task, completed=row["step"], text=text)
            return
        now = time.perf_counter()
        ends = row["step"] in (self.first + 1, self.num_steps)
        if ends or scores_of(row) or now - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = now
            left = (now - self.start) / (row["step"] - self.first) * (self.num_steps - row["step"])
            self.console.print(f"{'  '.join(parts.values())}  {left:.0f} s left", highlight=False, soft_wrap=True)

    def parts(self, row: dict[str, Any]) -> dict[str, str]:
        """Return a line's parts in order. `memory` excludes the process itself, same as the plan."""
        used = max(row["memory_bytes"] - self.process_bytes, 0)
        parts = {
            "step": f"step {row['step']}/{self.num_steps}",
            "loss": f"loss {row['loss']:.4f}",
            "rate": f"lr {row['learning_rate']:.2e}",
            "norm": f"norm {row['grad_norm']:.2f}",
            "speed": f"{row['supervised_tokens_per_second']:,.0f} tok/s",
            "memory": f"memory {format_bytes(used)} of {format_bytes(self.planned_bytes)} planned",
            "process": f"process {format_bytes(self.process_bytes)}",
        }
        if "rewards/margins" in row:
            parts["margin"] = f"margin {row['rewards/margins']:.4f}"
        if "rewards/accuracies" in row:
            parts["accuracy"] = f"accuracy {row['rewards/accuracies']:.0%}"
        scores = [f"{name[5:].removesuffix('loss').strip('_')} {row[name]:.4f}" for name in scores_of(row)]
        if scores:
            parts["validation"] = " ".join(["validation", *(score.strip() for score in scores)])
        return parts


def scores_of(row: dict[str, Any]) -> list[str]:
    """Return the names of what an evaluation computed, in a row of metrics."""
    return [name for name in row if name.startswith("eval_") and "/" not in name]


def fitted(parts: dict[str, str], width: int) -> str:
    """Join the most important parts that fit in `width` columns, in their own order."""
    kept: set[str] = set()
    for name in WANTED:
        text = "  ".join(part for key, part in parts.items() if key in kept | {name})
        if name in parts and len(text) <= width:
            kept.add(name)
    return "  ".join(part for key, part in parts.items() if key in kept)
