"""Behaviour: the GPU benchmark's logic, on the CPU with a tiny shape; numbers need a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_memory


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry():
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(gpu.CONTENDERS) * 2 + len(gpu.GENERATES) + len(gpu_memory.CASES), done.stdout
    assert "failed" not in done.stdout, done.stdout


@pytest.mark.parametrize("case", gpu_memory.CASES)
def test_a_case_under_a_cap_runs_dry(case):
    assert "tok" in gpu_memory.CASES[case](True, gpu_memory.torch.device("cpu"))


def test_the_report_has_what_was_found():
    row = {"shape": "1b", "contender": "onecard"}
    measured = {"seconds": 0.5, "peak": 3e9}
    found = {
        "device": "an H100", "torch": "2", "tests": "9 passed",
        "kernels": [{"kernel": "quantize", "ms": 1.0, "of_floor": 0.5}],
        "steps": [{**row, **gpu.step_row("1b", 512, measured, "an H100")}, {**row, "length": 1, "failed": "no memory"}],
        "generate": [{**row, "tok_s": 61.5}, {**row, "failed": "not installed"}],
        "memory": [{"case": "7b", "found": "peak 5 GB"}, {"case": "123b", "failed": "not run: the time was over"}],
    }  # fmt: skip
    text = gpu.markdown(found)
    for part in ("1,024", "3.0", "50%", "no memory", "61.5", "not installed", "peak 5 GB", "not run"):
        assert part in text, part
