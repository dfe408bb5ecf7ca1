"""What onecard says to bad data, damaged checkpoints and adapters: `python -m tests.errors > docs/errors.md`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onecard
from onecard.config import DataConfig, LoraSettings, make_config
from onecard.data.load import load_dataset
from onecard.errors import UserError
from tests.conftest import make_checkpoint, make_tokenizer, write_rows
from tests.data.bad_data import CHAT_LINES, FILES, LABELLED, chat_file
from tests.export.gguf.test_importance import WRONG as IMPORTANCE
from tests.export.gguf.test_importance import use_wrong
from tests.hf.test_added_tokens import WRONG as TOKENS
from tests.hf.test_added_tokens import add
from tests.hf.test_checkpoint import DAMAGES as CHECKPOINTS
from tests.hf.test_load_mxfp4 import DAMAGES as PACKED
from tests.infer.test_generate import DAMAGES as ADAPTERS
from tests.infer.test_prompts import WRONG as PROMPTS
from tests.infer.test_prompts import use_wrong as read_wrong
from tests.mxfp4 import make_mxfp4
from tests.studio.test_page import WRONG as PAGE
from tests.studio.test_page import use_wrong as page_wrong
from tests.train.test_run_folders import WRONG as RUNS
from tests.train.test_run_folders import use_wrong as report_wrong

MXFP4 = "Checkpoints with experts in MXFP4"
KINDS = {
    "Data": [*CHAT_LINES, *FILES, *LABELLED],
    "Checkpoints": list(CHECKPOINTS),
    MXFP4: list(PACKED),
    "Adapters": list(ADAPTERS),
    "New tokens": list(TOKENS),
    "Importance matrices": list(IMPORTANCE),
    "Folders of runs": list(RUNS),
    "Files of prompts": list(PROMPTS),
    "The page": list(PAGE),
}
HEAD = """# What onecard says

Every error has three parts: what must hold, what was found, what to do. These are the tests' own cases, printed by
`python -m tests.errors > docs/errors.md`; a row of data is named as file:line:field.
"""


def row(kind: str, call: Callable[[], object], folder: Path) -> str:
    """A line of a table; the folder of the case is left out."""
    try:
        call()
    except UserError as error:
        text = str(error).replace(f"{folder}/", "").replace(str(folder), "the folder")
        cells = text.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
        return f"| {kind} | {cells} |"
    raise AssertionError(f"{kind} was not refused")


def data_rows(folder: Path) -> list[str]:
    def read(path: Path, loss: str = "sft") -> Callable[[], object]:
        return lambda: load_dataset(str(path), make_tokenizer(), DataConfig(), loss)

    rows = [row(kind, read(chat_file(folder, line)), folder) for kind, (line, _, _) in CHAT_LINES.items()]
    for kind, (name, raw, _, _) in FILES.items():
        (folder / name).write_bytes(raw)
        rows.append(row(kind, read(folder / name), folder))
    for kind, (labelled, _, _) in LABELLED.items():
        rows.append(row(kind, read(write_rows(folder / "d.jsonl", labelled), "classification"), folder))
    return rows


def damaged_rows(sound: Path, damages: dict, load: Callable[[str], object]) -> list[str]:
    rows, copy = [], sound.with_name("copy")
    for kind, (damage, _) in damages.items():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sound, copy)
        damage(copy)
        rows.append(row(kind, lambda: load(str(copy)), copy))
    return rows


def tables(folder: Path) -> dict[str, list[str]]:
    """heading -> the rows of its table."""
    from peft import get_peft_model

    from onecard.adapter.layers import lora_config
    from onecard.adapter.load import with_adapter

    def load(path: str) -> object:
        return onecard.load_model(path, device="cpu")

    sound, adapter = make_checkpoint(folder / "sound"), folder / "adapter"
    settings = make_config(LoraSettings, {"r": 4, "target_modules": ["q_proj"]})
    get_peft_model(load(str(sound)), lora_config(settings)).save_pretrained(adapter)
    base = load(str(sound))
    return {
        "Data": data_rows(folder),
        "Checkpoints": damaged_rows(sound, CHECKPOINTS, load),
        MXFP4: damaged_rows(make_mxfp4(folder / "packed"), PACKED, load),
        "Adapters": damaged_rows(adapter, ADAPTERS, lambda path: with_adapter(base, path)),
        "New tokens": [row(kind, partial(add, folder, kind), folder) for kind in TOKENS],
        "Importance matrices": [row(kind, partial(use_wrong, sound, folder, kind), folder) for kind in IMPORTANCE],
        "Folders of runs": [row(kind, partial(report_wrong, folder, kind), folder) for kind in RUNS],
        "Files of prompts": [row(kind, partial(read_wrong, folder, kind), folder) for kind in PROMPTS],
        "The page": [row(kind, partial(page_wrong, folder / "root", kind), folder) for kind in PAGE],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = tables(Path(name))
    print(HEAD)
    for heading, rows in found.items():
        print(f"## {heading}\n\n| kind | message |\n|---|---|\n" + "\n".join(rows) + "\n")
