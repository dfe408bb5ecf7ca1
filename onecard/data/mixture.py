"""Which examples of several sources a mixture takes: lists of indices.

Without weights, each source is taken whole. With weights, source i has the share w_i of the mixture's examples:

    taken_i = n_j w_i / w_j,   rounded,

where the source j that is taken whole has the smallest n/w (`first_exhausted`: no example is taken twice), or the
largest (`all_exhausted`: each example is taken, and those of the other sources several times). The names are those of
`datasets.interleave_datasets`, which draws the sources at random. Here the counts are exact, and the seed alone says
which examples are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch


def mixed(sizes: Sequence[int], weights: Sequence[float], stopping_strategy: str, seed: int) -> list[list[int]]:
    """Return the indices that the mixture takes of each source, sorted.

    Args:
        sizes: number of examples of each source.
        weights: share of each source; empty: all examples, once.
    """
    if not weights:
        return [list(range(size)) for size in sizes]
    pick = min if stopping_strategy == "first_exhausted" else max
    exact = [Fraction(weight) for weight in weights]
    whole = pick(range(len(sizes)), key=lambda source: sizes[source] / exact[source])
    counts = [max(1, round(sizes[whole] * weight / exact[whole])) for weight in exact]
    return [chosen(size, count, seed * 1_000_003 + at) for at, (size, count) in enumerate(zip(sizes, counts))]


def chosen(size: int, count: int, seed: int) -> list[int]:
    """Choose `count` of `size` indices at random. Each is chosen as often as any other one, or once more."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
    return sorted([*range(size)] * (count // size) + order[: count % size])
