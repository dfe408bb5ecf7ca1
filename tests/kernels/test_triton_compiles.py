"""Each kernel compiles for every target without a spill, within its shared memory; no GPU is needed."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("more, count", [([], 11), pytest.param(["--all"], 28, marks=pytest.mark.slow)])
def test_every_kernel_compiles_without_spills_and_fits(more, count):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_triton", *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 spills") == 5 * count, done.stdout
