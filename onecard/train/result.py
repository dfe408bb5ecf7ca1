"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.train.report import Report


@dataclass
class Result:
    """A run that has ended.

    Attributes:
        model: the tuned peft model, in memory and in eval mode.
        tokenizer: its tokenizer.
        report: everything that the report shows.
        adapter: the folder of the adapter, in peft's format.
    """

    model: Any
    tokenizer: Any
    report: Report
    adapter: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A dict for each logged update, as in metrics.jsonl: step, loss in nats for each supervised token, ..."""
        return self.report.metrics

    @property
    def loss_before(self) -> float | None:
        """The validation loss before training, in nats for each supervised token. None without validation data."""
        return self.report.loss_before

    @property
    def loss_after(self) -> float | None:
        """The mean validation loss after training, in nats a token. None without validation data."""
        return self.report.loss_after

    @property
    def report_path(self) -> Path:
        """The HTML report."""
        return self.adapter.parent / "report.html"
