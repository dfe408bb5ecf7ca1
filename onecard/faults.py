"""Convert system errors on file access to a UserError that names the file and what is left.

All code that writes files does so inside `as_user_error`. So a full disk, a lost mount or too many open files never
cause a traceback. An error of a write or a sync does not name its file; `about` adds the name.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from onecard.errors import UserError

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a folder that can be written"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "close other files, or raise the limit of `ulimit -n`"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR), "choose a path in a folder that is there"),
    errno.ENOMEM: "free some memory",
    errno.ENAMETOOLONG: "choose a shorter name",
}
CHECK = "check the disk or the mount"
OTHER_KINDS = (SafetensorError, RuntimeError)  # they may contain a system error; torch raises the second in safetensors
OTHER_WORDS = (
    re.compile(r"(?:I/?o ?error: |serializing: )?([^:]*) \(os error (\d+)\)", re.IGNORECASE),
    re.compile(r"unable to .*file <.*>.*: ([^:]*) \((\d+)\)"),
)


@contextmanager
def as_user_error(target: Path, kept: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Convert a system error inside the block to a UserError.

    Args:
        target: the file or folder that is written. Its temporary files have names .NAME.* in the same folder.
        kept: returns what is left of it after the error, and what to do with that.
    """
    try:
        yield
    except (OSError, *OTHER_KINDS) as error:
        if as_fault(error) is None:
            raise
        raise user_error(error, target, *kept()) from error


def user_error(error: Exception, target: Path, left: str, then: str) -> UserError:
    """Make the UserError for a system error."""
    fault = as_fault(error)
    assert fault is not None
    path, must = target, "files must be written and read"
    if fault.filename is not None:
        path = Path(os.fsdecode(fault.filename))
        must = (
            "the result's files must be written and read"
            if is_of(path, target)
            else "a file that is needed must be read"
        )
    do = f"{REMEDIES.get(fault.errno or 0, CHECK)}; {then}"
    return UserError(must, f"{fault.strerror or error}; {left}", do, str(path))


def as_fault(error: Exception) -> OSError | None:
    """Return the system error in an error; None for a connection error or for other libraries' own exceptions."""
    if isinstance(error, OTHER_KINDS):
        found = next((found for words in OTHER_WORDS if (found := words.search(str(error)))), None)
        return OSError(int(found[2]), found[1]) if found else None
    own = isinstance(error, shutil.Error) or type(error).__module__ == "builtins"
    return error if own and isinstance(error, OSError) and not isinstance(error, ConnectionError) else None


def is_of(path: Path, target: Path) -> bool:
    """Whether a path is the target, inside it, a temporary file of it, or its parent folder."""
    path, target = (Path(os.path.abspath(each)) for each in (path, target))
    if not path.is_relative_to(target.parent):
        return False
    first = path.relative_to(target.parent).parts[:1]
    return not first or first[0] == target.name or first[0].startswith(f".{target.name}.")


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Add this file's name to a system error inside the block that names no file."""
    try:
        yield
    except OSError as error:
        if as_fault(error) is not None and error.filename is None:
            error.filename = str(path)
        raise
    except OTHER_KINDS as error:
        if as_fault(error) is None:
            raise
        raise of_file(error, path) from error


def of_file(error: Exception, path: Path) -> OSError:
    """Convert another kind of error to the system error in it, with the file's name."""
    fault = as_fault(error)
    assert fault is not None
    fault.filename = str(path)
    return fault
