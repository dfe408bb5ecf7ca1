"""A run's metrics as curves: read as the file grows, and thinned to what a screen can show.

A curve of 100,000 steps has more points than a screen has columns. Each bucket of steps gives its least and its
greatest value, so that no peak is lost. The smoothed loss is computed of all steps before it is thinned.
"""

from __future__ import annotations

import json
import os
import stat
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from onecard.train.metrics import COLUMNS, HEAD_COLUMNS, PREFERENCE_COLUMNS, SCORE

NUMBERS = {int, float}  # not bool
KNOWN = {*COLUMNS, *PREFERENCE_COLUMNS, *HEAD_COLUMNS}
MOST_COLUMNS = 200  # names of scores come from the file
LEAST_SMOOTHED = 8  # losses
MOST_NEIGHBOURS = 50  # on each side of a smoothed loss
MOST_STEPS = 1 << 53  # a float has every integer up to it
Points = dict[str, list[float | None]]


class Curves:
    """The columns of a metrics.jsonl, which may still grow. A file that was replaced, as by a resumed run, is read
    again."""

    def __init__(self, path: Path):
        self.path = path
        self.clear()

    def clear(self) -> None:
        self.inode: int | None = None
        self.offset, self.rest = 0, b""
        self.columns: dict[str, tuple[list[int], list[float]]] = {}
        self.last: dict[str, float] = {}
        self.version = 0
        self.drawn: dict[str, tuple[np.ndarray, np.ndarray]] | None = None  # the columns, and the smoothed loss

    def refresh(self) -> None:
        """Read what the file has more than before. A file that is not there has no rows."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # a pipe would be waited for
                raise FileNotFoundError
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self.inode or found.st_size < self.offset:
                    version = self.version
                    self.clear()
                    self.inode, self.version = found.st_ino, version + 1
                if found.st_size == self.offset:
                    return
                file.seek(self.offset)
                data = file.read(found.st_size - self.offset)
        except OSError:
            self.clear()
            return
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for names, rows in groupby(filter(is_row, rows_of(lines)), key=tuple):
            self.add(names, list(rows))
        self.version, self.drawn = self.version + 1, None

    def add(self, names: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
        """Append rows that have the same names, a column at a time."""
        steps = [row["step"] for row in rows]
        for name in names:
            if name not in self.columns:
                if name not in KNOWN and (not SCORE.fullmatch(name) or len(self.columns) >= MOST_COLUMNS):
                    continue
                self.columns[name] = ([], [])
            values = [as_float(row[name]) for row in rows]
            self.columns[name][0].extend(steps)
            self.columns[name][1].extend(values)
            self.last[name] = values[-1]

    @property
    def num_rows(self) -> int:
        return len(self.columns["step"][0]) if "step" in self.columns else 0

    def points(self, most: int, first: int | None = None, last: int | None = None) -> dict[str, Points]:
        """Return x (steps) and y of each column within `first` and `last`, some `most` points each at most."""
        if self.drawn is None:
            columns = {name: (np.array(steps), np.array(values)) for name, (steps, values) in self.columns.items()}
            steps, losses = columns.get("loss", (np.array([]), np.array([])))
            if len(losses) >= LEAST_SMOOTHED:
                columns["smoothed"] = (steps, np.array(smooth(losses.tolist())))
            self.drawn = columns
        parts = {name: within(*self.drawn[name], first, last) for name in self.drawn if name != "step"}
        return {name: (thinned if name != "smoothed" else spaced)(*part, most) for name, part in parts.items()}


def is_row(row: Any) -> bool:
    """Whether a line is a row of metrics. Others are left out, as by `onecard train --resume`."""
    if type(row) is not dict or type(row.get("step")) is not int or not 0 <= row["step"] <= MOST_STEPS:
        return False
    return all(type(value) in NUMBERS for value in row.values())


def as_float(value: int | float) -> float:
    """Return a float; NaN for an integer that no float holds."""
    try:
        return float(value)
    except OverflowError:
        return float("nan")


def rows_of(lines: list[bytes]) -> list[Any]:
    """Parse lines of JSON. Skip a line that a kill has cut."""
    try:  # in one go: 100,000 lines in a part of a second
        rows = json.loads(b"[" + b",".join(line for line in lines if line.strip()) + b"]")
    except (ValueError, RecursionError):
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
    return rows


def within(x: np.ndarray, y: np.ndarray, first: int | None, last: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of the steps from `first` to `last`, and one more on each side, to which lines lead."""
    begin = 0 if first is None else max(int(np.searchsorted(x, first)) - 1, 0)
    end = len(x) if last is None else int(np.searchsorted(x, last, "right")) + 1
    return x[begin:end], y[begin:end]


def thinned(x: np.ndarray, y: np.ndarray, most: int) -> Points:
    """Return the points, or the least and the greatest one of each of `most` // 2 buckets, and both ends."""
    if len(x) <= max(most, 4):
        return as_json(x, y)
    size = -(-len(x) // max(most // 2 - 1, 1))
    filled = np.full(-(-len(x) // size) * size, np.nan)
    filled[: len(y)] = y
    rows, starts = filled.reshape(-1, size), np.arange(0, len(filled), size)
    least = starts + np.where(np.isnan(rows), np.inf, rows).argmin(axis=1)
    greatest = starts + np.where(np.isnan(rows), -np.inf, rows).argmax(axis=1)
    kept = np.unique(np.concatenate([[0], least, greatest, [len(x) - 1]]))
    return as_json(x[kept], y[kept])


def spaced(x: np.ndarray, y: np.ndarray, most: int) -> Points:
    """Return some `most` points at equal distances, and both ends."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(most, len(x))).astype(int)) if len(x) else slice(0)
    return as_json(x[kept], y[kept])


def as_json(x: np.ndarray, y: np.ndarray) -> Points:
    """Return lists. JSON has no NaN and no Inf: they are null, a gap in the curve."""
    return {"x": x.tolist(), "y": [value if np.isfinite(value) else None for value in y.tolist()]}


def smooth(values: list[float]) -> list[float]:
    """Fit a straight line to each step's neighbours, by least squares with weights that fall on both sides.

    A straight line stays unchanged, also at the ends: there is no lag and no bias. A loss falls fastest at the start,
    so the window is narrow there: an eighth of the steps before, at most a twentieth of all and `MOST_NEIGHBOURS`.
    Where the window is whole, the fit at its middle is the weighted mean: one convolution.
    """
    y = np.asarray(values, dtype=float)
    widest = min(max(len(values) // 20, 2), MOST_NEIGHBOURS)
    weight = widest + 1 - np.abs(np.arange(-widest, widest + 1.0))
    out = np.convolve(y, weight / weight.sum(), "same") if len(y) > 2 * widest else np.zeros_like(y)
    first_whole, after_whole = max(8 * (widest - 1), widest), len(y) - widest
    for at in (*range(min(first_whole, len(y))), *range(max(after_whole, first_whole), len(y))):
        half = min(widest, 1 + at // 8)
        distance = np.arange(max(-half, -at), min(half, len(y) - 1 - at) + 1)
        weight = 1 - np.abs(distance) / (half + 1)
        near = y[at + distance]
        mean = (weight * distance).sum() / weight.sum()
        centred = distance - mean
        spread = (weight * centred**2).sum()
        slope = (weight * centred * near).sum() / spread if spread else 0.0
        out[at] = (weight * near).sum() / weight.sum() - slope * mean
    return out.tolist()
