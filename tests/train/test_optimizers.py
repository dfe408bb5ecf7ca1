"""Exact: a run with each optimizer learns, and ends in the same bits after a stop."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onecard.config import TrainConfig, make_config
from onecard.train.prepare import prepare
from tests.train.test_loop import adapter_bytes, copy_at, fields, run

SCHEDULE_FREE = {
    "optim": "schedule_free_adamw",
    "lr_scheduler_type": "constant",
    "validation_split": 0.2,
    "eval_steps": 1,
}
KINDS = [
    SCHEDULE_FREE,
    {"optim": "muon", "use_dora": True},
    pytest.param({"optim": "lion", "learning_rate": 1e-3, "loraplus_lr_ratio": 4.0}, marks=pytest.mark.slow),
    pytest.param({"optim": "adafactor"}, marks=pytest.mark.slow),
    pytest.param({"optim": "sgd", "learning_rate": 1.0}, marks=pytest.mark.slow),
    pytest.param({"optim": "adamw_torch_fused"}, marks=pytest.mark.slow),
    pytest.param({"optim": "muon", "modules_to_save": ["lm_head"]}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("more", KINDS, ids=lambda more: more["optim"])
def test_straight_is_stop_and_resume(more, checkpoint, chats, tmp_path):
    more = {"num_train_epochs": 2, "lora_dropout": 0.0, **more}
    straight = tmp_path / "straight"
    result = run(checkpoint, chats, straight, **more)
    losses = [row["loss"] for row in result.report.metrics]
    assert losses[-1] < losses[0] - 0.1
    check_plan_of_disk(make_config(TrainConfig, fields(checkpoint, chats, straight, **more)))
    middle = result.report.num_steps // 2
    output = copy_at(straight, tmp_path / "resumed", middle)
    again = run(checkpoint, chats, output, resuming=True, **more)
    assert adapter_bytes(output) == adapter_bytes(straight)
    assert [row.get("eval_loss") for row in again.report.metrics] == [r.get("eval_loss") for r in result.report.metrics]


def check_plan_of_disk(config):
    """The plan's checkpoints have the bytes of the tensors that were written."""
    planned = next(term for term in prepare(config).plan.disk if term.name == "checkpoints")
    folder = max(Path(config.output, "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    tensors = [
        tensor for name in ("adapter", "optimizer") for tensor in load_file(folder / f"{name}.safetensors").values()
    ]
    written = sum(tensor.nbytes for tensor in tensors if tensor.dim())
    assert planned.num_bytes / (1 + config.save_total_limit) == pytest.approx(written, rel=0.03), planned


def test_checkpoints_and_adapters_of_schedule_free_are_the_average(checkpoint, chats, tmp_path):
    """The last checkpoint's adapter is the saved one; what trains on is another point, among its states."""
    output = tmp_path / "o"
    run(checkpoint, chats, output, max_steps=4, lora_dropout=0.0, **SCHEDULE_FREE)
    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    last = output / "checkpoints" / "checkpoint-4"
    adapter, states = load_file(last / "adapter.safetensors"), load_file(last / "optimizer.safetensors")
    for name, tensor in adapter.items():
        assert torch.equal(tensor, saved[name.replace(".default", "")]), name
    assert any(not torch.equal(states[f"{name}.trained"], tensor) for name, tensor in adapter.items())
