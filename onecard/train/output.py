"""A run's output folder. One run at a time writes to it. An error that ends a run early says what is kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from onecard.errors import Stopped, UserError
from onecard.faults import as_user_error
from onecard.files import locked
from onecard.train import signals
from onecard.train.checkpoint import numbered

CONTINUE = "run the same command with --resume to continue from there"


@contextmanager
def lock_output(output: Path, resuming: bool, is_first: bool = True) -> Iterator[None]:
    """Create the folder and lock it against other runs. New folders that stay empty are removed at the end.

    Args:
        is_first: of several processes of a run, the first one locks the folder for all.

    Raises:
        UserError: it is not a folder, is not writable, another run uses it, or it has entries without `resuming`; a
            system fault.
        Stopped: Ctrl-C, SIGTERM or SIGHUP.
    """
    with as_user_error(output, lambda: what_is_kept(output)), signals.raised(), ExitStack() as stack:
        if not is_first:
            try:
                yield
            except signals.Signalled as error:
                raise Stopped(error.number, *what_is_kept(output), str(output)) from None
            return
        new = [folder for folder in (output, *output.parents) if not folder.exists()]
        try:
            output.mkdir(parents=True, exist_ok=True)
            entries = len(list(output.iterdir()))
            if not os.access(output, os.W_OK):
                raise PermissionError(errno.EACCES, "not writable")
            held = stack.enter_context(locked(output))
        except OSError as error:
            do = "choose another --output"
            raise UserError("the output must be a folder that can be written", str(error), do, str(output)) from None
        if held is False:
            must, found = "one run at a time may write to an output folder", "another process writes to it"
            raise UserError(must, found, "wait for it, or choose another --output", str(output))
        try:
            if entries and not resuming:
                do = "pass --resume to continue that run, or choose another --output"
                raise UserError("the output folder must be new or empty", f"{entries} entries", do, str(output))
            yield
        except signals.Signalled as error:
            raise Stopped(error.number, *what_is_kept(output), str(output)) from None
        finally:
            with suppress(OSError):  # not empty
                for folder in new:
                    folder.rmdir()


def what_is_kept(output: Path) -> tuple[str, str]:
    """Return what is kept of a run that ended early, and what the user can do."""
    try:
        there = numbered(output / "checkpoints")
        begun = output.is_dir() and any(output.iterdir())
    except OSError:
        return "the checkpoints that were written before are kept", CONTINUE
    if there:
        return f"{there[0].name} is kept", CONTINUE
    if begun:
        return "no checkpoint is there yet", "the same command with --resume begins again"
    return "nothing is kept", "start again"
