"""How a run shows itself: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from rich import progress as bars
from rich.console import Console

from onecard.memory.measure import format_bytes

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows each step's row of metrics, with the time that is left."""

    def __init__(self, console: Console, num_steps: int, done: int):
        self.console, self.num_steps, self.first = console, num_steps, done
        self.start = self.shown = time.perf_counter()
        self.bar: bars.Progress | None = None
        if console.is_terminal:
            columns = [bars.TextColumn("{task.fields[text]}"), bars.BarColumn(None), bars.TimeRemainingColumn()]
            self.bar = bars.Progress(*columns, console=console)
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
        with suppress(OSError):  # a terminal that is gone ends no run
            self.show(row)

    def show(self, row: dict[str, Any]) -> None:
        text = self.text(row)
        if self.bar:
            self.bar.update(self.task, completed=row["step"], text=text)
            return
        now = time.perf_counter()
        if now - self.shown >= SECONDS_BETWEEN_LINES or row["step"] in (self.first + 1, self.num_steps):
            self.shown = now
            left = (now - self.start) / (row["step"] - self.first) * (self.num_steps - row["step"])
            self.console.print(f"{text}  {left:.0f} s left", highlight=False, soft_wrap=True)

    def text(self, row: dict[str, Any]) -> str:
        parts = [
            f"step {row['step']}/{self.num_steps}",
            f"loss {row['loss']:.4f}",
            f"lr {row['learning_rate']:.2e}",
            f"norm {row['grad_norm']:.2f}",
            f"{row['supervised_tokens_per_second']:,.0f} tok/s",
            format_bytes(row["memory_bytes"]),
        ]
        if "eval_loss" in row:
            parts.append(f"validation {row['eval_loss']:.4f}")
        return "  ".join(parts)
