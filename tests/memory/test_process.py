"""Exact: what a CPU process is planned to grow by beside its tensors, counted by hand."""

import pytest
import torch

from onecard.config import TrainConfig, make_config
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from onecard.kernels.cpu import native
from onecard.memory import process
from onecard.memory.inputs import PlanInputs
from onecard.memory.workload import PROBE, PROBE_HEADS, Workload
from onecard.nn.experts import filled_rows, num_filled_rows
from tests.conftest import make_checkpoint

ROWS = frozenset({512})


@pytest.fixture
def on_onednn(monkeypatch):
    monkeypatch.setattr(process, "goes_to_onednn", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(native, "has_tiles", lambda: False)


def case_of(folder, dtype=torch.bfloat16, **fields):
    settings = {"model": "-", "data": "-", "output": "-", "device": "cpu", "r": 2, **fields}
    load = Workload(ROWS, ROWS, prompts=frozenset({30}))
    return PlanInputs(read_model(inspect_checkpoint(folder)), make_config(TrainConfig, settings), dtype, load)


def test_the_terms_of_a_dense_model(tmp_path, on_onednn):
    inputs = case_of(make_checkpoint(tmp_path))  # 64 hidden, 96 between, keys of 32
    forward = 4 + 2 + 3  # (64, 64), (64, 32), (64, 96), (96, 64); inputs of 64 and 96; outputs of 64, 32 and 96
    backward = 4 + 2 * 2 + 2 * 3
    heads = 2 * len({64, 512} | PROBE_HEADS)
    assert {7, 23, 24, 48} == PROBE and {23, 24} == PROBE_HEADS
    number = len(PROBE | {512, 30, 9, 6}) * forward + backward + heads
    found = {term.name: term.num_bytes for term in process.process_terms(inputs, True)}
    adapted = 2 * 7
    assert found == {
        "prepared products": number * (650 << 10),
        "Python's objects": (4 << 20) + adapted * (40 << 10),
        "libraries' code": 19 << 20,
    }
    answers = process.process_terms(inputs, False)
    assert answers[0].num_bytes == 3 * forward * (650 << 10)  # 30 tokens, and 9 and 6 of the cache's probe


def test_float32_prepares_nothing_and_tiles_the_adapter_on_few_rows(tmp_path, on_onednn, monkeypatch):
    folder = make_checkpoint(tmp_path)
    assert process.num_products(case_of(folder, torch.float32), True) == 0
    monkeypatch.setattr(native, "has_tiles", lambda: True)
    few = len({9, 6, 2, 1})  # of the cache's probe; the prompt of 30 tokens goes on tiles
    assert process.num_products(case_of(folder), True) == few * 2 == process.num_products(case_of(folder), False)
    assert process.num_products(case_of(folder, target_modules=["q_proj"]), True) == few


@pytest.mark.parametrize("adapted", [False, True])
def test_an_expert_may_get_any_number_of_rows(adapted, tmp_path, on_onednn):
    folder = make_checkpoint(tmp_path, "qwen3_moe")  # (64, 2 x 32) and (32, 64)
    names = {"target_parameters": ["gate_up_proj", "down_proj"]} if adapted else {}
    sizes = {filled_rows(M) for M in range(1, 513)}
    assert sizes == {*range(1, 9), *range(16, 129, 16), *range(192, 513, 64)}
    for least, most in ((1, 0), (1, 7), (1, 8), (5, 128), (17, 129), (1, 512), (17, 2000)):
        assert num_filled_rows(least, most) == len({filled_rows(M) for M in range(least, most + 1)}), (least, most)
    few = {size for size in sizes if size <= native.LARGEST_M[torch.bfloat16]}
    forward, backward = (2 + 2 + 1, 2 + 2 * 2 + 2 * 1) if adapted else (2, 2)
    expected = len(sizes - few) * forward + len(sizes) * backward
    assert process.expert_products(case_of(folder, **names), ROWS, ROWS) == expected
