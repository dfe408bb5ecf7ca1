"""First-fit packing of documents into rows, and rows into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from onecard.data.template import IGNORE, Example


def pack(lengths: Sequence[int], max_seq_length: int) -> list[list[int]]:
    """First fit: each document into the first row with room, in the order given.

    A tree over the rows' free tokens finds that row in O(log n), so 100,000 documents take about a second.

    Returns:
        for each row the indices of its documents, in order of arrival.
    """
    size = 1 << max(0, len(lengths) - 1).bit_length()
    free = [max_seq_length] * (2 * size)  # a node holds the most free tokens below it
    rows: list[list[int]] = []
    for index, length in enumerate(lengths):
        assert 0 < length <= max_seq_length, (index, length)
        node = 1
        while node < size:
            node = 2 * node if free[2 * node] >= length else 2 * node + 1
        row = node - size
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        free[node] -= length
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return rows


def collate(examples: Sequence[Example], multiple_of: int = 1) -> dict[str, Any]:
    """Documents side by side in one row; a last document of nothing fills it up to `multiple_of` tokens.

    Returns:
        input_ids, labels, position_ids: int64 (1, T), positions starting at 0 in each document;
        cu_seqlens: list of int, 0 and the documents' ends.
    """
    input_ids, labels, positions, ends = [], [], [], [0]
    for example in examples:
        input_ids += example.input_ids
        labels += [IGNORE, *example.labels[1:]]  # never predicted: what comes before is another document
        positions += range(len(example.input_ids))
        ends.append(len(input_ids))
    filler = -len(input_ids) % multiple_of
    if filler:
        input_ids += [0] * filler
        labels += [IGNORE] * filler
        positions += range(filler)
        ends.append(len(input_ids))
    return {
        "input_ids": torch.tensor([input_ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "cu_seqlens": ends,
    }


def split(batch: dict[str, Any], num_parts: int) -> list[dict[str, Any]]:
    """A batch cut at documents' ends into at most num_parts batches of about as many tokens; those with nothing to
    learn are left out. Documents never attend to each other, so the sum of the parts' losses is the whole's."""
    if num_parts == 1:
        return [batch]
    ends, total = batch["cu_seqlens"][1:], batch["cu_seqlens"][-1]
    cuts = sorted({min(ends, key=lambda end: abs(end - total * part // num_parts)) for part in range(1, num_parts)})
    parts = []
    for first, last in zip([0, *cuts], [*cuts, total]):
        labels = batch["labels"][:, first:last]
        if (labels != IGNORE).any():
            pieces = {key: batch[key][:, first:last] for key in ("input_ids", "position_ids")}
            inside = [end - first for end in batch["cu_seqlens"] if first <= end <= last]
            parts.append({**pieces, "labels": labels, "cu_seqlens": inside})
    return parts
