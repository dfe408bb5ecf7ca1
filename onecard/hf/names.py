"""By which names a checkpoint holds a model's parameters: transformers renames some as it loads, and makes others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


def stored_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The checkpoint's name of each parameter that it holds as the model does, by the model's name.

    Args:
        model: transformers' model, its weights may be on the meta device.
        names: the checkpoint's tensors; of a weight in 4 bits that of its codes.
    """
    conversions, own = get_model_conversion_mapping(model), model.state_dict()
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    found = {}
    for name in sorted(names, key=dot_natural_key):  # in transformers' order, which some renamings rest on
        key, source = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if key not in own and name in own:
            key, source = rename_source_key(name, [], [], model.base_model_prefix, own)
        if key in own and source is None:  # else a converter makes it
            found[key] = name
    return found
