"""Exact: a thinned curve keeps each bucket's extremes and both ends; a file that grows is read as one that is whole."""

import json
import math
import random
import time

import numpy as np
import pytest

from onecard.train.curves import Curves, thinned
from onecard.train.report import smooth


def row(step, **more):
    return {"step": step, "loss": 2 + math.sin(step / 300) + (step * 7919 % 101) / 500, "learning_rate": 1e-4, **more}


def write(path, rows, mode="w"):
    with path.open(mode) as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)


def test_a_short_curve_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [row(step, **({"eval_loss": 1.5} if step == 4 else {})) for step in range(1, 10)])
    curves = Curves(path)
    curves.refresh()
    found = curves.points(100)
    assert found["loss"] == {"x": list(range(1, 10)), "y": [row(step)["loss"] for step in range(1, 10)]}
    assert found["eval_loss"] == {"x": [4], "y": [1.5]}
    assert found["smoothed"]["y"] == pytest.approx(smooth(found["loss"]["y"]), abs=1e-12)
    assert curves.last["step"] == 9 and "step" not in found


def test_a_thinned_curve_keeps_every_peak():
    x, y = np.arange(1, 50_001), np.zeros(50_000)
    y[12_345], y[40_000], y[0], y[-1] = 9, -9, 1, 2
    y[777] = np.nan
    found = thinned(x, y, 200)
    points = dict(zip(found["x"], found["y"]))
    assert len(points) <= 204
    assert points[12_346] == 9 and points[40_001] == -9 and points[1] == 1 and points[50_000] == 2
    random.seed(0)
    y = np.array([random.gauss(0, 1) for _ in range(50_000)])
    kept = thinned(x, y, 1000)
    assert max(kept["y"]) == y.max() and min(kept["y"]) == y.min() and kept["x"] == sorted(set(kept["x"]))
    assert kept["y"] == [y[step - 1] for step in kept["x"]], "each is a point of the curve"


def test_a_growing_file_is_read_as_a_whole_one(tmp_path):
    path, rows = tmp_path / "metrics.jsonl", [row(step) for step in range(1, 400)]
    growing = Curves(path)
    growing.refresh()
    assert growing.num_rows == 0 and growing.points(10) == {}
    text = "".join(json.dumps(each) + "\n" for each in rows)
    versions = set()
    for end in range(0, len(text) + 997, 997):  # cuts lines anywhere
        path.write_text(text[:end])
        growing.refresh()
        versions.add(growing.version)
    whole = Curves(path)
    whole.refresh()
    assert growing.points(100) == whole.points(100) and growing.num_rows == 399 and len(versions) > 10
    growing.refresh()
    assert growing.version == max(versions), "nothing new is no change"


def test_a_resumed_run_s_file_is_read_again(tmp_path):
    """`onecard train --resume` replaces the file by one with fewer rows."""
    path = tmp_path / "metrics.jsonl"
    write(path, [row(step) for step in range(1, 21)])
    curves = Curves(path)
    curves.refresh()
    before = curves.version
    write(tmp_path / "new", [row(step, loss=5.0) for step in range(1, 11)])
    (tmp_path / "new").replace(path)
    write(path, [row(step, loss=5.0) for step in range(11, 31)], "a")
    curves.refresh()
    assert curves.points(100)["loss"] == {"x": list(range(1, 31)), "y": [5.0] * 30} and curves.version > before
    path.unlink()
    curves.refresh()
    assert curves.num_rows == 0


def test_what_is_no_row_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "loss": 2.0}', "", "{", "[1]", '"text"', '{"loss": 1.0}', '{"step": "2", "loss": 1.0}',
        '{"step": 2, "loss": NaN, "grad_norm": Infinity}', '{"step": 3, "loss": true}', '{"step": 4, "<b>": 1.0}',
        '{"step": 5, "loss": 1' + "0" * 400 + "}", '{"step": 6, "eval_mine/loss": 3}',
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    curves = Curves(path)
    curves.refresh()
    found = curves.points(100)
    assert found["loss"] == {"x": [1, 2, 5], "y": [2.0, None, None]}
    assert found["grad_norm"] == {"x": [2], "y": [None]} and found["eval_mine/loss"]["y"] == [3.0]
    assert "<b>" not in found
    json.dumps(found, allow_nan=False)


def test_a_part_has_one_point_more_on_each_side(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [row(step) for step in range(1, 1001)])
    curves = Curves(path)
    curves.refresh()
    assert curves.points(4000, 100, 110)["loss"]["x"] == list(range(99, 112))
    assert curves.points(4000, 999, None)["loss"]["x"] == [998, 999, 1000]
    assert curves.points(4000, 5000, 6000)["loss"]["x"] == [1000]


def test_a_hundred_thousand_steps_take_less_than_a_second(tmp_path):
    """Of the processor, as the tests of others may run beside. Read, smoothed and thinned from nothing, then again."""
    path = tmp_path / "metrics.jsonl"
    more = {"grad_norm": 0.5, "supervised_tokens_per_second": 2345.6, "memory_bytes": 7 << 30, "seconds": 1.5}
    write(path, [row(step, **more) for step in range(1, 100_001)])
    curves = Curves(path)
    start = time.process_time()
    curves.refresh()
    found = curves.points(1200)
    assert time.process_time() - start < 2, "about 0.5 s on a quiet machine"
    start = time.process_time()
    assert curves.points(1200) == found
    assert time.process_time() - start < 0.5
    assert curves.num_rows == 100_000 and all(len(each["x"]) <= 1204 for each in found.values())
