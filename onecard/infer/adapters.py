"""Adapters on a model: loaded and checked, and switched between."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from onecard.errors import UserError
from onecard.hf.checkpoint import TensorInfo, read_header, read_json
from onecard.hf.load import first_line
from onecard.hf.quantizer import check_finite

WEIGHTS = "adapter_model.safetensors"
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # inits of peft that train over another base


def with_adapter(model: Any, adapter: str | None, name: str = "default") -> Any:
    """The model with a peft adapter folder on it, beside those that it has.

    Args:
        name: peft's for the adapter, without dots.

    Raises:
        UserError: a file is missing or damaged; a tensor is missing, unknown, of another shape or not finite; a base
            other than the one that the adapter was trained on, as far as its folder tells.
    """
    if adapter is None:
        return model
    from peft import PeftModel, get_peft_model_state_dict

    from onecard.hf.origin import check_origin

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    check_origin(base, adapter)
    weights = Path(adapter) / WEIGHTS
    stored, config = stored_tensors(Path(adapter)), peft_config(Path(adapter))
    embeddings = [key for key in stored if re.search(r"embed_tokens(\.token_adapter\.base_layer)?\.weight$", key)]
    num_rows = max((stored[key].shape[0] for key in embeddings), default=0)
    if num_rows > base.get_input_embeddings().weight.shape[0]:  # tokens that training added
        base.resize_token_embeddings(num_rows, mean_resizing=False)
    do = "use the base model that the adapter was trained on"
    try:
        if isinstance(model, PeftModel):
            tuned = model
            tuned.add_adapter(name, config)
            tuned.load_adapter(adapter, name)
        else:
            tuned = PeftModel.from_pretrained(model, adapter, name, config=config)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UserError("the adapter must fit the model", first_line(error), do, str(weights)) from None
    loaded = get_peft_model_state_dict(tuned, adapter_name=name)
    wrong = sorted(set(stored) ^ set(loaded))
    if wrong:
        found = f"{len(wrong)} differ, first {wrong[0]}"
        raise UserError("the adapter's tensors must be the model's", found, do, str(weights))
    for key, tensor in loaded.items():
        check_finite(f"{weights}: {key}", tensor)
    return tuned.eval()


def stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    """What an adapter folder's header says. Raises UserError for a missing or damaged file."""
    path = folder / WEIGHTS
    if not path.is_file():
        do = "pass the run's adapter/ folder"
        raise UserError(f"an adapter folder must hold {WEIGHTS}", "no such file", do, str(folder))
    return read_header(path)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError for what is none, and for an adapter whose training changed the base."""
    path = folder / "adapter_config.json"
    found = read_json(path, "pass the run's adapter/ folder")
    init = str(found.get("init_lora_weights")).lower()
    if init.startswith(CHANGES_BASE):
        raise UserError(
            "an adapter must be for the base as it is",
            f"init_lora_weights {init}, which trains over a changed base",
            "save it as plain LoRA: peft's save_pretrained(path_initial_model_for_weight_conversion=...)",
            str(path),
        )
    return found


def peft_config(folder: Path) -> Any:
    """peft's config of an adapter folder. Raises UserError for what is none."""
    from peft import PeftConfig

    from onecard.nn.lora import register_fused

    read_config(folder)
    try:
        return register_fused(PeftConfig.from_pretrained(str(folder)))
    except (TypeError, ValueError, KeyError) as error:
        found, where = f"{type(error).__name__}: {first_line(error)}", str(folder / "adapter_config.json")
        raise UserError("the file must be an adapter's config of peft", found, "save it again", where) from None


def use_adapter(model: Any, name: str | None) -> None:
    """Make the model compute with that adapter; with None, as its base does."""
    if name is not None:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name, inference_mode=True)
    elif hasattr(model, "peft_config"):
        model.base_model.disable_adapter_layers()
