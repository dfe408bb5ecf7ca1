"""All runs under a root: found by their files, with state and newest numbers. Stop and resume.

A folder with run.json or metrics.jsonl is a run's output, who ever started it. Nothing in it is locked or written: a
lock that is only tried would refuse a run that begins at this moment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import Any

from onecard.config import TrainConfig
from onecard.config.document import config_yaml
from onecard.errors import UserError
from onecard.faults import as_user_error
from onecard.files import write_synced
from onecard.studio.curves import Curves
from onecard.studio.jobs import Job, Jobs
from onecard.train.record import FILE, Record, read_record

METRICS, REPORT = "metrics.jsonl", "report.html"
DEEPEST, MOST_FOLDERS = 6, 20_000
NOT_SEARCHED = {"checkpoints", "adapter", "node_modules", "__pycache__"}
SHOWN = ("loss", "supervised_tokens_per_second", "memory_bytes", "epoch", "eval_loss", "learning_rate", "grad_norm")


@dataclass
class RunFolder:
    """The output folder of a run."""

    path: Path
    curves: Curves
    record: Record | None = None
    error: str | None = None  # what is wrong with the record
    stamp: tuple[int, int] | None = None  # of the record's file that was read

    def refresh(self) -> None:
        self.curves.refresh()
        try:
            found = (self.path / FILE).stat()
        except OSError:
            self.record, self.stamp, self.error = None, None, None
            return
        stamp = (found.st_ino, found.st_mtime_ns)
        if stamp != self.stamp:
            self.stamp = stamp
            try:
                self.record, self.error = read_record(self.path), None
            except UserError as error:
                self.record, self.error = None, str(error)

    def state(self, starting: Job | None, stopping: set[tuple[int, float]]) -> str:
        """Return running, stopping, starting, finished, stopped, failed, killed or unknown."""
        record = self.record
        if record is not None and record.is_running:
            return "stopping" if (record.pid, record.process_started) in stopping else "running"
        if starting is not None:
            return "starting"
        if record is None:
            return "finished" if (self.path / REPORT).is_file() else "unknown"
        return "killed" if record.state == "running" else record.state


@dataclass
class Runs:
    """The runs under a root, by their path from it."""

    root: Path
    jobs: Jobs
    found: dict[str, RunFolder] = field(default_factory=dict)
    is_cut: bool = False  # whether some folders were left out, because there are too many
    lock: Any = field(default_factory=RLock)  # the server's threads share the curves

    def refresh(self) -> list[dict[str, Any]]:
        """Search for runs, read what is new, and return a summary of each, the newest first."""
        with self.lock:
            return self.summaries()

    def points(self, names: list[str], most: int, first: int | None, last: int | None) -> dict[str, Any]:
        """Return the curves of some runs. Raises UserError for an unknown one."""
        with self.lock:
            return {name: self.get(name).curves.points(most, first, last) for name in names}

    def summaries(self) -> list[dict[str, Any]]:
        there, self.is_cut = search(self.root)
        self.found = {
            name: self.found.get(name) or RunFolder(path, Curves(path / METRICS)) for name, path in there.items()
        }
        jobs = {job.output: job for job in reversed(self.jobs.refresh()) if job.kind == "train"}
        rows = [self.summary(name, jobs.pop(str(run.path), None)) for name, run in self.found.items()]
        rows += [self.summary_of_job(job) for job in jobs.values()]
        return sorted(rows, key=lambda row: row["began"], reverse=True)

    def summary(self, name: str, job: Job | None) -> dict[str, Any]:
        """Return what the list shows of a run. `job` is the newest that the page has started in its folder."""
        run = self.found[name]
        run.refresh()
        record, last = run.record, run.curves.last
        state = run.state(job if job and job.is_running else None, self.jobs.stopping)
        failed_again = job is not None and record is not None and job.began > record.began and not job.is_running
        message = run.error or (record.message if record and state == "failed" else None)
        return {
            "name": name,
            "state": state,
            "step": int(last.get("step", 0)),
            "num_steps": record.num_steps if record else None,
            "began": record.began if record else modified(run.path / METRICS),
            "version": run.curves.version,
            "last": {key: as_number(last[key]) for key in SHOWN if key in last},
            "planned_bytes": record.planned_bytes if record else None,
            "process_bytes": record.process_bytes if record else None,
            "model": Path(record.config["model"]).name if record else None,
            "model_path": beside(record.folder, record.config["model"]) if record else None,
            "adapter_path": str(run.path / "adapter"),
            "message": message,
            "job": job.name if job else None,
            "failed_again": failed_again,
            "has_report": (run.path / REPORT).is_file(),
            "has_adapter": (run.path / "adapter" / "adapter_config.json").is_file(),
            "can_resume": record is not None and state in ("stopped", "failed", "killed"),
        }

    def summary_of_job(self, job: Job) -> dict[str, Any]:
        """Return the row of a started run that has written nothing yet: it loads, or it has failed."""
        empty = dict.fromkeys(("num_steps", "planned_bytes", "process_bytes", "model", "message"))
        return {
            **empty,
            "name": os.path.relpath(job.output, self.root),
            "state": "starting" if job.is_running else "failed",
            "step": 0,
            "began": job.began,
            "version": 0,
            "last": {},
            "job": job.name,
            "failed_again": False,
            "has_report": False,
            "has_adapter": False,
            "can_resume": False,
        }

    def get(self, name: str) -> RunFolder:
        """Return a run by its name. Only what was found has one, so a name is no way to another folder."""
        if name not in self.found:
            self.refresh()
        if name not in self.found:
            raise UserError("the run must be in the list", name[:200], "reload the page", "run")
        return self.found[name]

    def need_record(self, name: str) -> Record:
        record = self.get(name).record
        if record is None:
            do = "use the command line for a run of an older release"
            raise UserError("the run must have its run.json", "none that can be read", do, name)
        return record

    def stop(self, name: str) -> None:
        """Ask a run's own process to stop: it finishes the step and writes a checkpoint. Raises UserError."""
        run = self.found.get(name)
        if run is not None and run.record is not None and run.record.is_running:
            return self.jobs.stop(run.record.pid, run.record.process_started)
        for job in self.jobs.refresh():  # one that still loads
            if os.path.relpath(job.output, self.root) == name and job.is_running:
                return self.jobs.stop(job.pid, job.process_started)
        raise UserError("only a run that runs can be stopped", "it does not run", "reload the page", name)

    def resume(self, name: str) -> Job:
        """Start `onecard train --resume` with the run's own settings, where it was started.

        Raises:
            UserError: it runs, it has no record, or its folder is not where its settings say.
        """
        run, record = self.get(name), self.need_record(name)
        if record.is_running:
            raise UserError("a run that runs goes on by itself", "it runs", "stop it first", name)
        folder = Path(record.folder)
        if not folder.is_dir() or (folder / record.config["output"]).resolve() != run.path.resolve():
            found = f"its settings say {folder / record.config['output']}"
            raise UserError("the run must be where it was written", found, "move it back", name)
        path = self.write_config(f"resume-{sha256(name.encode()).hexdigest()[:12]}", record.config)
        words = ["train", "--config", str(path), "--resume"]
        if record.num_processes > 1:
            words += ["--num-processes", str(record.num_processes)]
        return self.jobs.start("train", words, folder, run.path)

    def write_config(self, stem: str, fields: dict[str, Any]) -> Path:
        """Write settings as YAML for a job. Raises UserError for a system error."""
        path = self.jobs.folder / f"{stem}.yaml"
        with as_user_error(path, lambda: ("nothing was started", "start it again")):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(path, config_yaml(TrainConfig, fields).encode())
        return path


def search(root: Path) -> tuple[dict[str, Path], bool]:
    """Return the output folders under a root, and whether the search was cut short."""
    found: dict[str, Path] = {}
    top = len(root.parts)
    for count, (folder, below, files) in enumerate(os.walk(root)):
        if count == MOST_FOLDERS:
            return found, True
        path = Path(folder)
        if FILE in files or METRICS in files:
            found[path.relative_to(root).as_posix()] = path
            below.clear()
        elif len(path.parts) - top >= DEEPEST:
            below.clear()
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in NOT_SEARCHED)
    return found, False


def differences(records: dict[str, Record]) -> list[dict[str, Any]]:
    """Return the settings in which runs differ: name, default, and the value of each run."""
    rows = []
    for name, info in TrainConfig.model_fields.items():
        values = {run: record.config.get(name) for run, record in records.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            default = None if info.is_required() else info.get_default(call_default_factory=True)
            rows.append({"name": name, "default": default, "values": values})
    return rows


def beside(folder: str, model: str) -> str:
    """Return a model's path as it was for the run. A hub id, or the name of no folder, stays."""
    path = Path(folder, model)
    return str(path) if path.exists() else model


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def as_number(value: float) -> float | None:
    """Return a number that JSON has; None for NaN and Inf."""
    return value if abs(value) != float("inf") and value == value else None
