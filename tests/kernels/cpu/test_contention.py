"""Behaviour: beside other busy processes libgomp's idle threads sleep, and the threads gather while they may; a setting
of the user's own holds; bits stay."""

import os
import subprocess
import sys

import pytest
import torch

from onecard.kernels import reference
from onecard.kernels.cpu import native
from onecard.kernels.cpu.library import WAITING, library, torch_gomp_parallel

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or library() is None or torch_gomp_parallel() is None,
    reason="needs Linux, the C++ kernels and a torch with libgomp",
)
START = """
import os, resource, sys, time
from pathlib import Path
import torch
from onecard.kernels.cpu import native
from onecard.kernels.cpu.library import library

def tasks():
    return [Path(f"/proc/self/task/{id}/comm").read_text().strip() for id in os.listdir("/proc/self/task")]

before = len(tasks())
library()
started = len(tasks()) - before
torch.set_num_threads(2)
W = torch.randn(512, 512)

def regions(count):
    for _ in range(count):
        packed = native.quantize_blocks(W, "nf4", 64, "W")
    return packed
"""
ANY_VALUE = {"GOMP_SPINCOUNT": "300000"}  # libgomp's own, and no watch beside the test's hand


def run(program: str, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", START + program]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


WATCHES = """
end = time.monotonic() + 60
while started and "onecard-watch" not in tasks() and time.monotonic() < end:  # until the thread has its name
    time.sleep(0.01)
print(tasks().count("onecard-watch"))
"""


@pytest.mark.parametrize(
    "variables, expected",
    [({}, "1"), ({"GOMP_SPINCOUNT": "5"}, "0"), ({"OMP_WAIT_POLICY": "active"}, "0")],
    ids=["by default", "own count", "own policy"],
)
def test_the_machine_is_watched_unless_the_user_has_chosen(variables, expected):
    assert run(WATCHES, **variables) == [expected]


SLEEPS = """
def sleeps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    first = regions(300)
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before, first

regions(10)
spinning, (codes, absmax) = sleeps()
library().onecard_set_contended(1)
regions(10)
sleeping, (same_codes, same_absmax) = sleeps()
library().onecard_set_contended(0)
regions(10)
again, _ = sleeps()
print(spinning, sleeping, again, torch.equal(codes, same_codes) and torch.equal(absmax, same_absmax))
"""


def test_idle_threads_sleep_only_beside_others():
    # Two threads meet 300 times, and work for some time between. Who sleeps gives its core away each time.
    spinning, sleeping, again, same = run(SLEEPS, **ANY_VALUE)
    assert same == "True"
    assert int(sleeping) >= 100 and int(sleeping) > 4 * max(int(spinning), int(again)), (spinning, sleeping, again)


BESIDE_LOOPS = """
import subprocess

loop = "import os\\nwhile os.getppid() == %d: pass" % os.getpid()
cores = os.sched_getaffinity(0)
from onecard.kernels.cpu.contention import sharing_cores
seen = set()
with sharing_cores():
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(2 * len(cores))]
    end = time.monotonic() + 60
    while time.monotonic() < end and not (library().onecard_contended() and len(seen) == min(2, len(cores))):
        regions(20)
        seen.add(len(os.sched_getaffinity(0)))
        if len(cores) != 2 and library().onecard_contended():
            break
    found = library().onecard_contended()
    for each in loops:
        each.kill()
        each.wait()
print(found, len(seen), os.sched_getaffinity(0) == cores)
"""


def test_loops_are_noticed_and_cores_come_back():
    found, sizes, same = run(BESIDE_LOOPS)
    assert found == "1"
    assert same == "True"
    if len(os.sched_getaffinity(0)) == 2:
        assert sizes == "2"  # both cores, then one


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 4097, 40000])
def test_parts_cover_everything_once(size, threads):
    # Each part of a call rounds its own blocks: a gap or a second visit would show in codes that were filled before.
    W = torch.randn(size * 64, generator=torch.Generator().manual_seed(0))
    expected = reference.quantize_blocks(W, "nf4", 64, "W")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed, absmax = native.quantize_blocks(W, "nf4", 64, "W")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(packed, expected[0]) and torch.equal(absmax, expected[1])
