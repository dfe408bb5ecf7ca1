"""Exact: what a run ends in does not depend on how the window is split, nor on where it was killed."""

import gc
import json
import os
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from onecard.memory.inputs import PlanInputs
from onecard.memory.strategy import choose_strategy, total_bytes
from onecard.train import checkpoint as state_module
from onecard.train.checkpoint import load_newest, save_state
from onecard.train.loop import frozen_objects
from onecard.train.session import run_training
from tests.conftest import chat_rows, make_checkpoint, write_rows


def quiet():
    return Console(file=open(os.devnull, "w"), width=100)


def fields(checkpoint, chats, output, **more):
    return {
        "model": str(checkpoint),
        "data": str(chats),
        "output": str(output),
        "device": "cpu",
        "compute_dtype": "float32",
        "max_seq_length": 96,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "lora_dropout": 0.1,
        "r": 4,
        "save_steps": 1,
        "save_total_limit": 50,
        "sample_prompts": [],
        **more,
    }


def run(checkpoint, chats, output, resuming=False, **more):
    return run_training(make_config(TrainConfig, fields(checkpoint, chats, output, **more)), resuming, quiet())


def copy_at(finished, output, step):
    """A copy of a finished run as it was when it stopped after `step`."""
    shutil.copytree(finished, output)
    shutil.rmtree(output / "adapter")
    for folder in (output / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    return output


def adapter_bytes(output):
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_learns_and_leaves_everything(checkpoint, chats, tmp_path):
    output = tmp_path / "o"
    result = run(checkpoint, chats, output, num_train_epochs=3, validation_split=0.1, sample_prompts=["how many?"])
    assert result.report.loss_after < result.report.loss_before - 0.5
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, result.report.num_steps + 1))
    assert (output / "metrics.csv").read_text().count("\n") == len(rows) + 1
    for name in ("loss_curve.png", "report.md", "report.html", "adapter/adapter_config.json"):
        assert (output / name).stat().st_size > 0
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), output / "adapter")
    stored = load_file(output / "adapter" / "adapter_model.safetensors")
    loaded = {n.replace(".default", ""): p for n, p in plain.named_parameters() if "lora" in n}
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[n], loaded[n]) for n in stored)


@pytest.mark.parametrize("packing", [True, False])
def test_any_split_of_the_window_is_the_same_update(packing, checkpoint, tmp_path):
    # Documents of one length fill rows alike, so that each split has the same documents in its window.
    text = " fox dog fox dog fox dog fox dog fox dog fox dog fox dog fox"
    data = write_rows(
        tmp_path / "d.jsonl", [{"prompt": f"{i % 10}{text}", "completion": " mug" * (1 + i % 3)} for i in range(16)]
    )
    adapters = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        output = tmp_path / f"{batch}"
        run(
            checkpoint,
            data,
            output,
            packing=packing,
            max_seq_length=40,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            lora_dropout=0.0,
            warmup_ratio=0.0,
            learning_rate=1e-3,
            adam_epsilon=1e-4,
        )
        adapters.append(load_file(output / "adapter" / "adapter_model.safetensors"))
    for other in adapters[1:]:
        for name, tensor in adapters[0].items():
            assert (tensor - other[name]).abs().max() <= 1e-5, name


SAVED = {"modules_to_save": ["embed_tokens", "lm_head"], "compute_dtype": "bfloat16"}
KINDS = ({"gradient_checkpointing": True}, {"use_dora": True}, SAVED)


@pytest.mark.parametrize(
    "more, everywhere",
    [({}, True), *((more, False) for more in KINDS), *(pytest.param(m, True, marks=pytest.mark.slow) for m in KINDS)],
    ids=str,
)
def test_straight_is_stop_and_resume(more, everywhere, checkpoint, chats, tmp_path):
    more = {"num_train_epochs": 2, **more}
    straight = tmp_path / "straight"
    result = run(checkpoint, chats, straight, **more)
    steps = result.report.num_steps
    assert steps > 6
    for k in (1, steps // 2, steps // 2 + 1, steps - 1, steps) if everywhere else (steps // 2,):
        output = copy_at(straight, tmp_path / f"resumed-{k}", k)
        again = run(checkpoint, chats, output, resuming=True, **more)
        assert adapter_bytes(output) == adapter_bytes(straight)
        rows = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert rows == list(range(1, steps + 1)) and len(again.report.metrics) == steps


def test_checkpointing_changes_nothing(checkpoint, chats, tmp_path):
    for name, flag in (("a", False), ("b", True)):
        run(checkpoint, chats, tmp_path / name, gradient_checkpointing=flag, lora_dropout=0.0)
    a, b = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_changed_run_is_not_resumed(checkpoint, chats, tmp_path):
    output = tmp_path / "o"
    run(checkpoint, chats, output, max_steps=2)
    with pytest.raises(UserError, match="learning_rate"):
        run(checkpoint, chats, output, resuming=True, max_steps=2, learning_rate=1e-3)
    other = make_checkpoint(tmp_path / "other", initializer_range=0.3)
    shutil.copy(checkpoint / "config.json", other)  # only the weights differ
    with pytest.raises(UserError, match="base has changed"):
        run(other, chats, output, resuming=True, max_steps=2)
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    run(moved, chats, tmp_path / "p", max_steps=2)
    shutil.copytree(other, moved, dirs_exist_ok=True)
    with pytest.raises(UserError, match="base has changed"):
        run(moved, chats, tmp_path / "p", resuming=True, max_steps=2)
    data = write_rows(tmp_path / "d.jsonl", chat_rows(24))
    run(checkpoint, data, tmp_path / "q", max_steps=2)
    write_rows(data, chat_rows(23))
    with pytest.raises(UserError, match="data has changed"):
        run(checkpoint, data, tmp_path / "q", resuming=True, max_steps=2)
    with pytest.raises(UserError, match="new or empty"):
        run(checkpoint, chats, output, max_steps=2)


def test_not_finite_stops_before_the_update(checkpoint, chats, tmp_path, monkeypatch):
    from onecard.train.loss import packed_loss as whole

    def broken(model, batch, num_tokens):
        return whole(model, batch, num_tokens) * float("nan")

    monkeypatch.setattr("onecard.train.session.choose_loss", lambda *args: (broken, None))
    with pytest.raises(UserError, match="step 1; the update was not made"):
        run(checkpoint, chats, tmp_path / "o", max_steps=2)


LONG = {"num_train_epochs": 2, "lora_dropout": 0.0}


def test_float16_trains(chats, tmp_path):
    """The first loss within a rounding of float16, 2^-11 of a value, of float32's; all within what AdamW, whose update
    keeps little but the gradient's sign, makes of such roundings: a tenth of what was learned."""
    base = make_checkpoint(tmp_path / "base", dtype=torch.float16)  # the same weights in 4 bits for both
    narrow, wide = (
        [row["loss"] for row in run(base, chats, tmp_path / dtype, compute_dtype=dtype, **LONG).report.metrics]
        for dtype in ("float16", "float32")
    )
    assert abs(narrow[0] - wide[0]) <= 2**-11 * wide[0]
    assert max(abs(a - b) for a, b in zip(narrow, wide)) <= 0.1 * (wide[0] - wide[-1])


class Killed(Exception):
    pass


@pytest.mark.parametrize("call", range(12))
def test_a_kill_while_saving_leaves_a_whole_checkpoint(call, tmp_path, monkeypatch):
    def save(step):
        save_state(tmp_path, step, {"a": {"x": torch.full((4,), float(step))}}, {"b": {"step": step}}, 1)

    save(1)
    count = 0

    def counted(real):
        def call_or_die(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call + 1:
                raise Killed
            return real(*args, **kwargs)

        return call_or_die

    for name in ("replace", "fsync"):
        monkeypatch.setattr(state_module.os, name, counted(getattr(os, name)))
    monkeypatch.setattr(state_module.shutil, "rmtree", counted(shutil.rmtree))
    try:
        save(2)
        done = True
    except Killed:
        done = False
    monkeypatch.undo()
    found = load_newest(tmp_path)
    assert found is not None and found.step in ((2,) if done else (1, 2))
    assert found.tensors["a"]["x"][0] == found.step == found.documents["b"]["step"]


def test_a_flipped_bit_is_seen_and_the_older_one_taken(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, step, {"a": {"x": torch.full((4,), float(step))}}, {"b": {}}, 2)
    path = tmp_path / "checkpoint-2" / "a.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    found = load_newest(tmp_path)
    assert found.step == 1 and "a.safetensors" in found.skipped[0]
    (tmp_path / "checkpoint-1" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="whole"):
        load_newest(tmp_path)


def test_broken_newer_checkpoints_do_not_push_out_those_of_a_resumed_run(tmp_path):
    def save(step, keep):
        return save_state(tmp_path, step, {"a": {"x": torch.zeros(4)}}, {"b": {}}, keep)

    for step in (50, 57, 58):
        save(step, 3)
    for step in (57, 58):
        (tmp_path / f"checkpoint-{step}" / "a.safetensors").write_bytes(b"")
    assert load_newest(tmp_path).step == 50
    for step in (55, 60):
        save(step, 1)
        assert load_newest(tmp_path).step == step
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-60"]


def test_the_collector_leaves_the_model_alone_while_it_trains():
    before = gc.get_freeze_count()
    with frozen_objects():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0


def test_a_run_whose_files_do_not_fit_is_told_before_it_loads(checkpoint, chats, tmp_path, monkeypatch):
    full = shutil._ntuple_diskusage(1 << 40, 1 << 40, 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match="fit on the disk"):
        run(checkpoint, chats, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_split_that_a_run_began_with_stays_when_it_is_resumed(checkpoint, chats, tmp_path):
    """Its micro-batches in the same parts, however much memory there is now: the same bytes."""
    output, settings = (
        tmp_path / "o",
        {"per_device_train_batch_size": 4, "max_steps": 4, "gradient_checkpointing": False},
    )
    config = make_config(TrainConfig, fields(checkpoint, chats, output, weights_budget="1GB", **settings))
    inputs = PlanInputs(read_model(inspect_checkpoint(checkpoint)), config, torch.float32)
    least = str(total_bytes(inputs, choose_strategy(inputs, 1)))
    small = {"device_memory": least, "weights_budget": "1GB", "cuda_graphs": False, **settings}
    run(checkpoint, chats, tmp_path / "straight", **small)
    run(checkpoint, chats, output, **small)
    shutil.rmtree(output / "adapter")
    for folder in (output / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > 2:
            shutil.rmtree(folder)
    run(checkpoint, chats, output, resuming=True, **settings)
    progress = json.loads((output / "checkpoints" / "checkpoint-4" / "progress.json").read_text())
    assert progress["max_forward_tokens"] == 96
    assert adapter_bytes(output) == adapter_bytes(tmp_path / "straight")
