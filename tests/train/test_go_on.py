"""Exact: a run that goes on from a trained adapter, and a resumed run with more epochs or steps."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecard.errors import UserError
from tests.conftest import chat_rows, make_checkpoint, write_rows
from tests.train.test_kill import count_lines
from tests.train.test_loop import adapter_bytes, copy_at, run

MORE = {"max_steps": 2, "lora_dropout": 0.0, "validation_split": 0.2}
CONSTANT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}


@pytest.fixture(scope="module")
def trained(checkpoint, chats, tmp_path_factory):
    """A run's output and its loss after."""
    output = tmp_path_factory.mktemp("trained") / "o"
    return output, run(checkpoint, chats, output, **MORE).report.loss_after


def test_a_run_starts_where_the_adapter_ends(trained, checkpoint, chats, tmp_path):
    folder, loss = trained
    more = {**MORE, "adapter": str(folder / "adapter"), "seed": 7, "learning_rate": 1e-12}
    again = run(checkpoint, chats, tmp_path / "o", **{**more, "validation_split": 0.0, "eval_data": str(chats)})
    before, after = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, tmp_path / "o"))
    assert before.keys() == after.keys()  # a whole adapter; two updates of AdamW are at most 2 x 1.0x learning rates
    assert all((before[name] - after[name]).abs().max() <= 3e-12 + 2**-23 * before[name].abs().max() for name in before)
    assert again.report.facts["went on from"] == str(folder / "adapter")
    same = run(checkpoint, chats, tmp_path / "p", **{**MORE, "adapter": str(folder / "adapter")})
    assert same.report.loss_before == loss and same.report.loss_after < loss


@pytest.mark.parametrize(
    "more, said",
    [
        ({"r": 8}, "r is 8, the adapter's is 4"),
        ({"lora_alpha": 4}, "lora_alpha is 4"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"target_modules": ["q_proj"]}, "target_modules is ['q_proj']"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"quant_type": "fp4"}, "quant_type is 'fp4'"),
    ],
)
def test_other_settings_are_refused_by_name_before_the_weights_load(
    more, said, trained, checkpoint, chats, tmp_path, monkeypatch
):
    monkeypatch.setattr("onecard.train.session.load_model", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(UserError) as error:
        run(checkpoint, chats, tmp_path / "o", **{**MORE, "adapter": str(trained[0] / "adapter"), **more})
    assert said in str(error.value)
    assert not (tmp_path / "o").exists()


def test_another_base_is_refused_before_the_weights_load(trained, chats, tmp_path, monkeypatch):
    other = make_checkpoint(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor.flip(0).contiguous() for name, tensor in weights.items()}, other / "model.safetensors")
    monkeypatch.setattr("onecard.train.session.load_model", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(UserError, match="the adapter was trained on"):
        run(other, chats, tmp_path / "o", **MORE, adapter=str(trained[0] / "adapter"))


def test_modules_that_were_trained_in_full_go_on_too(checkpoint, chats, tmp_path):
    more = {**MORE, "modules_to_save": ["lm_head"]}
    first = run(checkpoint, chats, tmp_path / "a", **more)
    second = run(checkpoint, chats, tmp_path / "b", **more, adapter=str(tmp_path / "a" / "adapter"))
    assert second.report.loss_before == first.report.loss_after


def test_a_resumed_run_keeps_its_start(trained, checkpoint, chats, tmp_path):
    more = {**MORE, "max_steps": 3, "adapter": str(trained[0] / "adapter")}
    run(checkpoint, chats, tmp_path / "straight", **more)
    shutil.copytree(tmp_path / "straight", tmp_path / "o")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "o" / "checkpoints" / f"checkpoint-{step}")
    with pytest.raises(UserError, match="adapter it began with"):
        run(checkpoint, chats, tmp_path / "o", resuming=True, **{**more, "adapter": None})
    run(checkpoint, chats, tmp_path / "o", resuming=True, **more)
    assert adapter_bytes(tmp_path / "o") == adapter_bytes(tmp_path / "straight")


def test_more_steps_are_the_longer_run(checkpoint, chats, tmp_path):
    """With a constant rate, the longer run's bytes; fewer steps than are done are refused."""
    run(checkpoint, chats, tmp_path / "straight", max_steps=4, **CONSTANT)
    run(checkpoint, chats, tmp_path / "o", max_steps=2, **CONSTANT)
    run(checkpoint, chats, tmp_path / "o", resuming=True, max_steps=4, **CONSTANT)
    assert adapter_bytes(tmp_path / "o") == adapter_bytes(tmp_path / "straight")
    assert count_lines(tmp_path / "o") == 4
    with pytest.raises(UserError, match="4 updates that are done"):
        run(checkpoint, chats, tmp_path / "o", resuming=True, max_steps=3, **CONSTANT)


def test_more_epochs_after_a_short_last_window(checkpoint, chats, tmp_path):
    """Every micro-batch of the further epochs is read once, in full windows from the next epoch's start on."""
    more = {"gradient_accumulation_steps": 4, "packing": False, **CONSTANT}  # 24 examples: 6 windows
    more |= {"validation_split": 0.08}  # 22 examples: 5 windows and one of 2
    run(checkpoint, chats, tmp_path / "o", num_train_epochs=1, **more)
    result = run(checkpoint, chats, tmp_path / "o", resuming=True, num_train_epochs=2, **more)
    assert [row["step"] for row in result.metrics] == list(range(1, 13))
    progress = json.loads((tmp_path / "o" / "checkpoints" / "checkpoint-12" / "progress.json").read_text())
    assert progress["loader"] == {"epoch": 1, "batch": 22, "row": 0, "before": 0} and progress["num_steps"] == 12
    sizes = [row["epoch"] for row in result.metrics][6:]
    assert sizes == pytest.approx([1.0, *(1 + 4 * i / 22 for i in range(1, 6))])
    assert torch.isfinite(torch.tensor([row["loss"] for row in result.metrics])).all()


def newest(output):
    return max(int(folder.name.split("-")[1]) for folder in (output / "checkpoints").iterdir())


def test_a_streamed_run_goes_on_in_its_buffer(checkpoint, tmp_path):
    """Stopped behind the first buffer, it ends in the bytes of the straight run, which reads each row once a pass."""
    rows = write_rows(tmp_path / "d.jsonl", chat_rows(50))
    more = {"streaming": True, "buffer_size": 20, "max_steps": 9, "packing": False, "gradient_accumulation_steps": 6}
    result = run(checkpoint, rows, tmp_path / "straight", **more)
    assert result.report.data["examples"] == 50 and result.report.data["buffers read"] == 3
    for step in (4, 8):
        output = copy_at(tmp_path / "straight", tmp_path / f"o{step}", step)
        run(checkpoint, rows, output, resuming=True, **more)
        assert adapter_bytes(output) == adapter_bytes(tmp_path / "straight")
    good = rows.read_bytes()
    lines = good.splitlines(keepends=True)
    rows.write_bytes(b"".join([*lines[:30], b"x" + lines[30][1:], *lines[31:]]))  # of the same size
    more |= {"save_steps": 9}
    with pytest.raises(UserError, match=r"d\.jsonl:31"):
        run(checkpoint, rows, tmp_path / "broken", **more)
    assert newest(tmp_path / "broken") == 3, "the updates before the bad row are kept"
    rows.write_bytes(good)
    run(checkpoint, rows, tmp_path / "broken", resuming=True, **more)
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "straight")
    write_rows(rows, chat_rows(49))
    with pytest.raises(UserError, match="the data has changed"):
        run(checkpoint, rows, copy_at(tmp_path / "straight", tmp_path / "o", 3), resuming=True, **more)
