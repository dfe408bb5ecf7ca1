"""A GGUF file as a checkpoint folder: config and tokenizer in the user's cache, beside a link to the file.

All else of onecard reads a checkpoint's config.json and tokenizer from a folder. This one has some MB at most and no
weights: each tensor is dequantized when it is read (tensors.py), so nothing of the model is stored twice. The folder's
name is a hash of the file's path and header, so a file that is replaced by another gets another folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from onecard.errors import UserError
from onecard.faults import as_user_error
from onecard.hf.gguf.config import config_of
from onecard.hf.gguf.header import Header, parts_of, read_header
from onecard.hf.gguf.tensors import gguf_tensors, model_dtype
from onecard.hf.gguf.tokenizer import end_ids, other_token, tokenizer_of
from onecard.hf.stored import FLOAT_DTYPES, TensorInfo

LINK = "model.gguf"
FORM = "1"  # of the folder; another release may write other files


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def gguf_folder(path: Path) -> Path:
    """Return the folder of a GGUF file's model, which is made if it is new. Raises UserError: same as `read_header`,
    `config_of` and `gguf_tensors`."""
    path = path.absolute()
    header = header_of(path)
    digest = sha256(f"{FORM} {path} {header.digest}".encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onecard" / "gguf"
    folder = cache / digest
    if (folder / LINK).is_symlink():
        return folder
    config = config_of(header)
    gguf_tensors(header, config)
    config.dtype = FLOAT_DTYPES[model_dtype(header)]
    temporary = cache / f".{digest}.{secrets.token_hex(4)}.tmp"
    with as_user_error(folder, lambda: ("nothing is kept", "or set XDG_CACHE_HOME to another folder")):
        try:
            temporary.mkdir(parents=True)
            config.save_pretrained(temporary)
            with suppress(UserError):  # load_tokenizer raises it, unless the user names another tokenizer
                tokenizer_of(header).save_pretrained(temporary)
            if end_ids(header):
                ends = {name: getattr(config, f"{name}_token_id") for name in ("bos", "pad")}
                ids = {f"{name}_token_id": i for name, i in ends.items() if i is not None}
                GenerationConfig(eos_token_id=end_ids(header), **ids).save_pretrained(temporary)
            (temporary / LINK).symlink_to(path)
            with suppress(FileExistsError, OSError):  # another process made it
                os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def source_in(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that `gguf_folder` made; None for another folder."""
    link = folder / LINK
    return Path(os.readlink(link)) if link.is_symlink() else None


def header_of(path: Path) -> Header:
    """Same as `read_header`. The last ones are kept, until a file changes."""
    states = tuple((state.st_size, state.st_mtime_ns) for part in parts_of(path) for state in [part.stat()])
    return kept_header(path, states)


@lru_cache(4)
def kept_header(path: Path, states: tuple[tuple[int, int], ...]) -> Header:
    return read_header(path)


def tensors_of(path: Path, folder: Path) -> tuple[list[Path], dict[str, TensorInfo]]:
    """Return the files and the tensors of a GGUF file whose folder is `folder`."""
    header = header_of(path)
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    tensors = gguf_tensors(header, config)
    return list(dict.fromkeys(info.file for info in tensors.values())), tensors


def check_tokenizer(path: Path) -> None:
    """Raise UserError if a file's tokenizer is not known to be right."""
    tokenizer_of(header_of(path))


def check_tokens(path: Path, tokenizer: Any, folder: Path) -> None:
    """Raise UserError unless a tokenizer has a file's tokens under the file's ids."""
    other = other_token(header_of(path), tokenizer)
    if other is not None:
        must = f"the tokenizer must have the tokens of {path.name}"
        raise UserError(must, other, "pass the folder of the original checkpoint's tokenizer", str(folder))
