"""Exact: the NEON path gives the scalar path's bits. Cross-compiled and run under emulation where the tools are, for
machines of another kind; on an Arm machine test_native.py takes it by itself."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.mark.slow
def test_neon_is_bit_equal_under_emulation(tmp_path):
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} (packages g++-aarch64-linux-gnu, qemu-user)")
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-static", "-w"]
    sources = [ROOT / "csrc" / "neon.cpp", ROOT / "csrc" / "scalar.cpp", Path(__file__).with_name("check_neon.cpp")]
    subprocess.run([TOOLS[0], *flags, *map(str, sources), "-o", str(tmp_path / "check")], check=True)
    done = subprocess.run([TOOLS[1], str(tmp_path / "check")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "0 failures\n"
