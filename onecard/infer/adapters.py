"""Adapters on a model: loaded and checked, and switched between."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from onecard.errors import UserError


def with_adapter(model: Any, adapter: str | None, name: str = "default") -> Any:
    """The model with a peft adapter folder on it, beside those that it has.

    Args:
        name: peft's for the adapter, without dots.

    Raises:
        UserError: a missing or unknown tensor; a base other than the one that onecard trained the adapter on.
    """
    if adapter is None:
        return model
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    from onecard.hf.origin import check_origin
    from onecard.nn.lora import register_fused

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
    with safe_open(weights, "pt") as file:
        stored = set(file.keys())
        embeddings = [key for key in stored if re.search(r"embed_tokens(\.token_adapter\.base_layer)?\.weight$", key)]
        num_rows = max((file.get_slice(key).get_shape()[0] for key in embeddings), default=0)
    if num_rows > base.get_input_embeddings().weight.shape[0]:  # tokens that training added
        base.resize_token_embeddings(num_rows, mean_resizing=False)
    config = register_fused(PeftConfig.from_pretrained(adapter))
    if isinstance(model, PeftModel):
        tuned = model
        tuned.add_adapter(name, config)
        tuned.load_adapter(adapter, name)
    else:
        tuned = PeftModel.from_pretrained(model, adapter, name, config=config)
    expected = set(get_peft_model_state_dict(tuned, adapter_name=name))
    if stored != expected:
        wrong = sorted(stored ^ expected)
        raise UserError(
            "the adapter's tensors must be the model's",
            f"{len(wrong)} differ, first {wrong[0]}",
            "use the base model that the adapter was trained on",
            str(weights),
        )
    return tuned.eval()


def use_adapter(model: Any, name: str | None) -> None:
    """Make the model compute with that adapter; with None, as its base does."""
    if name is not None:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name, inference_mode=True)
    elif hasattr(model, "peft_config"):
        model.base_model.disable_adapter_layers()
