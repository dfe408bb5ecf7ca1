"""Pack documents into rows by first fit, and convert rows to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from onecard.config import ROW_MULTIPLE
from onecard.data.chat.mask import IGNORE, Example
from onecard.kernels.cpu.library import call, library


def pack(lengths: NDArray[np.int32], max_seq_length: int) -> NDArray[np.int32]:
    """Put each document, in the given order, into the first row with room (first fit).

    A tree over the rows' free tokens finds that row in O(log n). Ten million documents take about ten seconds in C++.

    Args:
        lengths: int32 (documents,), each in 1 ... max_seq_length.

    Returns:
        the number of each document's row, int32 (documents,). Rows are numbered in the order of their first documents.
    """
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= max_seq_length), (lengths.min(), lengths.max())
    size = 1 << max(0, len(lengths) - 1).bit_length()
    if library() is None:
        return first_fit(lengths, max_seq_length, size)
    documents, row_of = torch.from_numpy(lengths), torch.empty(len(lengths), dtype=torch.int32)
    free = torch.empty(2 * size, dtype=torch.int32)
    call("onecard_first_fit", documents, len(lengths), max_seq_length, free, size, row_of)
    return row_of.numpy()


def packed(lengths: Sequence[int], max_seq_length: int) -> list[list[int]]:
    """Return the documents of each row, in the order of `pack`."""
    row_of = pack(np.array(lengths, np.int32), max_seq_length).tolist()
    rows: list[list[int]] = [[] for _ in range(max(row_of, default=-1) + 1)]
    for document, row in enumerate(row_of):
        rows[row].append(document)
    return rows


def first_fit(lengths: NDArray[np.int32], max_seq_length: int, size: int) -> NDArray[np.int32]:
    """Do the same as onecard_first_fit (csrc/interface.cpp)."""
    free = [max_seq_length] * (2 * size)  # a node is the maximum of the free tokens below it
    row_of = np.empty(len(lengths), dtype=np.int32)
    for index, length in enumerate(lengths.tolist()):
        node = 1
        while node < size:
            node = 2 * node if free[2 * node] >= length else 2 * node + 1
        row_of[index] = node - size
        free[node] -= length
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return row_of


def collate(examples: Sequence[Example], multiple_of: int = 1) -> dict[str, Any]:
    """Concatenate documents into one row. A last masked document fills it to a multiple of `multiple_of` tokens.

    Returns:
        input_ids, labels, position_ids: int64 (1, T), positions starting at 0 in each document;
        cu_seqlens: list of int, 0 and the documents' ends;
        documents_per_example: 2 for pairs of answers, whose documents stand side by side, else 1.
    """
    input_ids, labels, positions, ends = [], [], [], [0]
    for example in examples:
        input_ids += example.input_ids
        # Its first token is never predicted: the token before it is of another document. But a head may read there.
        labels += [IGNORE if example.class_name is None else example.labels[0], *example.labels[1:]]
        for length in example.lengths:
            positions += range(length)
            ends.append(ends[-1] + length)
    batch = {
        "input_ids": torch.tensor([input_ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "cu_seqlens": ends,
        "documents_per_example": len(examples[0].lengths),
    }
    return padded_batch(batch, multiple_of)


def split(batch: dict[str, Any], max_tokens: int | None) -> list[dict[str, Any]]:
    """Cut a batch at the ends of examples into parts of at most max_tokens tokens. A longer example is its own part.

    Parts without a supervised token are dropped. The others are filled in the same way as the loader's rows. Documents
    never attend to each other, so the sum of the parts' losses is the loss of the whole batch. The two documents of a
    pair stay in one part.
    """
    total = batch["cu_seqlens"][-1]
    if max_tokens is None or total <= max_tokens:
        return [batch]
    ends = batch["cu_seqlens"][:: batch["documents_per_example"]]
    ends += [total] * (ends[-1] < total)  # a filler is one document
    cuts = [0]
    for begin, end in zip(ends, ends[1:]):
        if end - cuts[-1] > max_tokens and begin > cuts[-1]:
            cuts.append(begin)
    parts = []
    for first, last in zip(cuts, [*cuts[1:], total]):
        labels = batch["labels"][:, first:last]
        if (labels != IGNORE).any():
            pieces = {key: batch[key][:, first:last] for key in ("input_ids", "position_ids")}
            inside = [end - first for end in batch["cu_seqlens"] if first <= end <= last]
            number = [index for begin, index in zip(ends, batch.get("indices", ())) if first <= begin < last]
            part = {**batch, **pieces, "labels": labels, "cu_seqlens": inside, "indices": number}
            parts.append(padded_batch(part, ROW_MULTIPLE))
    return parts


def padded_batch(batch: dict[str, Any], multiple_of: int) -> dict[str, Any]:
    """Fill a batch to a multiple of tokens with a last masked document, which repeats the batch's last token.

    It is not a padding token: its embedding may be zero, where the root of a mean square has no gradient.
    """
    total = batch["cu_seqlens"][-1]
    filler = -total % multiple_of
    if not filler:
        return batch
    last = {"input_ids": batch["input_ids"][:, -1:].repeat(1, filler), "position_ids": torch.arange(filler)[None]}
    last["labels"] = torch.full((1, filler), IGNORE)
    joined = {key: torch.cat([batch[key], tensor], 1) for key, tensor in last.items()}
    return {**batch, **joined, "cu_seqlens": [*batch["cu_seqlens"], total + filler]}
