"""Bound: several processes make the updates of one, to rounding; exact: stopped or killed, they go on bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from onecard.memory.plan import plan
from onecard.train.prepare import check_shardable
from onecard.train.ranks import Ranks, join
from onecard.train.session import check_ranks, run_training
from tests.conftest import chat_rows, make_checkpoint, write_rows
from tests.train.test_loop import adapter_bytes, fields, quiet

ROOT = Path(__file__).parents[2]
SHARDED = {"parallel": "fsdp"}
STACKS = ["gate_up_proj", "down_proj"]
PAIRS = [
    {"prompt": f"how many {i}?", "chosen": f" {i} mugs", "rejected": " the dog" + " lazy" * (i % 3)} for i in range(21)
]


@pytest.fixture
def settings(checkpoint, tmp_path):
    """Five windows of four micro-batches and one of a single one, which leaves a process without any."""
    rows, held = write_rows(tmp_path / "d.jsonl", chat_rows(21)), write_rows(tmp_path / "e.jsonl", chat_rows(5))
    more = {"eval_data": str(held), "eval_steps": 2, "packing": False, "gradient_accumulation_steps": 4}
    more |= {"lora_dropout": 0.0, "metric": ["exact_match"], "metric_max_new_tokens": 2}
    return fields(checkpoint, rows, tmp_path / "o", **more)


def started(settings, output, count, *flags):
    """`onecard train` in `count` processes of one thread each."""
    path = Path(output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**settings, "output": str(output)}))
    command = [sys.executable, "-m", "onecard", "train", "--config", str(path), "--num-processes", str(count), *flags]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def alone(settings, output):
    """The same run by one process, this one."""
    return run_training(make_config(TrainConfig, {**settings, "output": str(output)}), False, quiet())


def finished(process):
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    return said


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def check_equal(several, one_process):
    """Losses, evaluations and adapter; AdamW divides small gradients by their size, which raises a rounding's share."""
    for one, other in zip(metrics(several), metrics(one_process), strict=True):
        for name in ("loss", "grad_norm", "num_supervised_tokens", *(key for key in one if key.startswith("eval_"))):
            assert one[name] == pytest.approx(other[name], rel=2e-5), name
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (several, one_process))
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= 1e-4 * other[name].norm(), name


@pytest.mark.parametrize("more, how", [({}, "data parallel"), (SHARDED, "data parallel, the base sharded")])
def test_two_processes_make_the_updates_of_one(more, how, settings, tmp_path):
    settings |= more
    if more == SHARDED:  # linears and experts
        settings |= {"model": str(make_checkpoint(tmp_path / "m", "mixtral")), "target_parameters": STACKS}
    assert alone(settings, tmp_path / "alone").report.num_steps == 6
    said = finished(started(settings, tmp_path / "o", 2))
    assert said.count("6 updates of 4 x 1 rows") == 1, "one process speaks"
    check_equal(tmp_path / "o", tmp_path / "alone")
    assert f"| processes | 2, {how} |" in (tmp_path / "o" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, more",
    [
        (4, {}),
        (2, {"loss": "dpo"}),
        (2, {"optim": "paged_adamw_8bit", "packing": True}),
        (3, SHARDED | {"gradient_checkpointing": True, "add_tokens": ["mugs"]}),
        (2, SHARDED | {"loss": "dpo"}),
        (2, SHARDED | {"loss": "dpo", "precompute_reference": False, "use_dora": True}),
        (2, SHARDED | {"loss": "kto", "precompute_reference": False}),
        (2, SHARDED | {"optim": "paged_adamw_8bit", "packing": True, "init_lora_weights": "pissa"}),
    ],
)
def test_more_processes_and_other_losses(count, more, settings, tmp_path):
    if "loss" in more:
        settings = {**settings, "metric": [], "eval_data": None, "data": str(write_rows(tmp_path / "p.jsonl", PAIRS))}
    settings |= more
    alone(settings, tmp_path / "alone")
    finished(started(settings, tmp_path / "o", count))
    check_equal(tmp_path / "o", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("victim, parallel", [(0, "ddp"), (1, "ddp"), (0, "fsdp"), (1, "fsdp")])
def test_killed_and_stopped_they_go_on_in_the_same_bits(victim, parallel, settings, tmp_path):
    settings |= {"lora_dropout": 0.1, "num_train_epochs": 4, "parallel": parallel}
    finished(started(settings, tmp_path / "straight", 2))
    process = started(settings, tmp_path / "o", 2)
    until(tmp_path / "o" / "checkpoints" / "checkpoint-4")
    workers = sorted(int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split())
    os.kill(workers[victim], signal.SIGKILL)
    begin, said = time.monotonic(), process.communicate(timeout=60)[0]
    assert process.returncode > 0 and time.monotonic() - begin < 30
    assert "another one has ended" in said
    process = started(settings, tmp_path / "o", 2, "--resume")
    until(tmp_path / "o" / "checkpoints" / "checkpoint-10")
    process.send_signal(signal.SIGTERM)
    assert "is saved" in process.communicate(timeout=60)[0] and process.returncode == 128 + signal.SIGTERM
    finished(started(settings, tmp_path / "o", 2, "--resume"))
    assert adapter_bytes(tmp_path / "o") == adapter_bytes(tmp_path / "straight")


def until(path):
    begin = time.monotonic()
    while not path.is_dir():
        assert time.monotonic() - begin < 120
        time.sleep(0.05)


def test_one_process_needs_no_others():
    ranks = Ranks()
    x = torch.ones(3)
    assert ranks.sum(x) is x and ranks.share([1, 2]) == [1, 2] and ranks.gather({"a": 1}) == [{"a": 1}]
    assert join("cuda:7") == ranks, "without torchrun, nothing is connected"
    with ranks.first_alone():
        ranks.wait()


def test_shares_are_a_partition():
    for count in (1, 2, 3, 5):
        shares = [Ranks(number, count).share(list(range(7))) for number in range(count)]
        assert sorted(item for share in shares for item in share) == list(range(7))


def test_the_plan_of_a_process(checkpoint):
    one, two, three = (
        {term.name: term.num_bytes for term in plan(str(checkpoint), num_processes=n, parallel="fsdp").terms}
        for n in (1, 2, 3)
    )
    base = one["base, 4-bit codes"] + one["base, scales"]
    assert two["base, own shard"] == pytest.approx(base / 2, rel=0.02), "less the scales of scales, and alignment"
    assert three["base, own shard"] == pytest.approx(base / 3, rel=0.02)
    assert two["gathered layers"] == three["gathered layers"] == pytest.approx(3 * base / 2, rel=0.02)
    with pytest.raises(UserError, match="a run must have a process"):
        plan(str(checkpoint), num_processes=0)


REFUSED = {"weights_budget": "1GiB", "modules_to_save": ["lm_head"], "task": "reward", "calibrate": True}


@pytest.mark.parametrize("name, value", REFUSED.items())
def test_what_a_sharded_base_does_not_take(name, value, settings):
    settings |= {name: value, "metric": [], "sample_prompts": None}
    make_config(TrainConfig, settings)
    with pytest.raises(UserError, match=rf"{name}.* parallel fsdp|parallel fsdp does not take {name}"):
        make_config(TrainConfig, settings | SHARDED)


def test_models_that_cannot_be_sharded(checkpoint):
    model = read_model(inspect_checkpoint(checkpoint))
    check_shardable(model)
    model.modules.model.projection = torch.nn.Linear(64, 64, device="meta")
    with pytest.raises(UserError, match=r"model\.projection is in 4 bits outside"):
        check_shardable(replace(model))


def test_what_several_processes_cannot_do(settings, monkeypatch):
    with pytest.raises(UserError, match="a micro-batch of the window"):
        check_ranks(make_config(TrainConfig, settings), Ranks(0, 5))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="a device of its own"):
        join("cuda:0")
