"""Behaviour: `onecard runs` and `onecard report`, also on damaged folders and on those of other tools."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from onecard.cli import app as cli
from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from onecard.train.folders import age, list_runs, run_lines
from onecard.train.record import FILE, Record
from onecard.train.remade import remake_report
from onecard.train.report import Report, store_report, write_report
from tests.conftest import write_rows

DEMO = Path(__file__).parents[2] / "onecard" / "demo"
BASE, DATA = str(DEMO / "base"), str(DEMO / "data" / "heldout.jsonl")
WRITTEN = ("loss_curve.png", "report.md", "report.html")


def record_of(output, pid=None, **fields):
    """Write a run's record, of a process that runs or of none."""
    output.mkdir(parents=True, exist_ok=True)
    config = make_config(TrainConfig, {"model": BASE, "data": DATA, "output": str(output), **fields.pop("config", {})})
    started = psutil.Process(pid).create_time() if pid else 1.0
    found = Record(
        **{
            "state": "running", "pid": pid or 1, "process_started": started, "command": ["onecard", "train"],
            "folder": os.getcwd(), "began": 100.0, "num_processes": 1, "num_steps": 50, "first_step": 0,
            "config": config.model_dump(mode="json"), "plan": [("base", 7, "P")], "planned_bytes": 7,
            "process_bytes": 3, "choice": "none of 4 layers recomputed", **fields,
        }
    )  # fmt: skip
    (output / FILE).write_text(found.model_dump_json())
    return found


def rows_until(last, **more):
    return [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-4, "seconds": 1.0, **more}
            for step in range(1, last + 1)]  # fmt: skip


def changed(record, **fields):
    return json.dumps({**json.loads(record.model_dump_json()), **fields})


DAMAGED = {
    "cut": lambda r: r.model_dump_json()[:-20],
    "of another tool": lambda r: '{"name": "run", "id": 7}',
    "a list": lambda r: "[]",
    "not UTF-8": lambda r: b"\xff\xfe",
    "settings without a model": lambda r: changed(r, config={"output": "o"}),
    "a model that is no text": lambda r: changed(r, config={"model": 5, "output": "o"}),
    "a plan that is no list": lambda r: changed(r, plan=7),
    "a process below 0": lambda r: changed(r, pid=-1),
    "a process of 100 bits": lambda r: changed(r, pid=1 << 100),
    "infinite start": lambda r: r.model_dump_json().replace('"began":100.0', '"began":Infinity'),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_record_is_told_and_stops_nothing(tmp_path, kind):
    record = record_of(tmp_path / "good", state="finished")
    bad = tmp_path / "bad"
    bad.mkdir()
    content = DAMAGED[kind](record)
    (bad / FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_rows(bad / "metrics.jsonl", rows_until(3))
    rows = {row["name"]: row for row in list_runs(str(tmp_path))[0]}
    assert rows["good"]["state"] == "finished" and rows["good"]["message"] is None
    assert rows["bad"]["state"] == "unknown" and rows["bad"]["step"] == 3 and "run.json" in rows["bad"]["message"]
    with pytest.raises(UserError, match=r"run\.json"):
        remake_report(str(bad))


def test_hostile_files_are_read_as_far_as_they_are_metrics(tmp_path):
    lines = ['{"step": 1, "loss": 2.5}', '{"step": 2, "loss": NaN}', '{"step": 1' + "0" * 400 + ', "loss": 1}', "[[[",
             '{"step": -5, "loss": 1.0}', '{"step": true, "loss": 1.0}', '{"step": 9, "loss": "1"}',
             '{"step": 7, "eval_loss": 2.0}', '{"step": 8, "loss": 0.']  # fmt: skip
    for name in ("torn", "a\x1b[31mred", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "a\x1b[31mred" / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    (tmp_path / os.fsdecode(b"\xff\xfe") / "metrics.jsonl").write_text("")
    (tmp_path / "folders" / FILE).mkdir(parents=True)
    (tmp_path / "folders" / "metrics.jsonl").mkdir()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "metrics.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "metrics.jsonl").symlink_to(tmp_path / "nowhere")
    rows, is_cut = list_runs(str(tmp_path))
    found = {row["name"]: row for row in rows}
    assert set(found) == {"torn", "a\x1b[31mred", "empty", "\\udcff\\udcfe", "pipe", "gone"} and not is_cut
    assert found["torn"]["step"] == 7 and found["torn"]["loss"] is None and found["torn"]["eval_loss"] == 2.0
    assert {row["state"] for row in rows} == {"unknown"}
    json.dumps(rows, allow_nan=False, ensure_ascii=False).encode()
    assert "\x1b" not in "\n".join(run_lines(rows))


def test_runs_lists_states_steps_and_losses(tmp_path, capsys):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        record_of(tmp_path / "deep" / "live", child.pid)
        record_of(tmp_path / "killed", child.pid, process_started=1.0)
        record_of(tmp_path / "failed", state="failed", message="no memory\nat all")
        record_of(tmp_path / "stopped", state="stopped", num_steps=1200)
        write_rows(tmp_path / "stopped" / "metrics.jsonl", rows_until(1100))
        (tmp_path / "old" / "adapter").mkdir(parents=True)  # of a release without records
        (tmp_path / "old" / "adapter" / "adapter_config.json").write_text("{}")
        write_rows(tmp_path / "old" / "metrics.jsonl", rows_until(2))
        now = time.time()
        for path in (tmp_path / "old" / "metrics.jsonl", tmp_path / "stopped" / FILE):
            os.utime(path, (now - 7300, now - 7300))
        cli(["runs", str(tmp_path), "--json"], result_action="return_value")
        rows = json.loads(capsys.readouterr().out)
        states = {row["name"]: row["state"] for row in rows}
        assert states == {"deep/live": "running", "killed": "killed", "failed": "failed", "stopped": "stopped",
                          "old": "finished"}  # fmt: skip
        assert rows[-1]["name"] == "old" and abs(rows[-1]["changed"] - now + 7300) < 1, "the newest change is first"
        stopped = next(row for row in rows if row["name"] == "stopped")
        assert (stopped["step"], stopped["num_steps"], stopped["loss"]) == (1100, 1200, 3.0 / 1100)
        assert stopped["changed"] > now - 100, "of metrics or record, the later one" and stopped["model"] == BASE
        cli(["runs", str(tmp_path)], result_action="return_value")
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["state", "step", "loss", "eval", "loss", "changed", "run"]
        line = next(each for each in lines if each.endswith("  stopped"))
        assert line.split()[:3] == ["stopped", "1,100/1,200", "0.002727"]
        assert next(each for each in lines if each.endswith("  old")).split()[3:6] == ["2", "h", "ago"]
        assert lines[-1] == "note: failed: no memory; at all" and max(map(len, lines)) <= 80
        cli(["runs", str(tmp_path / "old" / "adapter")], result_action="return_value")
        assert capsys.readouterr().out.startswith("no run under")
    finally:
        child.kill()
        child.wait()
    with pytest.raises(UserError, match="must be a folder"):
        list_runs(str(tmp_path / "nowhere"))
    assert [age(x) for x in (-3, 0, 59, 60, 7200, 90_000)] == [
        "0 s ago", "0 s ago", "59 s ago", "1 min ago", "2 h ago", "1 d ago"
    ]  # fmt: skip


def made_report(output, **fields):
    """The report of a run that ended, and its files."""
    record = record_of(output, state="finished", num_steps=40)
    rows = [*rows_until(40), {"step": 40, "eval_loss": 0.5}]
    write_rows(output / "metrics.jsonl", rows)
    report = Report(**{
        "title": "a tuned on b", "command": "onecard train", "config": {**record.config, "stop": ("a",)},
        "data": {"rows": 5}, "memory": [("base", 7)], "metrics": rows, "num_steps": 40, "seconds": 12.3,
        "before": {"eval_loss": 3.0}, "after": {"eval_loss": math.inf, "eval_rouge": 0.5},
        "samples": [("a|b", "`c`", "\u00e9")], "facts": {"processes": "2"}, "next_commands": ["onecard chat"],
        "sources": [{"data": "a"}], "versions": {"torch": "0.1"}, **fields,
    })  # fmt: skip
    store_report(output, report)
    write_report(output, report)
    return report


def test_report_makes_the_same_files_again(tmp_path, capsys):
    made_report(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in WRITTEN}
    for name in WRITTEN:
        (tmp_path / name).unlink()
    cli(["report", str(tmp_path)], result_action="return_value")
    assert "report.json and metrics.jsonl" in capsys.readouterr().out
    assert {name: (tmp_path / name).read_bytes() for name in WRITTEN} == before
    assert "| torch | 0.1 |" in (tmp_path / "report.md").read_text(), "the versions of the run, not of today"


def test_the_report_of_a_run_without_an_end_says_so(tmp_path):
    record_of(tmp_path, state="stopped", message=None)
    rows = [*rows_until(20, memory_bytes=5 << 20), {"step": 20, "eval_loss": 0.25, "eval_x/loss": 1.0}]
    write_rows(tmp_path / "metrics.jsonl", rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": NaN, "learning_rate": 1e-4}\n{"step": 22, "loss": 1e300}\n{"step": 23, "lo')
    path, source = remake_report(str(tmp_path))
    text = path.with_name("report.md").read_text()
    assert "no end" in source and "| the run | stopped, at step 22 of 50;" in text
    assert "| loss at step 20 | 0.2500 |" in text and "| measured: most at a logged step | 5.0 MiB |" in text
    assert "before" not in text and "## Data" not in text and "## Versions" not in text and "| time |" not in text
    assert not (tmp_path / "report.json").exists() and path.stat().st_size > 10_000, "with the curve"


def with_files(**files):
    def make(folder):
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)

    return make


def with_report(change):
    def make(folder):
        made_report(folder)
        path = folder / "report.json"
        path.write_text(change(path.read_text()))

    return make


ONE = '{"step": 1, "loss": 2.0}\n'
WRONG = {  # a folder, and what must hold
    "no folder": (lambda folder: folder.rmdir(), "must have a folder"),
    "a folder without a run": (lambda folder: None, "run's folder must have"),
    "no logged loss": (with_files(metrics_jsonl=ONE[:-5]), "must have a row with a loss"),
    "no record and no report": (with_files(metrics_jsonl=ONE), "must have report.json or run.json"),
    "a damaged record": (with_files(metrics_jsonl=ONE, run_json='{"state": '), r"run\.json: the file must be JSON"),
    "a cut report": (with_report(lambda text: text[:-9]), "file must be JSON"),
    "a number that is a text": (with_report(lambda text: text.replace(": 40,", ': "40",')), "num_steps"),
    "a field less": (with_report(lambda text: text.replace('"command":', '"order":')), "command: Field required"),
    "settings without a loss": (with_report(lambda text: text.replace('"loss": ', '"lost": ')), "the run's loss"),
}  # fmt: skip


def use_wrong(folder, kind):
    """Make a report in a wrong folder."""
    wrong = folder / f"wrong {list(WRONG).index(kind)}"
    wrong.mkdir()
    WRONG[kind][0](wrong)
    remake_report(str(wrong))


@pytest.mark.parametrize("kind", WRONG)
def test_what_makes_no_report_is_told_and_nothing_changes(tmp_path, kind):
    folder = tmp_path / f"wrong {list(WRONG).index(kind)}"
    with pytest.raises(UserError, match=WRONG[kind][1]):
        use_wrong(tmp_path, kind)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
    with pytest.raises(UserError):
        remake_report(str(folder))
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert len(before) == len(list(folder.iterdir())) if folder.exists() else not before
