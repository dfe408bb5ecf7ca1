"""Behaviour: --validate makes the checks of a run and leaves nothing; `onecard config` prints what reads back equal."""

import os

import pytest
from rich.console import Console

from onecard.config import TrainConfig, make_config
from onecard.config.document import config_yaml
from onecard.documents import parse_yaml
from onecard.errors import UserError
from onecard.export.calibrated.base import check_base_of_run
from onecard.train.session import run_training, validate_training
from tests.conftest import make_checkpoint, write_rows
from tests.forks import onecard


def settings(checkpoint, chats, output, **more):
    return {"model": str(checkpoint), "data": str(chats), "output": str(output), "device": "cpu", **more}


def validate(fields, resuming=False):
    with open(os.devnull, "w") as nowhere:
        config = make_config(TrainConfig, fields)
        validate_training(config, resuming, Console(file=nowhere), check_base_of_run)


def test_it_shows_all_and_writes_nothing(checkpoint, chats, tmp_path):
    code, out, err = onecard(
        "train", "--model", checkpoint, "--data", chats, "--output", tmp_path / "a" / "b", "--validate"
    )
    assert code == 0 and not err, err
    for said in ("examples", "[[0 blue mugs", "memory plan", "on disk: adapter", "learning rate", "valid"):
        assert said in out, said
    assert not list(tmp_path.iterdir())


def test_the_first_of_several_processes_validates_for_all(checkpoint, chats, tmp_path):
    """All of them have one output folder, which one locks. The plan has what they receive from each other."""
    fields = ("--model", checkpoint, "--data", chats, "--output", tmp_path / "o", "--parallel", "fsdp")
    said = []
    for number in "01":
        where = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2"}
        code, out, err = onecard("train", *fields, "--gradient-accumulation-steps", "2", "--validate", **where)
        assert code == 0, err
        said.append(out)
    assert "valid: nothing was trained" in said[0] and "received an update: layers" in said[0]
    assert not said[1]


def test_what_a_run_refuses_before_the_weights_load_is_refused(checkpoint, chats, tmp_path, monkeypatch):
    full, bad = tmp_path / "full", write_rows(tmp_path / "bad.jsonl", [{"messages": 1}])
    full.mkdir()
    (full / "file").write_text("x")
    broken = make_checkpoint(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    new = tmp_path / "o"
    wrong = [
        settings(checkpoint, bad, new),
        settings(broken, chats, new),
        settings(checkpoint, chats, full),
        settings(checkpoint, chats, new, target_modules=["no_proj"]),
        settings(checkpoint, chats, new, device_memory="1MiB"),
        settings(checkpoint, chats, new, eval_data=str(tmp_path / "none.jsonl")),
    ]
    monkeypatch.setattr("onecard.train.session.load_model", lambda *_: pytest.fail("the weights were loaded"))
    for fields in wrong:
        with pytest.raises(UserError) as found:
            validate(fields)
        with pytest.raises(UserError) as expected:
            run_training(make_config(TrainConfig, fields), False, Console(quiet=True))
        assert str(found.value) == str(expected.value)
    assert not new.exists()


def test_a_config_reads_back_equal(tmp_path):
    fields = {
        "model": "m: x # y", "data": "é.jsonl", "output": "o", "target_modules": ["q_proj", "v_proj"],
        "learning_rate": 3e-5, "adam_epsilon": 1e-8, "sample_prompts": ["a\nb", "null", "1"], "use_dora": True,
    }  # fmt: skip
    config = make_config(TrainConfig, fields)
    text = config_yaml(TrainConfig, config.model_dump(mode="json"))
    again = parse_yaml(text.encode())
    assert set(again) == set(TrainConfig.model_fields)
    assert make_config(TrainConfig, again) == config
    for info in TrainConfig.model_fields.values():
        assert (info.description or "")[:40] in text.replace("\n# ", " ")


def test_the_command_fills_in_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nr: 8\n")
    code, out, err = onecard("config", "--dump", path, "--seed", 7)
    assert code == 0 and not err, err
    found = parse_yaml(out.encode())
    assert (found["model"], found["r"], found["seed"], found["lora_alpha"]) == ("m", 8, 7, 32)
    assert "# data: (required)" in out and "data" not in found
    path.write_text("rr: 8\n")
    assert onecard("config", "--dump", path).code == 2
