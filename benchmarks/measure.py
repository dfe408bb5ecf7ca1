"""Helpers of all benchmarks: child processes, memory, medians, the hardware's name."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MB = 1e6


def run_child(module: str, *args: str) -> dict[str, Any]:
    """Run `python -m module args` and return the JSON object on its last line."""
    done = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(args)}: exit {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def status_bytes(field: str) -> int:
    """Return a field of process memory in bytes: VmHWM (peak of all pages), VmRSS, RssAnon (without file pages)."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert found, field
    return int(found[1]) * 1024


@contextmanager
def anonymous_peak(every: float = 0.002) -> Iterator[list[int]]:
    """Yield a list whose one item follows the peak of RssAnon (memory that is not pages of a file) inside the block."""
    peak, done = [status_bytes("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(every):
            peak[0] = max(peak[0], status_bytes("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], status_bytes("RssAnon"))


def mapped_bytes(folder: Path) -> int:
    """Return the resident bytes of this process's mappings of files in a folder."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.find(f"{folder}/") >= 0
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def matmul_flops(seconds: float = 2.0) -> float:
    """Return the best floating-point operations a second of a bfloat16 (512 x 2048) (2048 x 5632) product."""
    a, b = torch.randn(512, 2048).bfloat16(), torch.randn(5632, 2048).bfloat16()
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        torch.mm(a, b.T)
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 2048 * 5632 / best


def spread(values: list[float]) -> str:
    """Format as: median (least to most)."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def hardware() -> str:
    """Return CPU, cores, memory, instructions and versions in one line."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s+: (.*)", info)
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in info]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{name[1] if name else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {' '.join(flags)}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def write_result(name: str, title: str, body: str) -> Path:
    """Write results/<name>_<date>.md: title, date, hardware, body."""
    date = time.strftime("%Y-%m-%d")
    path = RESULTS / f"{name}_{date}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# {title}\n\n{date}, {hardware()}.\n\n{body.strip()}\n", encoding="utf-8")
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
