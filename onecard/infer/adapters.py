"""Adapters on a model: loaded and checked, and switched between."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from onecard.errors import UserError
from onecard.hf.checkpoint import read_header, read_json
from onecard.hf.load import first_line
from onecard.hf.quantizer import check_finite


def with_adapter(model: Any, adapter: str | None, name: str = "default") -> Any:
    """The model with a peft adapter folder on it, beside those that it has.

    Args:
        name: peft's for the adapter, without dots.

    Raises:
        UserError: a file is missing or damaged; a tensor is missing, unknown, of another shape or not finite; a base
            other than the one that onecard trained the adapter on.
    """
    if adapter is None:
        return model
    from peft import PeftModel, get_peft_model_state_dict

    from onecard.hf.origin import check_origin

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    check_origin(base, adapter)
    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(
            "an adapter folder must hold adapter_model.safetensors",
            "no such file",
            "pass the run's adapter/ folder",
            adapter,
        )
    config, stored = read_adapter_config(Path(adapter)), read_header(weights)
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
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError("the adapter must fit the model", first_line(error), do, str(weights)) from None
    loaded = get_peft_model_state_dict(tuned, adapter_name=name)
    wrong = sorted(set(stored) ^ set(loaded))
    if wrong:
        found = f"{len(wrong)} differ, first {wrong[0]}"
        raise UserError("the adapter's tensors must be the model's", found, do, str(weights))
    for key, tensor in loaded.items():
        check_finite(f"{weights}: {key}", tensor)
    return tuned.eval()


def read_adapter_config(folder: Path) -> Any:
    """peft's config of an adapter folder. Raises UserError for what is none."""
    from peft import PeftConfig

    from onecard.nn.lora import register_fused

    path = folder / "adapter_config.json"
    read_json(path, "pass the run's adapter/ folder")
    try:
        return register_fused(PeftConfig.from_pretrained(str(folder)))
    except (TypeError, ValueError, KeyError) as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise UserError("the file must be an adapter's config of peft", found, "save it again", str(path)) from None


def use_adapter(model: Any, name: str | None) -> None:
    """Make the model compute with that adapter; with None, as its base does."""
    if name is not None:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name, inference_mode=True)
    elif hasattr(model, "peft_config"):
        model.base_model.disable_adapter_layers()
