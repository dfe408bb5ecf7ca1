"""Merge and export from the page: the commands of the command line as jobs, and how far they are."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from onecard.config import ExportConfig, make_config
from onecard.errors import UserError
from onecard.studio.jobs import Job
from onecard.studio.prepare import command_of

MERGE_FIELDS = ("model", "adapter", "output", "base", "verify", "requantize")


def words_of(fields: dict[str, Any]) -> list[str]:
    """Return the words of `onecard merge` or `onecard export`. `format` is merge or one of `onecard export`.

    Raises:
        UserError: a wrong setting; an output that exists; merge without an adapter.
    """
    fields = {name: value for name, value in fields.items() if value not in (None, "", [])}
    if fields.get("format") == "merge":
        del fields["format"]
        for name in ("model", "adapter", "output"):
            if name not in fields:
                raise UserError(f"{name} must be given", "nothing", "choose one", name)
        unknown = next((name for name in fields if name not in MERGE_FIELDS), None)
        if unknown:
            raise UserError("a merge has these settings: " + ", ".join(MERGE_FIELDS), unknown, "leave it out", unknown)
        kind = "merge"
    else:
        make_config(ExportConfig, fields, "page")
        kind = "export"
    output = Path(str(fields["output"]))
    if output.exists():
        raise UserError("the output must be new", "it exists", "choose another name", str(output))
    words = command_of(fields)
    assert words is not None, "these settings are texts, numbers and lists of texts"
    return [kind, *words[1:]]


def progress(job: Job) -> dict[str, Any]:
    """Return what the page shows of a merge or an export: its state, and the bytes that are written so far.

    A finished one has its output: it is renamed to its place when it is complete.
    """
    output = Path(job.output)
    state = "running" if job.is_running else "finished" if output.exists() else "failed"
    done = size_of(output) if state == "finished" else sum(map(size_of, output.parent.glob(f".{output.name}.*")))
    return {
        "name": job.name,
        "kind": job.kind,
        "state": state,
        "output": job.output,
        "began": job.began,
        "line": job.line,
        "written_bytes": done,
    }


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of a folder's files. A file that vanishes meanwhile has none."""
    total = 0
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        with suppress(OSError):
            total += each.stat().st_size if each.is_file() else 0
    return total
