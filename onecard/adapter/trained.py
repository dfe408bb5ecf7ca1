"""A trained adapter that a new run goes on from: its checks before anything loads, and its weights as the start.

The run makes an adapter of its own from its settings. So the settings must be those of the trained adapter, and the
base the one that it was trained on. The optimizer is new.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onecard.adapter.load import AdapterDocument, check_ranks, fill, modules_of, read_config, stored_tensors
from onecard.adapter.origin import check_origin, check_sample, read_origin
from onecard.adapter.tokens import indices_of
from onecard.config import TrainConfig
from onecard.errors import UserError
from onecard.hf.checkpoint import Checkpoint
from onecard.hf.skeleton import Model
from onecard.hf.tokens import NewTokens

COMPARED = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "layers_to_transform",
    "target_parameters",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)  # fields of peft's config that the settings have under the same names


def check_trained(config: TrainConfig, model: Model, adapted: list[str], checkpoint: Checkpoint) -> list[str]:
    """Check a trained adapter against the settings of the run that goes on from it. Return notes for the user.

    Args:
        adapted: names of the weights that the run's LoRA trains.

    Raises:
        UserError: a file is damaged; a setting, the targets or the base differ from the adapter's.
    """
    folder = Path(str(config.adapter))
    stored = stored_tensors(folder)
    check_ranks(folder, stored, model.linears)
    found = AdapterDocument.model_validate(read_config(folder, modules_of(stored)))
    path = str(folder / "adapter_config.json")
    if found.peft_type != "LORA":
        raise UserError("a run can go on from a LoRA adapter", found.peft_type, "start without --adapter", path)
    for name in COMPARED:
        wanted, before = getattr(config, name, None), getattr(found, name, None)
        if same_form(wanted) != same_form(before):
            raise different(name, before, wanted, path)
    trained = {module.rpartition(".")[2] for module in modules_of(key for key in stored if ".lora_A" in key)}
    linears = {name.removesuffix(".weight").rpartition(".")[2] for name in adapted if name in model.linears}
    if not config.target_parameters and trained != linears:
        raise different("target_modules", sorted(trained), sorted(linears), path)
    origin = read_origin(folder)
    if origin is None:
        return [f"{folder} has no onecard.json: whether this base is the adapter's cannot be checked"]
    if not checkpoint.is_4bit:  # else the checkpoint says how it is stored, and the loaded base is checked
        for name, before in origin.quant.items():
            if getattr(config, name) != before:
                raise different(name, before, getattr(config, name), path)
        check_sample(checkpoint, model.modules, model.linears, origin, folder)
    return []


def check_same_tokens(tokenizer: Any, new: NewTokens, before: Any, adapter: str) -> None:
    """Raise UserError unless the run adds the tokens that a trained adapter has, and trains its rows.

    Args:
        tokenizer: the run's, with the new tokens.
        before: the adapter's.
    """
    path = f"{adapter}/adapter_config.json"
    trained = indices_of(AdapterDocument.model_validate(read_config(Path(adapter))).trainable_token_indices)
    same = all(before.convert_ids_to_tokens(number) == text for number, text in new.texts.items())
    if same and len(before) == len(tokenizer) and trained in ([], list(new.texts)):
        return
    had = before.convert_ids_to_tokens([number for number in trained if number < len(before)])
    found = f"{', '.join(new.texts.values()) or 'none'}, the adapter's are {', '.join(map(str, had)) or 'none'}"
    must, do = "a run that goes on from an adapter must add the adapter's tokens", "pass them as --add-tokens"
    raise UserError(must, found, do, path)


def same_form(value: Any) -> Any:
    """Return a value in the form in which two of them are compared: lists without an order, none as empty."""
    return sorted(map(str, value)) if isinstance(value, (list, tuple, set)) else value or None


def different(name: str, before: Any, wanted: Any, path: str) -> UserError:
    return UserError(
        "a run that goes on from an adapter must have its settings",
        f"{name} is {wanted!r}, the adapter's is {before!r}",
        f"pass the adapter's {name}, or start without --adapter",
        path,
    )


def set_trained(tuned: Any, adapter: str) -> None:
    """Set the weights of a run's new adapter to those of a trained one. Raises UserError if they do not fit."""
    folder = Path(adapter)
    check_origin(tuned.get_base_model(), adapter)
    fill(tuned, folder, stored_tensors(folder), "default")
