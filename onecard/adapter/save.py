"""Save a trained adapter's folder: write it completely, then replace an older one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from onecard.adapter.origin import Origin, write_origin
from onecard.files import sync, sync_folder


def save_adapter(model: Any, folder: Path, origin: Origin, tokenizer: Any = None) -> None:
    """Write peft's adapter folder under a temporary name, sync it, then replace an older folder by renaming.

    Args:
        tokenizer: saved with the adapter, if it is not the checkpoint's.

    The older folder is removed after the new one has its name: at each moment the disk holds a complete one.
    """
    temporary, older = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    write_origin(temporary, origin)
    for path in temporary.iterdir():
        sync(path)
    sync_folder(temporary)
    if folder.exists():
        shutil.rmtree(older, ignore_errors=True)
        os.rename(folder, older)
    try:
        os.rename(temporary, folder)
    except OSError:
        if older.exists():
            os.rename(older, folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(older, ignore_errors=True)
