"""All runs under a root as the page shows them, beside its jobs. Stop and resume."""

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
from onecard.studio.jobs import Job, Jobs
from onecard.train.folders import ADAPTER, REPORT, RunFolder, search
from onecard.train.record import Record

SHOWN = ("loss", "supervised_tokens_per_second", "memory_bytes", "epoch", "eval_loss", "learning_rate", "grad_norm")


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
        self.found = {name: self.found.get(name) or RunFolder.of(path) for name, path in there.items()}
        jobs = {job.output: job for job in reversed(self.jobs.refresh()) if job.kind == "train"}
        rows = [self.summary(name, jobs.pop(str(run.path), None)) for name, run in self.found.items()]
        rows += [self.summary_of_job(job) for job in jobs.values()]
        return sorted(rows, key=lambda row: row["began"], reverse=True)

    def state(self, run: RunFolder, is_starting: bool) -> str:
        """Return the run's state, or what the page has asked for: starting, stopping."""
        record, state = run.record, run.state
        if state == "running":
            assert record is not None, "only a record says so"
            return "stopping" if (record.pid, record.process_started) in self.jobs.stopping else "running"
        return "starting" if is_starting else state

    def summary(self, name: str, job: Job | None) -> dict[str, Any]:
        """Return what the list shows of a run. `job` is the newest that the page has started in its folder."""
        run = self.found[name]
        run.refresh()
        record = run.record
        state = self.state(run, job is not None and job.is_running)
        failed_again = job is not None and record is not None and job.began > record.began and not job.is_running
        return {
            "name": name,
            "state": state,
            "step": run.step,
            "num_steps": record.num_steps if record else None,
            "began": run.began,
            "version": run.curves.version,
            "last": run.numbers(SHOWN),
            "planned_bytes": record.planned_bytes if record else None,
            "process_bytes": record.process_bytes if record else None,
            "model": Path(record.config["model"]).name if record else None,
            "model_path": beside(record.folder, record.config["model"]) if record else None,
            "adapter_path": as_text(run.path / ADAPTER),
            "message": run.message if state in ("failed", "unknown") else None,
            "job": job.name if job else None,
            "failed_again": failed_again,
            "has_report": (run.path / REPORT).is_file(),
            "has_adapter": run.has_adapter,
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
        if not os.path.isdir(folder) or (folder / record.config["output"]).resolve() != run.path.resolve():
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
    path = os.path.join(folder, model)
    return path if os.path.exists(path) else model


def as_text(path: Path) -> str:
    """Return a path that JSON can have, also if a name on it is no UTF-8."""
    return str(path).encode(errors="backslashreplace").decode()
