"""The model of a plan, by its folder, by its name in the table of known shapes, or by its hub id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from onecard.errors import UserError, did_you_mean, first_line
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.load import find_checkpoint, is_hub_id
from onecard.hf.skeleton import Model, meta_model, named, read_model
from onecard.hf.stored import DTYPE_BITS
from onecard.hf.text_only import leave_out
from onecard.memory.shapes import KNOWN, MXFP4


def known_config(name: str) -> Any:
    """Return transformers' config of a model in the table."""
    fields = dict(KNOWN[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def find_model(model: str, labels: Sequence[str] = (), text_only: bool = False) -> Model:
    """Find a model by its folder, its name in the table, or its hub id.

    Args:
        labels: of the classification head that the model gets.
        text_only: leave out the parts that text does not pass through.

    Raises:
        UserError: there is no such model; the error has the nearest name of the table.
    """
    found = find_whole(model, labels)
    if text_only:
        leave_out(found.modules)
    return found


def find_whole(model: str, labels: Sequence[str]) -> Model:
    """Find a model with all its parts."""
    if model.lower() in KNOWN:
        found = Model(meta_model(known_config(model.lower()), model, labels=labels), {})
        return replace(found, mxfp4=frozenset(found.stacks)) if model.lower() in MXFP4 else found
    if is_hub_id(model):
        return read_hub(model, labels)
    try:
        return read_model(replace(inspect_checkpoint(find_checkpoint(model)), labels=tuple(labels)))
    except UserError as error:
        raise UserError(error.must, f"{error.found}{did_you_mean(model.lower(), KNOWN)}", error.do, model) from None


def read_hub(repository: str, labels: Sequence[str] = ()) -> Model:
    """Read a hub repository's model from its config.json and its files' headers. No weights are fetched."""
    from huggingface_hub import get_safetensors_metadata

    config: Any = from_hub(lambda: AutoConfig.from_pretrained(repository, trust_remote_code=False), repository)
    headers: Any = from_hub(lambda: get_safetensors_metadata(repository), repository)
    tensors = [item for file in headers.files_metadata.values() for item in file.tensors.items()]
    sizes = {name: DTYPE_BITS.get(info.dtype, 16) // 8 for name, info in tensors}
    return named(meta_model(config, repository, labels=labels), sizes)


def from_hub(fetch: Callable[[], Any], repository: str) -> Any:
    """Return fetch(). Raises UserError for any error of the hub's client."""
    try:
        return fetch()
    except Exception as error:
        raise UserError(
            "the model must be a folder, a hub id in reach or a known name",
            f"{first_line(error)}{did_you_mean(repository.lower(), KNOWN)}",
            "check name and network",
            repository,
        ) from None
