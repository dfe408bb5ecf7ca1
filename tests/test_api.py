"""Behaviour: the calls for a whole job from Python do what the commands do, and print nothing."""

import inspect
import io
import logging
import warnings
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

import onecard
from onecard import api, cli
from onecard.demo.run import SETTINGS

MODEL = SETTINGS["model"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Settings of a short run, with some of the demo's rows."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("data", 40), ("eval_data", 4)):
        lines = Path(SETTINGS[name]).read_text(encoding="utf-8").splitlines()[:count]
        (folder / name).with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = {name: str(folder / f"{name}.jsonl") for name in ("data", "eval_data")}
    return {**files, "model": MODEL, "device": "cpu", "max_seq_length": 256, "max_steps": 3}


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """A run, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        out, err = io.StringIO(), io.StringIO()
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        output = str(tmp_path_factory.mktemp("api") / "run")
        result = onecard.train(onecard.TrainConfig(output=output, **small))
    return result, out.getvalue() + err.getvalue()


def test_a_run_gives_its_adapter_metrics_and_report(run):
    result, printed = run
    assert printed == ""
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert [row["step"] for row in result.metrics] == [1, 2, 3]
    assert result.metrics[0]["loss"] > 1 and result.loss_before != result.loss_after
    assert "loss after" in result.report_path.read_text(encoding="utf-8")
    assert not result.model.training


def test_it_is_the_command_s_run(run, small, tmp_path, monkeypatch, capsys):
    fields = {"output": tmp_path / "o", **small}
    words = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr("sys.argv", ["onecard", "train", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "memory plan" in capsys.readouterr().out
    folders = (run[0].adapter, tmp_path / "o" / "adapter")
    ours, command = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert ours.keys() == command.keys() and all(ours[name].equal(command[name]) for name in ours)


def test_what_was_set_before_is_set_after(small, tmp_path):
    before = transformers.utils.logging.get_verbosity(), logging.getLogger("torch").level, warnings.filters[:]
    shown = transformers.utils.logging.is_progress_bar_enabled()
    with pytest.raises(onecard.UserError, match=r"no\.jsonl"):
        onecard.train(onecard.TrainConfig(**{**small, "data": str(tmp_path / "no.jsonl")}, output=str(tmp_path / "o")))
    after = transformers.utils.logging.get_verbosity(), logging.getLogger("torch").level, warnings.filters[:]
    assert after == before and transformers.utils.logging.is_progress_bar_enabled() == shown


def test_it_prints_and_resumes_when_asked(run, small, capsys):
    config = onecard.TrainConfig(output=str(run[0].adapter.parent), **small)
    with pytest.raises(onecard.UserError, match="must be new or empty"):
        onecard.train(config)
    assert capsys.readouterr().out == ""
    onecard.train(config, resume=True, quiet=False)
    assert "resumed at step 3 of 3" in capsys.readouterr().out


def test_a_wrong_setting_is_a_user_error():
    with pytest.raises(onecard.UserError, match="learning_rate"):
        onecard.TrainConfig(model="m", data="d", output="o", leraning_rate=1e-4)
    with pytest.raises(onecard.UserError, match="Field required"):
        onecard.ExportConfig(format="gguf", model="m")
    with pytest.raises(onecard.UserError, match="self"):
        onecard.TrainConfig(**{"self": 1})


def test_merge_and_export(run, small, tmp_path, capfd):
    adapter, model = str(run[0].adapter), MODEL
    folder = onecard.merge(model, adapter, str(tmp_path / "merged"))
    assert (folder / "model.safetensors").is_file()
    settings = onecard.ExportConfig(format="gguf", model=model, adapter=adapter, output=str(tmp_path / "m.gguf"))
    found = onecard.export(settings)
    assert found.path.read_bytes()[:4] == b"GGUF" and str(found.path) in found.lines[0]
    settings = onecard.ExportConfig(
        format="gptq", model=model, adapter=adapter, output=str(tmp_path / "g"), data=small["data"], num_rows=2,
        max_seq_length=64, device="cpu",
    )  # fmt: skip
    assert (onecard.export(settings).path / "quantize_config.json").is_file()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["train", "export"])
def test_a_package_that_is_called_stays_a_package(name):
    package = getattr(onecard, name)
    assert inspect.ismodule(package) and callable(package)
    assert inspect.signature(package) == inspect.signature(getattr(api, name))
    assert inspect.getdoc(getattr(api, name)).count("Raises:") == 1
