"""Behaviour: a run's line at every width, its curve, and its report."""

import math
import re
from io import StringIO

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from onecard.train.progress import Progress, fitted
from onecard.train.report import breakable, draw_curve, limits, smooth

MIB = 1 << 20
ROW = {
    "step": 1065, "loss": 0.8334, "learning_rate": 3.64e-4, "grad_norm": 0.79, "supervised_tokens_per_second": 13384.0,
    "memory_bytes": 658 * MIB, "eval_loss": 1.2345,
}  # fmt: skip


def shown(width, terminal=True, **more):
    """The last line that a console of such a width shows."""
    console = Console(file=StringIO(), width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    with Progress(console, 2000, 1000, 210 * MIB, 468 * MIB) as progress:
        progress.step({**ROW, **more})
        if progress.bar:
            progress.bar.refresh()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()))
    return [line for line in lines if line.strip()][-1]


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
def test_the_time_left_is_on_the_line_at_every_width(width):
    line = shown(width)
    assert len(line.rstrip()) <= width
    assert re.search(r"(\d+:\d\d:\d\d|-:--:--)\s*$", line), line
    assert "step 1065/2000  loss 0.8334" in line and "…" not in line
    assert ("process" in line) == (width == 200)


def test_80_columns_say_what_the_plan_counts():
    assert "memory 190 MiB of 210 MiB planned" in shown(80, step=65)
    assert "process 468 MiB" in shown(200)


def test_a_file_gets_the_whole_line():
    line = shown(40, terminal=False, step=2000)
    for part in ("step 2000/2000", "loss 0.8334", "tok/s", "memory 190 MiB of 210 MiB planned", "process 468 MiB",
                 "validation 1.2345", "s left"):  # fmt: skip
        assert part in line, part


def test_parts_are_left_out_the_least_wanted_first():
    parts = {"step": "s" * 10, "norm": "n" * 5, "loss": "l" * 10}
    assert fitted(parts, 30) == "ssssssssss  nnnnn  llllllllll"
    assert fitted(parts, 28) == "ssssssssss  llllllllll"
    assert fitted(parts, 3) == ""


def test_smoothing_keeps_lines_and_does_not_lag():
    line = [3.0 - 0.01 * step for step in range(150)]
    assert smooth(line) == pytest.approx(line, abs=1e-12)
    assert smooth([2.0]) == [2.0] and smooth([2.0, 1.0]) == pytest.approx([2.0, 1.0])
    falling = [1 + 10 * math.exp(-step / 8) + 0.2 * (-1) ** step for step in range(400)]
    for step, value in enumerate(smooth(falling)):
        assert abs(value - (1 + 10 * math.exp(-step / 8))) < 0.25, step  # the noise is 0.2
    backwards = smooth(falling[::-1][:200])
    assert backwards == pytest.approx([1.0] * 200, abs=0.21)  # no side is favoured


def test_a_spike_does_not_flatten_the_rest():
    losses = [13.9, 8.0] + [1.2 - 0.005 * step for step in range(85)]
    low, high = limits(losses, [0.9])
    assert low < min(losses) and 1.2 < high < 2.0
    assert limits(losses, [5.0])[1] > 5.0  # a validation loss is never left out
    low, high = limits([2.0, 1.9, 1.8], [])
    assert low < 1.8 and high > 2.0
    assert all(low < high for low, high in (limits([1.0], []), limits([0.0, 0.0], [0.0])))


def test_the_curve_is_drawn(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    for count in (1, 2, 90):
        rows = [{"step": n + 1, "loss": 1 + 12 / (n + 1), "learning_rate": 1e-3 / (n + 1)} for n in range(count)]
        rows.append({"step": count, "eval_loss": 1.1})
        draw_curve(tmp_path / "curve.png", rows, "loss")
        top, bottom = figures.pop().axes
        lines = {line.get_label(): line.get_xydata().tolist() for line in top.lines}
        losses = [row["loss"] for row in rows if "loss" in row]
        steps = list(range(1, count + 1))
        assert lines["loss a step"] == [list(pair) for pair in zip(steps, losses)]
        assert lines["smoothed"] == [list(pair) for pair in zip(steps, smooth(losses))]
        assert lines["validation"] == [[count, 1.1]]
        assert bottom.lines[0].get_ydata().tolist() == [row["learning_rate"] for row in rows if "loss" in row]


def test_json_may_be_broken_between_its_tokens_only():
    text = '[{"city":"New York","n":10}]'
    assert breakable(text).replace("<wbr>", "") == text.replace('"', "&quot;")
    pieces = breakable(text).split("<wbr>")
    assert "&quot;city&quot;:" in pieces and "&quot;New York&quot;," in pieces
    assert breakable("<b>") == "&lt;b&gt;"
