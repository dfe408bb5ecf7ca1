"""The classification head that an adapter folder holds: its labels, in the config.json beside the adapter.

The head's weights are among the adapter's tensors, as peft saves modules_to_save. peft does not save the labels and the
pad token, which tells where the head reads.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from onecard.adapter.load import WEIGHTS, AdapterDocument, read_config, stored_tensors
from onecard.errors import UserError
from onecard.hf import head, skeleton
from onecard.hf.documents import read_model_document
from onecard.hf.load import find_checkpoint
from onecard.hf.skeleton import Model

KEY = f"base_model.model.{head.WEIGHT}"
TASK = "SEQ_CLS"  # peft's name


def labels_beside(adapter: str | Path | None) -> tuple[str, ...]:
    """Return the labels of an adapter's head; empty if it has no head. Those that no config.json names are LABEL_i.

    Raises:
        UserError: the adapter's config says that it has a head, and its tensors lack it or have another number.
    """
    if adapter is None:
        return ()
    folder = Path(adapter)
    if AdapterDocument.model_validate(read_config(folder)).task_type != TASK:
        return ()
    stored = stored_tensors(folder).get(KEY)
    if stored is None:
        must, do = "an adapter of a classification head must hold it", "save it again with peft, with modules_to_save"
        raise UserError(must, f"no {KEY}", do, str(folder / WEIGHTS))
    names = read_model_document(folder).get("id2label") if (folder / "config.json").is_file() else None
    found = names if isinstance(names, dict) else {str(i): f"LABEL_{i}" for i in range(stored.shape[0])}
    if sorted(found) != sorted(map(str, range(stored.shape[0]))):
        must = f"config.json must name the {stored.shape[0]} outputs of the adapter's head in id2label"
        raise UserError(must, f"{len(found)} names", "copy the adapter again", str(folder / "config.json"))
    return tuple(str(found[str(i)]) for i in range(stored.shape[0]))


def labels_in(model: str, adapter: str | None) -> tuple[str, ...]:
    """Return the labels of an adapter's head, or of a checkpoint's; empty if neither has one."""
    if adapter is not None:
        return labels_beside(adapter)
    return head.labels_of(skeleton.read_config(find_checkpoint(model, weights=False)))


def refuse_head(adapter: str | Path | None, does: str) -> None:
    """Raise UserError for an adapter with a classification head, which `does` cannot use."""
    if labels_beside(adapter):
        do = "use `onecard classify`, `onecard eval` or `onecard merge`"
        raise UserError(f"{does} needs an adapter that writes text", "one with a classification head", do, str(adapter))


def check_labels(adapter: str, labels: tuple[str, ...]) -> None:
    """Raise UserError unless a run goes on from an adapter of the same labels."""
    found = labels_beside(adapter)
    if found != labels:
        must = f"a run that goes on from an adapter must have its labels: {head.listed(found) or 'none'}"
        raise UserError(must, head.listed(labels) or "none", "start without --adapter", adapter)


def headed_config(model: Model, tokenizer: Any, where: str) -> Any:
    """Return transformers' config of a model with a head, with the pad token. Raises UserError, same as set_pad."""
    config = deepcopy(model.modules.config)
    head.set_pad(config, tokenizer, head.WEIGHT in model.stored, where)
    return config
