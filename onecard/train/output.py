"""A run's output folder: one run at a time writes to it; a disk that is full or read-only is told with a remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from onecard.errors import UserError
from onecard.train.state import locked

OF_THE_FOLDER = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENAMETOOLONG)


@contextmanager
def claimed(output: Path, resuming: bool) -> Iterator[None]:
    """Inside, the folder exists and no other run may claim it; a new one that stays empty goes again.

    Raises:
        UserError: it is no folder, cannot be written, is another run's, holds entries without `resuming`, or the disk
            is full.
    """
    new = not output.exists()
    with ExitStack() as stack:
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
                do = "pass --resume to go on with that run, or choose another --output"
                raise UserError("the output folder must be new or empty", f"{entries} entries", do, str(output))
            yield
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) not in OF_THE_FOLDER and "No space left" not in str(error):
                raise
            do = "make room or choose a writable folder, then --resume"
            raise UserError("the run must be able to write its files", str(error), do, str(output)) from None
        finally:
            if new:
                with suppress(OSError):  # not empty
                    output.rmdir()
