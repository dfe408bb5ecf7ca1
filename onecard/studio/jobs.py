"""Processes that the page starts: the commands of the command line, detached from the server and from its terminal.

A job is a file of the folder .onecard-studio under the root, so that a server that starts again knows it. Its output
goes to a log there. A process is known by its number and its start time together, so that no other process is stopped.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import psutil

import onecard
from onecard.documents import Own, hold, read_object
from onecard.errors import UserError
from onecard.faults import as_user_error
from onecard.files import write_synced
from onecard.train.record import process_of

FOLDER = ".onecard-studio"
LOG_BYTES = 64 << 10  # of a log's end that is shown
AGAIN = "remove the file"


class Job(Own):
    """A started command.

    Attributes:
        name: of its files.
        command: the words after `onecard`; folder: where it runs; output: the folder or file that it writes.
    """

    name: str
    kind: Literal["train", "merge", "export"]
    pid: int
    process_started: float
    command: list[str]
    folder: str
    output: str
    began: float

    @property
    def line(self) -> str:
        return shlex.join(["onecard", *self.command])

    @property
    def is_running(self) -> bool:
        return process_of(self.pid, self.process_started) is not None


class Jobs:
    """The jobs under a root."""

    def __init__(self, root: Path):
        self.folder = root / FOLDER
        self.children: list[subprocess.Popen[bytes]] = []  # polled, so that ended ones leave the system's table
        self.stopping: set[tuple[int, float]] = set()
        self.known: dict[str, Job] = {}

    def start(self, kind: Any, command: list[str], folder: Path, output: Path) -> Job:
        """Start `onecard COMMAND` in a session of its own, and record it. Raises UserError for a system error."""
        with as_user_error(self.folder, lambda: ("nothing was started", "start it again")):
            self.folder.mkdir(parents=True, exist_ok=True)
            name = self.free_name(f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}")
            with (self.folder / f"{name}.log").open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-P", "-m", "onecard", *command],
                    cwd=folder,
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.children.append(child)
            job = Job(
                name=name,
                kind=kind,
                pid=child.pid,
                process_started=psutil.Process(child.pid).create_time(),
                command=command,
                folder=str(folder),
                output=str(output),
                began=time.time(),
            )
            write_synced(self.folder / f"{name}.json", job.model_dump_json(indent=1).encode())
        self.known[name] = job
        return job

    def free_name(self, stem: str) -> str:
        """Return a name without files, and take it."""
        for number in range(1000):
            name = f"{stem}-{number}" if number else stem
            try:
                (self.folder / f"{name}.log").touch(exist_ok=False)
                return name
            except FileExistsError:
                continue
        raise UserError("a second has a thousand jobs at most", "more", "wait a second", str(self.folder))

    def refresh(self) -> list[Job]:
        """Return all jobs, the newest first. A damaged file is left out."""
        self.children = [child for child in self.children if child.poll() is None]
        for path in self.folder.glob("*.json"):
            if path.stem not in self.known:
                try:
                    self.known[path.stem] = hold(Job, read_object(path, AGAIN), str(path), AGAIN)
                except UserError:
                    continue
        return sorted(self.known.values(), key=lambda job: job.began, reverse=True)

    def log(self, name: str) -> str:
        """Return the end of a job's log. Raises UserError if there is no such job."""
        if name not in self.known:
            raise UserError("the job must be one of the page's", name[:80], "reload the page", "job")
        path = self.folder / f"{name}.log"
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - LOG_BYTES))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def stop(self, pid: int, process_started: float) -> None:
        """Send SIGTERM to a process, once: a second signal would end a run without a checkpoint.

        Raises:
            UserError: the process is not the same one any more, or was asked already.
        """
        process = process_of(pid, process_started)
        if process is None:
            raise UserError("only a process that runs can be stopped", f"{pid} has ended", "reload the page", "run")
        if (pid, process_started) in self.stopping:
            must, do = "a run is asked to stop once", "wait: it finishes its step and writes a checkpoint"
            raise UserError(must, "it was asked before", do, "run")
        try:
            process.send_signal(signal.SIGTERM)  # psutil compares the start time once more
        except psutil.Error as error:
            raise UserError("the process must be yours", str(error), "stop it where it was started", "run") from None
        self.stopping.add((pid, process_started))


def environment() -> dict[str, str]:
    """Return a job's environment: this one, without the page's key, and with onecard importable from any folder."""
    kept = {name: value for name, value in os.environ.items() if name != "ONECARD_API_KEY"}
    home = str(Path(onecard.__file__).resolve().parents[1])
    paths = [home, *(str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1"}
