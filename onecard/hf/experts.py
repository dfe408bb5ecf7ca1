"""Finds a checkpoint's tensors of stacked expert weights: separate tensors for each expert, or one for all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Place:
    """The part of a stacked weight that a checkpoint tensor holds.

    Attributes:
        stack: the stacked weight's name in transformers' model.
        expert: the expert's number. None: the tensor is the whole stack.
        part, num_parts: index and count among that expert's tensors, which are concatenated.
    """

    stack: str
    expert: int | None = None
    part: int = 0
    num_parts: int = 1


def expert_places(model: Any, stacks: Iterable[str], names: Iterable[str]) -> dict[str, Place]:
    """Return the tensors among a checkpoint's `names` that form `stacks`, with experts in their order."""
    conversions, known = get_model_conversion_mapping(model), set(stacks)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter) and only_stacks(c.operations)]
    sources = {source: converter.source_patterns for converter in converters for source in converter.source_patterns}
    places: dict[str, Place] = {}
    counts: dict[tuple[str, str], int] = {}
    for name in sorted(names, key=dot_natural_key):
        stack, source = rename_source_key(name, renamings, converters)
        if stack in known and source is None:
            places[name] = Place(stack)
        elif stack in known and source is not None:
            expert = counts.setdefault((stack, source), 0)
            counts[stack, source] += 1
            places[name] = Place(stack, expert, sources[source].index(source), len(sources[source]))
    return places


def only_stacks(operations: list[Any]) -> bool:
    """Whether a converter only concatenates the tensors of each expert and stacks the experts."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


class GatherExperts(ConversionOps):
    """Replaces transformers' stacking: it returns a tuple of tensors for each expert, without a copy."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        parts = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
        complete = len(parts) == len(source_patterns) and len({len(part) for part in parts}) == 1
        return {kwargs["full_layer_name"]: list(zip(*parts)) if complete else []}
