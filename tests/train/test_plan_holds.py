"""Bound: a small run takes what its plan says, to 8 % or 32 MiB; whole runs in processes of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.plan import ALLOWED, ALLOWED_BYTES
from onecard.memory.measure import begin_peak, peak_memory_bytes
from onecard.memory.process import PRODUCT_BYTES
from onecard.memory.workload import Answers, Workload, pieces_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["demo-train", pytest.param("demo", marks=pytest.mark.slow)])
def test_the_demo_takes_what_its_plan_says(name, tmp_path):
    if not resets_its_peak():
        pytest.skip("this system does not reset a process's peak")
    command = [sys.executable, "-m", "benchmarks.plan", "--child", name, "--folder", str(tmp_path)]
    settings = {"OMP_NUM_THREADS": "2", "ONEDNN_VERBOSE": "2"}  # which tells each product that oneDNN prepares
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["plan"] - found["measured"]) <= max(ALLOWED * found["measured"], ALLOWED_BYTES), found
    planned = found["terms"].get("prepared products", 0) // PRODUCT_BYTES
    prepared = len(re.findall("create:cache_miss,cpu,matmul,.*bf16", done.stdout))
    assert 0.8 * planned <= prepared <= planned, (planned, prepared)


def resets_its_peak():
    import torch

    cpu = torch.device("cpu")
    torch.ones(1 << 25)
    before = peak_memory_bytes(cpu)
    begin_peak(cpu)
    return peak_memory_bytes(cpu) < before


def test_prompts_go_in_pieces_and_batches_whole():
    assert pieces_of(600, 1) == {256, 88} and pieces_of(256, 1) == {256} and pieces_of(600, 4) == {600}
    load = Workload(frozenset({512}), frozenset({256})).with_answers(Answers(1, (30, 300), 96))
    assert load.prompts == {30, 256, 44} and load.answered == (1, 396) and load.prompt_tokens == 256
    more = load.with_answers(Answers(64, (40, 50), 96))
    assert more.prompts == load.prompts | {64, 2560, 3200} and more.answered == (64, 146) and more.prompt_tokens == 3200
