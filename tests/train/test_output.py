"""Behaviour: what a user's folders, disks and settings do to a run. Exact: how much of the data an epoch is."""

import datetime
import errno
import json
import shlex

import pytest

from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from onecard.hf.load import load_tokenizer
from onecard.train import checkpoint as state_module
from onecard.train import prepare, session
from onecard.train.output import lock_output
from onecard.train.report import fence
from tests.conftest import chat_rows, make_checkpoint, make_tokenizer, write_rows
from tests.train.test_loop import run


def refused(checkpoint, data, output, **more):
    with pytest.raises(UserError) as error:
        run(checkpoint, data, output, **{"max_steps": 1, **more})
    return error.value


def test_an_output_that_is_no_folder(checkpoint, chats, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "folder that can be written" in refused(checkpoint, chats, output).must
    assert (tmp_path / "file").read_text() == "mine"


def test_two_runs_cannot_write_to_one_folder(checkpoint, chats, tmp_path):
    with lock_output(tmp_path, False):
        for resuming in (False, True):
            with pytest.raises(UserError, match="one run at a time"), lock_output(tmp_path, resuming):
                pass
    with lock_output(tmp_path, False):  # left, it is free again
        pass


def test_a_full_disk_is_told_and_leaves_what_was_saved(checkpoint, chats, tmp_path, monkeypatch):
    whole = state_module.save_file

    def full(tensors, path):
        if "checkpoint-2" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, path)

    monkeypatch.setattr(state_module, "save_file", full)
    error = refused(checkpoint, chats, tmp_path / "o", max_steps=3)
    assert "No space left" in error.found and "--resume" in error.do
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "o" / "checkpoints").iterdir()] == ["checkpoint-1"]
    run(checkpoint, chats, tmp_path / "o", resuming=True, max_steps=3)


def test_what_is_wrong_is_told_before_the_weights_load(checkpoint, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "load_model", None)  # a call would be a TypeError
    monkeypatch.setattr("onecard.train.metrics.MODULES", {"trackio": "no_such_module"})
    assert refused(checkpoint, chats, tmp_path / "a", loggers=["trackio"]).where == "loggers"
    small = make_checkpoint(tmp_path / "vocabulary", vocab_size=128)
    assert "in the vocabulary" in refused(small, chats, tmp_path / "b").found
    short = make_checkpoint(tmp_path / "short", max_position_embeddings=16)
    assert "16 positions" in refused(short, chats, tmp_path / "c").found


def test_modules_to_save_must_exist(checkpoint, chats, tmp_path):
    assert 'none is called "nothing"' in refused(checkpoint, chats, tmp_path / "o", modules_to_save=["nothing"]).found
    assert "is in 4 bits" in refused(checkpoint, chats, tmp_path / "q", modules_to_save=["mlp"]).found
    run(checkpoint, chats, tmp_path / "p", modules_to_save=["lm_head"], max_steps=1)


def test_an_epoch_is_the_data_once(checkpoint, chats, tmp_path):
    for epochs, accumulation in ((1, 100), (2, 5), (1.5, 4)):
        result = run(
            checkpoint, chats, tmp_path / f"{epochs}-{accumulation}", num_train_epochs=epochs, packing=False,
            gradient_accumulation_steps=accumulation, save_steps=1000,
        )  # fmt: skip
        rows, an_epoch = result.report.metrics, result.report.data["supervised tokens"]
        seen = sum(row["num_supervised_tokens"] for row in rows)
        assert (seen == epochs * an_epoch) if epochs != 1.5 else (an_epoch < seen < 2 * an_epoch)


def test_moved_files_resume_and_a_changed_config_does_not(checkpoint, chats, tmp_path, monkeypatch):
    base = make_checkpoint(tmp_path / "base")
    run(base, chats, tmp_path / "o", max_steps=2)
    base.rename(tmp_path / "moved")
    moved = write_rows(tmp_path / "moved.jsonl", chat_rows(24))
    run(tmp_path / "moved", moved, tmp_path / "o", resuming=True, max_steps=2)
    path = tmp_path / "moved" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.01}))
    monkeypatch.setattr(session, "load_model", None)
    with pytest.raises(UserError, match="model config has changed"):
        run(tmp_path / "moved", moved, tmp_path / "o", resuming=True, max_steps=2)


def test_a_template_with_todays_date_resumes_tomorrow(chats, tmp_path, monkeypatch):
    base = make_checkpoint(tmp_path / "base")
    dated = "{{ strftime_now('%d %b %Y') }}" + load_tokenizer(str(base)).chat_template
    make_tokenizer(dated).save_pretrained(base)
    run(base, chats, tmp_path / "o", max_steps=2)

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    monkeypatch.setattr(prepare.datetime, "date", Tomorrow)
    run(base, chats, tmp_path / "o", resuming=True, max_steps=2)
    prepared = prepare.prepare(make_config(TrainConfig, {"model": str(base), "data": str(chats), "output": "-"}))
    assert "01 Jan 2099" in prepared.tokenizer.decode(prepared.training.examples[0].input_ids)


def test_samples_ask_as_training_does(checkpoint, tmp_path):
    rows = [{"prompt": f"Q{i}: " + "the lazy dog " * (100 if i == 0 else 1), "completion": "fox"} for i in range(6)]
    data = write_rows(tmp_path / "it's data.jsonl", rows)
    result = run(checkpoint, data, tmp_path / "o", sample_prompts=None, max_steps=1)
    prompts = [prompt for prompt, _, _ in result.report.samples]
    assert prompts == [row["prompt"] for row in rows[1:4]]  # the first is longer than max_seq_length
    generate, _, evaluate = map(shlex.split, result.report.next_commands)
    assert generate[-2] == "--prompt" and evaluate[-1] == str(data)  # asked as the adapter was trained


def test_a_fence_is_longer_than_what_it_holds():
    assert fence("a ```` b").startswith("`````\n") and fence("x" * 1_000_000).startswith("```\n")
