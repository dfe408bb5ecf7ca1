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


SLOW_RUNS = [pytest.param(name, marks=pytest.mark.slow) for name in ("demo", "135m-loftq", "135m-pissa")]


@pytest.mark.parametrize("name", ["demo-train", *SLOW_RUNS])
def test_the_demo_takes_what_its_plan_says(name, tmp_path):
    if not resets_its_peak():
        pytest.skip("this system does not reset a process's peak")
    command = [sys.executable, "-m", "benchmarks.plan", "--child", name, "--folder", str(tmp_path)]
    settings = {"OMP_NUM_THREADS": "2", "ONEDNN_VERBOSE": "2"}  # which tells each product that oneDNN prepares
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["plan"] - found["measured"]) <= max(ALLOWED * found["measured"], ALLOWED_BYTES), found
    if name.startswith("135m"):
        return
    planned = found["terms"].get("prepared products", 0) // PRODUCT_BYTES
    prepared = len(re.findall("create:cache_miss,cpu,matmul,.*bf16", done.stdout))
    assert 0.8 * planned <= prepared <= planned, (planned, prepared)


LAPACK_BYTES = 12 << 20  # its code, and what it packs for its products


SLOW_STARTS = [pytest.param(start, marks=pytest.mark.slow) for start in ("pissa", "pissa_niter_4", "olora")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """One layer, with linears of 4096 x 1024."""
    from torch import bfloat16

    from tests.conftest import make_checkpoint

    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 1, "dtype": bfloat16}
    return make_checkpoint(tmp_path_factory.mktemp("wide") / "m", "llama", **shape)


@pytest.mark.parametrize("start", ["loftq", *SLOW_STARTS])
def test_computing_a_start_takes_what_its_plan_says(start, wide):
    """A run whose steps take less is planned with it."""
    if not resets_its_peak():
        pytest.skip("this system does not reset a process's peak")
    import torch
    from peft import get_peft_model

    import onecard
    from onecard.adapter.layers import lora_config
    from onecard.adapter.start import set_loftq
    from onecard.config import TrainConfig, make_config
    from onecard.hf.checkpoint import inspect_checkpoint
    from onecard.hf.skeleton import read_model
    from onecard.memory.inputs import PlanInputs
    from onecard.memory.measure import return_free_memory, return_large_blocks
    from onecard.memory.terms import computing_terms, plan_terms

    fields = {
        "r": 4,
        "target_modules": ["gate_proj"],
        "max_seq_length": 64,
        "device": "cpu",
        "data": "-",
        "output": "-",
    }
    config = make_config(TrainConfig, {"model": str(wide), **fields, "init_lora_weights": start})
    return_large_blocks()
    model = onecard.load_model(str(wide), compute_dtype=torch.bfloat16, device="cpu")
    return_free_memory()
    before = begin_peak(torch.device("cpu"))
    tuned = get_peft_model(model, lora_config(config, model))
    if start == "loftq":
        set_loftq(tuned, wide)
    measured = peak_memory_bytes(torch.device("cpu")) - before
    inputs = PlanInputs(read_model(inspect_checkpoint(wide)), config, torch.bfloat16)
    (planned,) = computing_terms(inputs)
    assert planned.num_bytes * 0.92 <= measured <= planned.num_bytes * 1.08 + LAPACK_BYTES, (planned, measured)
    names = [term.name for term in plan_terms(inputs)]
    assert planned.name in names and "AdamW states" not in names and "activations" not in names


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
