"""Exact: the binaries of real launches have no spills, fit in shared memory and load wide, on every target that the
kernels run on; no GPU is needed."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

WIDE = {
    "quantize",
    "dequantize",
    "row",
    "rows",
    "rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
    "rope",
    "cross_entropy",
}
KERNELS = {*WIDE, "quantize_tail", "adamw_8bit"}
FEW = {"sm_75": 11, "sm_120": 12, "gfx1100": 12}
ALL = {"sm_75": 25, "gfx942": 40, "gfx1100": 40} | {f"sm_{target}": 40 for target in (80, 86, 89, 90, 100, 120)}


@pytest.mark.parametrize("more, expected", [([], FEW), pytest.param(["--all"], ALL, marks=pytest.mark.slow)])
def test_the_binaries_of_launches(more, expected):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_triton", *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    for target, count in expected.items():
        of_target = [row for row in rows if row[0] == target]
        assert len(of_target) == count and {row[3] for row in of_target} == {"0"}, of_target
        assert {row[1] for row in of_target} == KERNELS - ({"rows"} if target == "sm_75" else set())
        narrow = {row[1] for row in of_target if " x 16" not in row[6] and row[2] != "float32"}
        assert not narrow & WIDE, f"{target}: no loads of 16 bytes in {narrow & WIDE}"
    assert len(rows) == sum(expected.values())
