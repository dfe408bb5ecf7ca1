"""Behaviour: the GPU benchmark's logic, on the CPU with a tiny shape; numbers need a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_kernels, gpu_memory, gpu_steps, gpu_unsloth
from benchmarks.gpu_steps import Row

CPU = torch.device("cpu")
ROWS = [Row(64), Row(96, 3, True)]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry():
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for job in gpu.jobs(gpu.parse(["--dry-run"])):
        assert str(job) in done.stdout, job
    failed = [line for line in done.stdout.splitlines() if "failed" in line]
    assert len(failed) == 1 and "unsloth" in failed[0], done.stdout


def test_kernels_run_dry():
    found = list(gpu_kernels.of_shape(gpu_kernels.Timer(CPU), 256, 128))
    names = [row["kernel"] for row in found]
    assert len(set(names)) == len(names) and all(row["us"] > 0 and row["of_floor"] > 0 for row in found)
    for M in (1, 4, 16, 64):
        assert {f"product of {M} rows, 256x128", f"product of {M} rows with LoRA, 256x128"} <= set(names)


@pytest.mark.parametrize("contender", ["onecard", "lora"])
def test_steps_run_dry(contender):
    """Ours is the product's own update, also of packed rows; a peer's rows are single documents."""
    found = dict(gpu_steps.child("tiny", contender, ROWS, CPU))
    assert not any("failed" in result for result in found.values()), found
    assert [name for name in found if name != "generate"] == ["64", "96x3r"][: 2 if contender == "onecard" else 1]
    row = gpu_steps.row_result("tiny", ROWS[0], {"seconds": 0.5, "reserved": 2e9, "busy": 0.25}, 1e12)
    assert (row["tok_s"], row["reserved_gb"], row["busy"]) == (128, 2, 0.5)
    assert row["mfu"] == pytest.approx(128 * gpu_steps.useful_flops("tiny", 64) / 1e12)


def test_what_fails_says_so():
    def fails():
        raise torch.OutOfMemoryError("no memory\nmore")

    assert gpu_steps.attempt(fails) == {"failed": "OutOfMemoryError: no memory"}
    (found,) = [result for _, result in gpu_unsloth.child("tiny", ROWS, CPU)]
    assert "unsloth" in found["failed"]


@pytest.mark.parametrize("case", gpu_memory.CASES)
def test_a_case_under_a_cap_runs_dry(case):
    assert "tok" in gpu_memory.CASES[case](True, CPU)


@pytest.mark.parametrize("fits", [range(0), range(82_000), range(120_000), range(1 << 30)])
def test_the_longest_context_is_sought_from_the_goal(fits, monkeypatch):
    monkeypatch.setattr(gpu_memory, "random_model", lambda *_: torch.nn.Linear(1, 1))
    monkeypatch.setattr(gpu_memory, "longest", lambda _, length, __: "1 tok/s" if length in fits else "")
    found = gpu_memory.context("8b", gpu_memory.GOAL, gpu_memory.OTHERS, 1, CPU).split("; ")
    assert found[0].startswith("100,032") and ("1 tok/s" in found[0]) == (gpu_memory.GOAL in fits)
    tried = {int(part.split()[0].replace(",", "")): "1 tok/s" in part for part in found}
    assert all((length in fits) == fitted for length, fitted in tried.items())
    assert len(set(tried.values())) == 2 or len(fits) in (0, 1 << 30)


def test_busy_time_is_the_union_of_intervals():
    assert gpu_steps.union([(5, 7), (0, 2), (1, 3), (1, 2), (6, 9)]) == 7
    assert gpu_steps.union([]) == 0


def test_rows_are_named():
    for row in gpu_steps.ROWS:
        assert Row.parse(str(row)) == row
    assert Row.parse("8192x16r") == Row(8192, 16, True)


@pytest.mark.parametrize(
    "code, expected",
    [
        ("print('{\"name\": \"a\"}', flush=True); raise ValueError('broken')", [{"name": "a"}, "ValueError: broken"]),
        ('import time; print(\'{"name": "a"}\', flush=True); time.sleep(60)', [{"name": "a"}, "stopped: the time"]),
        ("print('warning'); print('3 passed, 1 skipped in 2s')", [{"tests": "3 passed, 1 skipped in 2s"}]),
        ("print('1 failed, 3 passed in 2s'); raise SystemExit(1)", [{"tests": "1 failed, 3 passed in 2s"}]),
    ],
)
def test_a_part_that_ends_badly_keeps_what_it_found(code, expected):
    now = time.monotonic()
    found = list(gpu.results(gpu.start(["-c", f"input()\n{code}"]), now + 60, now + (1 if "sleep" in code else 60)))
    for result, wanted in zip(found, expected, strict=True):
        assert result == wanted if isinstance(wanted, dict) else wanted in result["failed"]


def test_a_part_that_has_not_begun_in_time_does_not_run():
    running = gpu.start(["-c", "input(); print('{}')"])
    assert list(gpu.results(running, time.monotonic() - 1, time.monotonic())) == [
        {"failed": "not run: the time was over"}
    ]
    running.kill()
    running.communicate()


def test_one_section_runs_alone():
    args = gpu.parse(["--sections", "memory", "--cases", "7b"])
    assert gpu.jobs(args) == [("memory", "7b")]
    sections = {job[0] for job in gpu.jobs(gpu.parse([]))}
    assert sections == set(gpu.SECTIONS)


def test_the_report_has_what_was_found():
    found = {"device": "an H100", "torch": "2", "tests": None, "kernels": [], "steps": [], "generate": [], "memory": []}
    times = {"seconds": 0.5, "busy": 0.4, "reserved": 3e9}
    for job, result in [
        (("tests",), {"tests": "9 passed"}),
        (("kernels",), {"name": "copy", "copy_speed": 4e12}),
        (("kernels",), {"kernel": "quantize", "us": 12.34, "of_floor": 0.5, "in_graph": False}),
        (("kernels",), {"failed": "no compiler"}),
        (("steps", "1b", "onecard"), {"name": "2048x8", **times, "refused": "a wait"}),
        (("steps", "1b", "bnb"), {"failed": "not installed"}),
        (("steps", "1b", "onecard"), {"name": "generate", "seconds": 0.5}),
        (("unsloth", "8b"), {"name": "8192r", "mode": "unsloth", **times}),
        (("memory", "7b"), {"found": "peak 5 GB"}),
        (("memory", "123b"), {"failed": "stopped"}),
    ]:
        gpu.add(found, job, json.loads(json.dumps(result)), 989e12)
    text = gpu.markdown(found)
    for part in (
        "9 passed", "4,000 GB/s", "| 12.3 | 50% | by itself", "no compiler", "2,048 | 8 | no | onecard | 4,096 (no gr",
        "| 3.0 |", "80%", "not installed", "64.0", "8,192 | 1 | yes | unsloth unsloth |", "peak 5 GB", "stopped",
    ):  # fmt: skip
        assert part in text, (part, text)
