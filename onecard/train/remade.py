"""A run's report again, from the files of its folder.

A run that ended has report.json: all that the report shows but the metrics, which are in metrics.jsonl. A run that was
stopped, killed, or still runs has its settings and its plan in run.json. Its report has these, the curve, and the last
evaluation. It says that the run has no end, and shows no answers and no counts of the data.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from onecard.config import TrainConfig, make_config
from onecard.data.sources import name_of
from onecard.documents import first_mistake, read_object
from onecard.errors import UserError
from onecard.faults import as_user_error
from onecard.train.folders import METRICS, REPORT, RunFolder
from onecard.train.metrics import read_rows
from onecard.train.record import FILE, STORED, Record, read_record
from onecard.train.report import Report, points_of, write_report

DO = "give the output folder of a run"
LEFT = "what was there before is kept"


def remake_report(output: str) -> tuple[Path, str]:
    """Write loss_curve.png, report.md and report.html again.

    Returns:
        the path of report.html, and a line about what the report is made of.

    Raises:
        UserError: the folder has no run, or one without a logged loss; a file is damaged; a system fault.
    """
    folder = Path(output)
    if not os.path.isdir(folder):
        raise UserError("the run must have a folder", "no such folder", DO, output)
    run = RunFolder.of(folder)
    run.refresh()
    with as_user_error(folder, lambda: (LEFT, "make the report again")):
        if not (folder / FILE).is_file() and not (folder / METRICS).is_file():
            raise UserError(f"a run's folder must have {FILE} and {METRICS}", "neither", DO, output)
        if run.error:
            read_record(folder)  # raises it
        metrics = read_rows(folder / METRICS) if (folder / METRICS).is_file() else []
        if not points_of(metrics, "loss")[0]:
            do = "wait for the first logged step of a run"
            raise UserError(f"{METRICS} must have a row with a loss", "none", do, str(folder / METRICS))
        if (folder / STORED).is_file():
            report, source = stored_report(folder / STORED, metrics), f"{STORED} and {METRICS}"
        else:
            report, source = unfinished_report(run, metrics), f"{FILE} and {METRICS}: the run has no end"
        write_report(folder, report)
    return folder / REPORT, source


def stored_report(path: Path, metrics: list[dict[str, Any]]) -> Report:
    """Read the report of a run that ended. Raises UserError if it is damaged."""
    do = f"restore the file; without it, the report is made of {FILE} and {METRICS}"
    content = read_object(path, do, infinities=True)
    try:
        report = TypeAdapter(Report).validate_json(json.dumps({**content, "metrics": metrics}), strict=True)
        if not isinstance(report.config.get("loss"), str):
            raise UserError("config must have the run's loss", "no text", do, str(path))
        return report
    except ValidationError as error:
        raise UserError(*first_mistake(error), do, str(path)) from None


def unfinished_report(run: RunFolder, metrics: list[dict[str, Any]]) -> Report:
    """Return what is known of a run that did not reach its end. Raises UserError if it has no record."""
    record = run.record
    if record is None:
        do = "a run of an older release has its report from its own end only"
        raise UserError(f"the run must have {STORED} or {FILE}", "neither", do, str(run.path))
    config = make_config(TrainConfig, record.config, str(run.path / FILE))
    step = metrics[-1]["step"]
    facts = {"the run": f"{run.state}, at step {step:,} of {record.num_steps:,}; this report has no end of a run"}
    if run.message:
        facts["it failed"] = run.message
    names = dict.fromkeys(name for row in metrics for name in row if name.startswith("eval_"))
    for name in names:
        steps, values = points_of(metrics, name)
        if steps and "/" not in name:
            facts[f"{name.removeprefix('eval_').replace('_', ' ')} at step {steps[-1]:,}"] = f"{values[-1]:.4f}"
    return Report(
        title=f"{Path(config.model).name} tuned on {name_of(config.data)}",
        command=shlex.join(record.command),
        config=record.config,
        data={},
        memory=memory_of(record, metrics),
        metrics=metrics,
        num_steps=step,
        seconds=None,
        facts=facts,
        versions={},
    )


def memory_of(record: Record, metrics: list[dict[str, Any]]) -> list[tuple[str, int]]:
    peaks = points_of(metrics, "memory_bytes")[1]
    return [
        *((f"plan: {name}", num_bytes) for name, num_bytes, _ in record.plan),
        *([("measured: most at a logged step", int(max(peaks)))] if peaks else []),
        ("the process itself", record.process_bytes),
    ]
