"""The reference's log-probabilities of a run's answers, computed once and stored beside the run.

The file belongs to its data, base, dtype and loss by a hash. A resumed run reads it. A run that ends within its first
epoch computes those of the micro-batches that it reads, and no others. The rows are those of the training, so that the
first update finds the reference's own numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onecard.faults import about
from onecard.files import sync, sync_folder
from onecard.train.preference import Preference, batches_of
from onecard.train.run import Run

FILE = "reference.safetensors"


def set_references(run: Run, batches: Iterator[dict[str, Any]], output: Path, identity: dict[str, str]) -> str:
    """Set the reference of a run's training and validation rows, from the file or by the model. Return what was done.

    Args:
        batches: the micro-batches of the first epoch, in the training's order.
    """
    preference = run.objective
    assert isinstance(preference, Preference)
    held = {name: each for name, each in run.held_out.items() if isinstance(each, Preference)}
    path, key = output / FILE, hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    stored = read(path, key)
    first = list(islice(batches, run.num_batches))
    needed = sorted({index for batch in first for index in batch["indices"]})
    if stored is None or stored["training"][needed].isnan().any():
        training = run.model.training
        run.model.eval()
        stored = {"training": preference.compute_references(first, run.max_forward_tokens)}
        for name, held_out in held.items():
            stored[table_of(name)] = held_out.compute_references(batches_of(held_out.examples, run.config), None)
        run.model.train(training)
        write(path, key, stored)
        done = f"the reference's log-probabilities of {len(needed):,} rows are computed"
    else:
        done = f"the reference's log-probabilities are those of {path.name}"
    preference.reference = stored["training"]
    for name, held_out in held.items():
        held_out.reference = stored[table_of(name)]
    return done


def table_of(name: str) -> str:
    """Return the name of an eval file's table."""
    return f"validation {name}".rstrip()


def read(path: Path, key: str) -> dict[str, Tensor] | None:
    """Read the file's tables. None if there is no whole file of this key."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def write(path: Path, key: str, tables: dict[str, Tensor]) -> None:
    """Write the file as a whole: a kill leaves none, or the complete one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with about(path):
        save_file(tables, temporary, {"key": key})
        sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)


def reference_identity(preference: Preference, identity: dict[str, str], validation: str | None) -> dict[str, Any]:
    """Return all that the reference's numbers depend on."""
    dtype = str(preference.base.config.quantization_config.bnb_4bit_compute_dtype)
    names = ("loss", "max_seq_length", "quant_type", "blocksize", "double_quant")
    settings = {name: getattr(preference.config, name) for name in names}
    return {**identity, "validation": validation, "dtype": dtype, "torch": torch.__version__, **settings}
