"""Output folders of runs under a root: found by their files, with their state and newest numbers.

A folder with run.json or metrics.jsonl is a run's output, who ever started it. Nothing in it is locked or written: a
lock that is only tried would refuse a run that begins at this moment.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.errors import UserError, one_line
from onecard.train.curves import Curves
from onecard.train.record import FILE, Record, read_record

METRICS, REPORT, ADAPTER = "metrics.jsonl", "report.html", "adapter"
DEEPEST, MOST_FOLDERS = 6, 20_000
NOT_SEARCHED = {"checkpoints", ADAPTER, "node_modules", "__pycache__"}
UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


@dataclass
class RunFolder:
    """The output folder of a run."""

    path: Path
    curves: Curves
    record: Record | None = None
    error: str | None = None  # what is wrong with the record
    stamp: tuple[int, int] | None = None  # of the record's file that was read

    @classmethod
    def of(cls, path: Path) -> RunFolder:
        return cls(path, Curves(path / METRICS))

    def refresh(self) -> None:
        self.curves.refresh()
        try:
            found = (self.path / FILE).stat()
        except OSError:
            self.record, self.stamp, self.error = None, None, None
            return
        stamp = (found.st_ino, found.st_mtime_ns)
        if stamp != self.stamp:
            self.stamp = stamp
            try:
                self.record, self.error = read_record(self.path), None
            except UserError as error:
                self.record, self.error = None, str(error)

    @property
    def state(self) -> str:
        """Return running, finished, stopped, failed, killed or unknown."""
        record = self.record
        if record is None:
            return "finished" if self.has_adapter and self.error is None else "unknown"
        return "killed" if record.state == "running" and not record.is_running else record.state

    @property
    def has_adapter(self) -> bool:
        return (self.path / ADAPTER / "adapter_config.json").is_file()

    @property
    def message(self) -> str | None:
        """Return what ended the run, or what is wrong with its record."""
        return self.error or (self.record.message if self.record and self.record.state == "failed" else None)

    @property
    def step(self) -> int:
        return int(self.curves.last.get("step", 0))

    @property
    def began(self) -> float:
        """Return when the training began or went on, in seconds since 1970."""
        return self.record.began if self.record else modified(self.path / METRICS)

    @property
    def changed(self) -> float:
        """Return when a row of metrics or the record was last written, in seconds since 1970."""
        return max(modified(self.path / METRICS), modified(self.path / FILE))

    def numbers(self, names: tuple[str, ...]) -> dict[str, float | None]:
        """Return the newest value of each of these columns. NaN and Inf are None, since JSON has neither."""
        return {name: as_number(self.curves.last[name]) for name in names if name in self.curves.last}


def search(root: Path) -> tuple[dict[str, Path], bool]:
    """Return the output folders under a root by their path from it, and whether the search was cut short."""
    found: dict[str, Path] = {}
    top = len(root.parts)
    for count, (folder, below, files) in enumerate(os.walk(root)):
        if count == MOST_FOLDERS:
            return found, True
        path = Path(folder)
        if FILE in files or METRICS in files:
            name = path.relative_to(root).as_posix()
            found[name.encode(errors="backslashreplace").decode()] = path  # a name may have bytes that are no UTF-8
            below.clear()
        elif len(path.parts) - top >= DEEPEST:
            below.clear()
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in NOT_SEARCHED)
    return found, False


def list_runs(root: str) -> tuple[list[dict[str, Any]], bool]:
    """Return a line of facts for each run under a root, that with the newest change first.

    Returns:
        the facts, and whether there are too many folders to search all of them.

    Raises:
        UserError: the root is not a folder.
    """
    top = Path(root).expanduser()
    if not os.path.isdir(top):
        raise UserError("the root must be a folder", "no such folder", "give a folder with runs below it", root)
    there, is_cut = search(top)
    rows = []
    for name, path in there.items():
        run = RunFolder.of(path)
        run.refresh()
        record = run.record
        rows.append(
            {
                "name": name,
                "state": run.state,
                "step": run.step,
                "num_steps": record.num_steps if record else None,
                **{"loss": None, "eval_loss": None, **run.numbers(("loss", "eval_loss"))},
                "began": run.began,
                "changed": run.changed,
                "model": record.config["model"] if record else None,
                "message": run.message,
            }
        )
    return sorted(rows, key=lambda row: row["changed"], reverse=True), is_cut


def run_lines(rows: list[dict[str, Any]], now: float | None = None) -> list[str]:
    """Return the facts of runs as lines of text in columns. The name is last, so that a long one moves no column."""
    now = time.time() if now is None else now
    table = [("state", "step", "loss", "eval loss", "changed", "run")]
    for row in rows:
        of = f"/{row['num_steps']:,}" if row["num_steps"] is not None else ""
        loss, eval_loss = ("" if row[name] is None else f"{row[name]:.4g}" for name in ("loss", "eval_loss"))
        changed, name = age(now - row["changed"]), one_line(row["name"])
        table.append((row["state"], f"{row['step']:,}{of}", loss, eval_loss, changed, name))
    widths = [max(len(line[i]) for line in table) for i in range(5)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[5]]) for line in table]
    notes = [(row["name"], row["message"].splitlines()) for row in rows if row["message"]]
    return [*lines, *(f"note: {one_line(name)}: {one_line('; '.join(map(str.strip, said)))}" for name, said in notes)]


def age(seconds: float) -> str:
    """Return a time that has passed, in its largest unit."""
    size, unit = next((each for each in UNITS if seconds >= each[0]), UNITS[-1])
    return f"{max(0, int(seconds // size))} {unit} ago"


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def as_number(value: float) -> float | None:
    """Return a number that JSON has; None for NaN and Inf."""
    return value if abs(value) != float("inf") and value == value else None
