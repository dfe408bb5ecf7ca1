"""Parts that all exports share: a folder that is complete or absent, disk space, and the files next to the weights."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onecard.adapter.origin import Form, form_beside
from onecard.documents import read_object
from onecard.errors import UserError
from onecard.faults import as_user_error
from onecard.files import locked, sync, sync_folder
from onecard.hf.checkpoint import INDEX, Checkpoint
from onecard.hf.load import tokenizer_folder

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # by tensor: dtype in safetensors' spelling, shape
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates",
    "*.jinja", "*.model", "*.tiktoken", "vocab*", "merges.txt",
)  # fmt: skip
OTHER_FILES = (*TOKENIZER_FILES, "*.json", "*.txt", "*.md", "LICENSE*", "NOTICE*")
STALE_FILES = ("*.index.json", "onecard.json", "calibration.json")  # they describe the base's files, not the result's


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder. It is renamed to `target` if the block succeeds, and removed if it fails.

    Raises:
        UserError: target exists at the start or at the end of the block; the system cannot write a file.
    """
    with temporary_folder(target) as folder:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                sync(path)
        rename_new(folder, target)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Same as `new_folder`, for a file."""
    with temporary_folder(target) as folder:
        yield folder / target.name
        sync(folder / target.name)
        try:
            os.link(folder / target.name, target)  # os.rename would replace an existing file
        except FileExistsError:
            raise exists(target) from None
        except OSError:  # the file system has no links
            rename_new(folder / target.name, target)
        sync_folder(target.parent)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a folder next to target. It is removed when the block ends, unless it was renamed.

    The process holds a lock on it. The next export to the same target removes the folder that a killed process left.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with as_user_error(target, lambda: what_is_kept(target)):
        if target.exists():
            raise exists(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target)
        try:
            temporary.mkdir()
            with locked(temporary, wait=True):
                yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def what_is_kept(target: Path) -> tuple[str, str]:
    """Return what is left after a fault, and what to do."""
    if os.path.lexists(target):
        return f"{target.name} is whole, but the disk may not have it yet", "or use it as it is"
    return "nothing is kept", "start again"


def rename_new(temporary: Path, target: Path) -> None:
    """Rename to target. Raises UserError if another export created target first."""
    if target.exists():
        raise exists(target)
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.exists():
            raise
        raise exists(target) from None
    sync_folder(target.parent)


def exists(target: Path) -> UserError:
    return UserError("the output must be new", "it exists", "choose another --output", str(target))


def remove_stale(target: Path) -> None:
    """Remove this target's temporary folders that no process has locked. An empty one may be new and not locked yet."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError), locked(folder) as held:  # another process may remove it at the same time
            if held and any(folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)


def need_package(name: str, extra: str) -> None:
    """Raise UserError unless the package that a format needs is installed."""
    if find_spec(name) is None:
        raise UserError(f"this format needs the package {name}", "none", f'pip install "onecard[{extra}]"')


def check_room(target: Path, num_bytes: int) -> None:
    """Raise UserError unless the disk has space for num_bytes."""
    parent = next(p for p in (target.parent.resolve(), *target.parent.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes * 1.02:
        found = f"{free / 1e9:.1f} GB free for {num_bytes / 1e9:.1f} GB"
        raise UserError("the disk must have room for the result", found, "make room", str(parent))


def write_others(
    folder: Path, checkpoint: Checkpoint, config: dict[str, Any], places: dict[str, str], adapter: Path | None = None
) -> None:
    """Write config.json, the checkpoint's other files, and an index unless model.safetensors is the only file.

    Args:
        places: the file of each tensor that was written.
        adapter: a trained adapter's folder.
    """
    copy_files(checkpoint.folder, folder, OTHER_FILES)
    source = tokenizer_folder(checkpoint.folder, adapter)
    if source != checkpoint.folder:
        for path in list(find_files(folder, TOKENIZER_FILES)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        copy_files(source, folder, TOKENIZER_FILES)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_ends(folder, config, form_beside(adapter))
    if set(places.values()) != {"model.safetensors"}:
        total = sum((folder / name).stat().st_size for name in set(places.values()))
        content = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_ends(folder: Path, config: dict[str, Any], form: Form | None) -> None:
    """Add the tokens that ended an adapter's training rows to generation_config.json. The file is created if the base
    has none."""
    path = folder / "generation_config.json"
    stored = read_object(path, "remove it") if path.is_file() else {}
    if not stored:  # transformers would read these from config.json
        stored = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    found = stored.get("eos_token_id")
    before = found if isinstance(found, list) else [] if found is None else [found]
    ends = list(dict.fromkeys([*before, *(form.end_tokens if form else ())]))
    if ends == before:
        return
    if not before and isinstance(config.get("eos_token_id"), int):  # the new list overrides config.json's
        ends = list(dict.fromkeys([config["eos_token_id"], *ends]))
    stored["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    stored.pop("_from_model_config", None)  # with it transformers may use config.json's values instead
    path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for path in find_files(source, patterns):
        if path.is_dir():
            shutil.copytree(path, target / path.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, target / path.name)


def find_files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files and folders that match the patterns, without those that describe the base's own files."""
    for path in sorted(folder.iterdir()):
        wanted = any(path.match(p) for p in patterns) and not any(path.match(p) for p in STALE_FILES)
        if wanted and (path.is_file() or path.name == "additional_chat_templates"):
            yield path
