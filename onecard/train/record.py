"""run.json in a run's output folder: which process runs it, how it was started, its settings, its plan, how it ended.

`onecard studio`, `runs` and `report` read it. It is written when the training begins, so that a run which fails before
leaves no file. A killed process leaves the state "running". Its number and its start time together tell whether it
still runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from pydantic import Field, field_validator

from onecard.documents import Own, hold, read_object
from onecard.errors import Stopped, UserError, first_line
from onecard.faults import about
from onecard.train.metrics import replace_text
from onecard.train.signals import Signalled

if TYPE_CHECKING:  # they import torch, which the list of runs does without
    from onecard.train.prepare import Prepared
    from onecard.train.ranks import Ranks
    from onecard.train.run import Run

FILE, STORED = "run.json", "report.json"


class Record(Own):
    """What a run says of itself.

    Attributes:
        pid, process_started: of the first process, and when the system started it, in seconds since 1970.
        command: its words, as in sys.argv; folder: where it was given.
        began: when the training began or went on, in seconds since 1970.
        num_processes: those of torchrun; 1 without it.
        plan: name, bytes and formula of each term; planned_bytes: their sum as it is measured.
        process_bytes: memory of the process itself, which a plan does not count.
        message: of the error that ended the run.
    """

    state: Literal["running", "finished", "stopped", "failed"]
    pid: int = Field(gt=0, lt=1 << 31)
    process_started: float
    command: list[str]
    folder: str
    began: float
    num_processes: int
    num_steps: int
    first_step: int
    config: dict[str, Any]
    plan: list[tuple[str, int, str]]
    planned_bytes: int
    process_bytes: int
    choice: str
    message: str | None = None

    @field_validator("config")
    @classmethod
    def _check_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        for name in ("model", "output"):
            if not isinstance(config.get(name), str):
                raise ValueError(f"{name} must be a text")
        return config

    @property
    def is_running(self) -> bool:
        """Whether the process of the run is alive, and not another one that has its number now."""
        return self.state == "running" and process_of(self.pid, self.process_started) is not None


def process_of(pid: int, process_started: float) -> psutil.Process | None:
    """Return the process with this number, if it is the one that started then and has not ended."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - process_started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return process if same else None
    except psutil.Error:
        return None


def write_record(prepared: Prepared, run: Run) -> None:
    """Write the record of a run that begins its training. The content of an earlier end's report goes."""
    output = Path(prepared.config.output)
    plan = prepared.plan
    record = Record(
        state="running",
        pid=os.getpid(),
        process_started=psutil.Process().create_time(),
        command=sys.argv,
        folder=os.getcwd(),
        began=time.time(),
        num_processes=run.ranks.count,
        num_steps=run.num_steps,
        first_step=run.step,
        config=prepared.config.model_dump(mode="json"),
        plan=[(term.name, term.num_bytes, term.formula) for term in plan.terms],
        planned_bytes=plan.measured_bytes,
        process_bytes=prepared.process_bytes,
        choice=plan.choice or "",
    )
    with about(output / STORED):
        (output / STORED).unlink(missing_ok=True)
    replace_text(output / FILE, record.model_dump_json(indent=1))


def read_record(output: Path) -> Record | None:
    """Read the record of a run; None if there is none. Raises UserError if it is damaged."""
    path = output / FILE
    if not path.is_file():
        return None
    content = read_object(path, "leave this folder out, or remove the file")
    if isinstance(plan := content.get("plan"), list):
        content["plan"] = [tuple(term) if isinstance(term, list) else term for term in plan]
    return hold(Record, content, str(path), "leave this folder out, or remove the file")


@contextmanager
def end_of_record(output: Path, ranks: Ranks) -> Iterator[None]:
    """Write into the record how the block ended, if this process has written one."""
    state, message = "finished", None
    try:
        yield
    except (Stopped, Signalled, KeyboardInterrupt):
        state = "stopped"
        raise
    except BaseException as error:
        state, message = "failed", str(error) if isinstance(error, UserError) else first_line(error)
        raise
    finally:
        if ranks.is_first:
            with suppress(OSError, UserError), about(output / FILE):
                record = read_record(output)
                if record is not None and record.pid == os.getpid() and record.state == "running":
                    ended = record.model_copy(update={"state": state, "message": message})
                    replace_text(output / FILE, ended.model_dump_json(indent=1))
