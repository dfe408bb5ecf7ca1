"""The checkpoint's names of a model's parameters. transformers renames some at the load, and makes others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


def stored_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the checkpoint's name of each parameter that it stores unconverted, by the model's name.

    Args:
        model: transformers' model; its weights may be on the meta device.
        names: the checkpoint's tensors; for a 4-bit weight, the name of its codes.
    """
    conversions, own = get_model_conversion_mapping(model), model.state_dict()
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    found = {}
    for name in sorted(names, key=dot_natural_key):  # in transformers' order; some renamings depend on it
        key, source = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if key not in own and name in own:
            key, source = rename_source_key(name, [], [], model.base_model_prefix, own)
        if key in own and source is None:  # else a converter makes it
            found[key] = name
    return found
