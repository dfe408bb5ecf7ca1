"""Atomic checkpoints: safetensors and JSON files in a folder, with a manifest that is written last.

A checkpoint is written to a temporary folder. Every file is synced to disk. `manifest.json` lists their sizes and
sha256. Then the folder is renamed. A kill at any instant leaves an earlier checkpoint or the new one.
"""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onecard.adapter.layers import LoraLinear4bit
from onecard.config import TrainConfig
from onecard.data.loader import Loader
from onecard.documents import Own, hold, read_object
from onecard.errors import UserError
from onecard.faults import about
from onecard.files import sha256, sync, sync_folder, write_synced
from onecard.kernels.cpu_info import arithmetic
from onecard.train.best import BestPosition
from onecard.train.run import Run, count_batches, gathered_random, restore_own_random

FREE_TO_CHANGE = {
    "model",  # the path may change: `identity` verifies that model and data are the same
    "data",
    "eval_data",
    "data_cache",
    "data_cache_size",
    "adapter",
    "num_train_epochs",  # but not to fewer than are done
    "max_steps",
    "gradient_checkpointing",  # the results are bit-identical with and without it
    "device_memory",
    "weights_budget",
    "parallel",  # the same bits
    "shard_optimizer",  # the same bits
    "cuda_graphs",
    "output",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "load_best_model_at_end",
    "early_stopping_patience",
    "early_stopping_threshold",
    "loggers",
    "sample_prompts",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}
FREE_WITHOUT_BEST = {"metric", "metric_max_rows", "metric_max_new_tokens"}  # else the best may be measured by them
PREFIX = "checkpoint-"
TEMPORARY = ".tmp-checkpoint-"
NUMBERED = re.compile(rf"{PREFIX}(0|[1-9][0-9]{{0,17}})")
MANIFEST = "manifest.json"


class Written(Own):
    """Size and hash of a checkpoint's file, as the manifest lists them."""

    bytes: int = Field(ge=0)
    sha256: str


class Manifest(Own):
    """A checkpoint's manifest.json. The checkpoint is valid if every file matches its entry."""

    step: int = Field(ge=0)
    files: dict[Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")], Written]


@dataclass
class State:
    """A checkpoint whose hashes match. `skipped` lists the newer checkpoints that are broken, with the reasons."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, dict[str, Any]]
    skipped: list[str] = field(default_factory=list)


def save_state(
    root: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    documents: dict[str, dict[str, Any]],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write checkpoint-<step> under `root`. Remove all checkpoints with a later step, and all but the newest `keep`.

    Args:
        best: step of a checkpoint that is kept, as one of the `keep` but beside the newest, same as in transformers.
        tensors: file stem -> named tensors, each a safetensors file.
        documents: file stem -> JSON object.

    Raises:
        OSError: the disk is full, read-only or missing; earlier checkpoints stay unchanged.
    """
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary, final = root / f"{TEMPORARY}{step}", root / f"{PREFIX}{step}"
    try:
        temporary.mkdir()
        for stem, named in tensors.items():
            with about(path := temporary / f"{stem}.safetensors"):
                save_file(named, path)
        for stem, document in documents.items():
            with about(path := temporary / f"{stem}.json"):
                path.write_text(json.dumps(document, indent=1))
        files = {}
        for path in sorted(temporary.iterdir()):
            sync(path)
            files[path.name] = Written(bytes=path.stat().st_size, sha256=sha256(path))
        write_synced(temporary / MANIFEST, Manifest(step=step, files=files).model_dump_json(indent=1).encode())
        sync_folder(temporary)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():  # a resumed run has reached this step again
        remove(final)
    os.replace(temporary, final)
    sync_folder(root)
    there = numbered(root)
    newer = there[: there.index(final)]  # broken checkpoints that a resumed run skipped
    older = [folder for folder in there[len(newer) :] if folder.name != f"{PREFIX}{best}" or folder == final]
    if len(newer) + len(older) < len(there):
        keep = max(1, keep - 1)
    for old in [*newer, *older[keep:]]:
        remove(old)
    return final


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: without it, a partly deleted folder is not a valid checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def numbered(root: Path) -> list[Path]:
    """List the checkpoint folders, newest first."""
    found = [p for p in root.glob(f"{PREFIX}*") if NUMBERED.fullmatch(p.name)]  # ASCII digits only
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)), reverse=True)


def load_newest(root: Path) -> State | None:
    """Load the newest checkpoint whose hashes match. Return None if there is no checkpoint.

    Raises:
        UserError: all checkpoints are broken.
        OSError: a checkpoint cannot be read.
    """
    skipped = []
    for folder in numbered(root):
        try:
            with about(folder):
                paths = verified(folder)
                tensors = {path.stem: read_tensors(path) for path in paths if path.suffix == ".safetensors"}
                documents = {path.stem: read_object(path) for path in paths if path.suffix == ".json"}
        except (OSError, ValueError, SafetensorError) as error:  # UserError is a ValueError
            if of_the_disk(error):
                raise  # the checkpoint may be valid, and a resume from an older one would delete it
            skipped.append(f"{folder.name}: {error}")
            continue
        return State(int(folder.name.removeprefix(PREFIX)), folder, tensors, documents, skipped)
    if skipped:
        raise UserError(
            "a checkpoint must be whole to resume", "; ".join(skipped), "start again in a new folder", str(root)
        )
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load a checkpoint's tensors by name. Raises OSError, SafetensorError."""
    try:
        with about(path):
            return load_file(path)
    except FileNotFoundError:  # safetensors raises it for every file that it cannot open; this file was just hashed
        path.open("rb").close()  # raises the true reason
        raise OSError(errno.EIO, "not readable just now", str(path)) from None


def of_the_disk(error: Exception) -> bool:
    """Whether an existing file could not be read. The error is an OSError, or read_object's UserError from one."""
    found = error.__context__ if isinstance(error, UserError) else error
    gone = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    return isinstance(found, OSError) and not isinstance(found, gone)


def verified(folder: Path) -> list[Path]:
    """Check the files of a checkpoint against their hashes and return them. Raises ValueError or OSError."""
    path = folder / MANIFEST
    manifest = hold(Manifest, read_object(path), str(path))
    if manifest.step != int(folder.name.removeprefix(PREFIX)):
        raise ValueError(f"its manifest is of step {manifest.step}")
    for name, entry in manifest.files.items():
        if Path(name).name != name or "\0" in name:
            raise ValueError(f"{name} lies outside the folder")
        if sha256(folder / name) != entry.sha256:
            raise ValueError(f"{name} is not what the manifest says")
    return [folder / name for name in manifest.files]


class LoaderPosition(Own):
    """The loader's position."""

    epoch: int = Field(ge=0)
    batch: int = Field(ge=0)
    row: int = Field(default=0, ge=0)  # of streamed data: the first of its buffer
    before: int = Field(default=0, ge=0)  # micro-batches of earlier buffers


class Position(Own):
    """A run's position: progress.json of its checkpoint."""

    step: int = Field(ge=0)
    num_steps: int
    loss_scale: float = Field(gt=0)
    num_finite_steps: int = Field(default=0, ge=0)
    max_forward_tokens: int | None = None
    mlp_chunk: int | None = Field(default=None, gt=0)
    num_threads: int | None = None
    num_processes: int = 1
    arithmetic: str | None = None
    date: str = ""
    loader: LoaderPosition
    best: BestPosition | None = None

    @field_validator("date")
    @classmethod
    def _a_date(cls, value: str) -> str:
        if value:
            datetime.date.fromisoformat(value)
        return value


def position_of(state: State) -> Position:
    """Read a run's position from its checkpoint. Raises UserError for an incomplete checkpoint."""
    do = "start a new run in another folder"
    missing = {"progress", "config", "identity"} - set(state.documents) | {"adapter", "random"} - set(state.tensors)
    if missing:
        raise UserError("a checkpoint must hold its run's state", f"no {min(missing)}", do, str(state.path))
    return hold(Position, state.documents["progress"], str(state.path / "progress.json"), do)


def checkpoint(run: Run, root: Path) -> None:
    """Write a checkpoint of all that the next update depends on. Of several processes, the first one writes."""
    tensors = {"optimizer": run.owners.all_states(run.optimizer), "random": gathered_random(run)}
    if not run.ranks.is_first:
        return
    position = Position(
        step=run.step,
        num_steps=run.num_steps,
        loss_scale=run.loss_scale,
        num_finite_steps=run.num_finite_steps,
        max_forward_tokens=run.max_forward_tokens,
        mlp_chunk=run.strategy.mlp_chunk,
        num_threads=torch.get_num_threads(),
        num_processes=run.ranks.count,
        arithmetic=arithmetic(run.device),
        date=run.date,
        loader=LoaderPosition(**run.loader.state_dict()),
        best=run.best.position if run.best else None,
    )
    config = run.config.model_dump()
    documents = {"progress": position.model_dump(), "config": config, "identity": run.identity}
    best = run.best.position.step if run.best else None
    with run.optimizer.averaged():
        weights = run.trainable | starts(run.model)
        tensors["adapter"] = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_state(root, run.step, tensors, documents, run.config.save_total_limit, best)


def starts(model: Any) -> dict[str, Tensor]:
    """Return the frozen starts of LoRA, which another machine's decomposition may not give again."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLinear4bit)]
    pairs = {f"{path}.start": pair for path, layer in layers for pair in layer.starts.values()}
    return {f"{path}_{key}": tensor for path, pair in pairs.items() for key, tensor in zip("AB", pair)}


def resume(run: Run, state: State) -> None:
    """Restore a run from a checkpoint. Raises UserError, same as `check_unchanged`."""
    check_unchanged(run.config, run.identity, state)
    for name, parameter in run.trainable.items():
        parameter.data.copy_(state.tensors["adapter"][name])
        found = {key: value for key, value in state.tensors["optimizer"].items() if key.rpartition(".")[0] == name}
        found = {key.rpartition(".")[2]: value.clone() for key, value in found.items()}  # not a view of the file
        if name in run.owners.own:
            run.optimizer.load_state(parameter, found)
    for name, tensor in starts(run.model).items():
        tensor.copy_(state.tensors["adapter"][name])
    position = position_of(state)
    run.num_steps = steps_of_resumed(position, run.loader, run.config)
    run.step, run.loss_scale, run.num_finite_steps = position.step, position.loss_scale, position.num_finite_steps
    run.split_as(position.max_forward_tokens, position.mlp_chunk)
    run.loader.load_state_dict(position.loader.model_dump())
    if run.best is not None and position.best is not None:
        run.best.position = position.best
    restore_own_random(run, state.tensors["random"])


def steps_of_resumed(position: Position, loader: Loader, config: TrainConfig) -> int:
    """Return the updates of a resumed run, from its first one. Its settings may ask for more than before.

    Raises:
        UserError: they ask for fewer than are done.
    """
    steps = config.max_steps
    if steps is None:
        before = sum(loader.num_batches(epoch) for epoch in range(position.loader.epoch)) + position.loader.batch
        left = count_batches(loader, config) - before
        steps = position.step + math.ceil(left / config.gradient_accumulation_steps)
    if steps < position.step:
        asked = f"max_steps {config.max_steps}" if config.max_steps else f"num_train_epochs {config.num_train_epochs:g}"
        must = f"a resumed run must not end before the {position.step:,} updates that are done"
        raise UserError(must, asked, "ask for more, or use the adapter as it is", "max_steps")
    return steps


def check_best(config: TrainConfig, state: State) -> None:
    """Raise UserError unless the checkpoint of the best evaluation, which a run would end with, is whole."""
    best = position_of(state).best
    if not config.load_best_model_at_end or best is None or best.step in (None, state.step):
        return
    folder = state.path.with_name(f"{PREFIX}{best.step}")
    try:
        verified(folder)
    except ValueError as error:
        do = "put it back, or start a new run in another folder"
        raise UserError("the best checkpoint must be there to resume", str(error), do, str(folder)) from None


def load_best(run: Run, root: Path) -> None:
    """Set the adapter to that of the best evaluation. Raises UserError or OSError if its checkpoint cannot be read."""
    assert run.best is not None and run.best.position.step is not None
    folder = root / f"{PREFIX}{run.best.position.step}"
    try:
        verified(folder)
    except ValueError as error:
        do = "resume with --no-load-best-model-at-end for the last adapter"
        raise UserError("the best checkpoint must be whole", str(error), do, str(folder)) from None
    tensors = read_tensors(folder / "adapter.safetensors")
    for name, parameter in run.trainable.items():
        parameter.data.copy_(tensors[name])


def check_unchanged(config: TrainConfig, identity: dict[str, str], state: State) -> None:
    """Raise UserError for the first setting or `identity` entry that differs from the checkpoint's."""
    free = FREE_TO_CHANGE | (FREE_WITHOUT_BEST if config.best_metric is None else set())
    now = {k: v for k, v in config.model_dump().items() if k not in free}
    before = state.documents["config"]
    fields = TrainConfig.model_fields  # a checkpoint of an older release lacks the newest
    defaults = {key: fields[key].get_default(call_default_factory=True) for key in now}
    compared = [(key, before.get(key, defaults[key]), value) for key, value in now.items()]
    changed = [(key, old, new) for key, old, new in compared if old != new]
    if changed:
        key, old, new = changed[0]
        raise UserError(
            "a resumed run must have the settings it began with",
            f"{key} is {new!r}, was {old!r}",
            "give the old value, or start a new run in another folder",
            str(state.path),
        )
    for what, digest in {"adapter": None, **identity}.items():
        before = state.documents["identity"].get(what)
        if before is None and what.startswith("eval data"):
            continue  # no best was sought before
        if before != digest:
            raise UserError(
                f"a resumed run must have the {what} it began with",
                f"the {what} has changed",
                "put the old one back, or start a new run in another folder",
                str(state.path),
            )
