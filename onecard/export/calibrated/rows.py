"""The rows that a calibration runs: the user's data and general text, to calibrate on and to measure on.

General text is a part of both, so that the base does not narrow to the data: the beginnings of the topics of Python's
own help, which every machine has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onecard.data.chat.mask import IGNORE, Example, text_ids
from onecard.data.dataset import Dataset
from onecard.errors import UserError
from onecard.export.calibrated.calibration import SEED, count_tokens, first_batches
from onecard.export.calibrated.layers import Batch

GENERAL_SHARE = 4  # one token of general text for so many of the user's
MEASURED_TOKENS, MEASURED_GENERAL_TOKENS = 4096, 1024
HELD_OUT = 0.1  # share of the rows that is measured if there is no validation data
PIECE_TOKENS = 256  # of a piece of general text


@dataclass
class Rows:
    """Packed rows by their use: calibration, measured rows of the data and of general text.

    Attributes:
        measured: the documents of `data`; `measured_on`: what they are.
    """

    calibration: list[Batch]
    data: list[Batch]
    general: list[Batch]
    measured: Dataset
    measured_on: str


def choose_rows(
    training: Dataset, validation: Dataset | None, tokenizer: Any, is_packed: bool, num_tokens: int
) -> Rows:
    """Choose the rows. No measured row is a calibration row, unless the data is a single row.

    Args:
        validation: measured if given; else a part of the training rows is held out.
        num_tokens: of calibration rows of the data. Those of general text are in addition.
    """
    held, measured_on = validation, "validation rows"
    if held is None and len(training.examples) > 1:
        training, held = training.split(HELD_OUT, SEED)
        measured_on = "rows held out of the calibration"
    elif held is None:
        held, measured_on = training, "the row of the calibration"
    length = training.max_seq_length
    pieces = general_pieces(tokenizer, min(length, PIECE_TOKENS))

    def rows(examples: Sequence[Example], most: int) -> tuple[list[Batch], list[int]]:
        return first_batches(examples, length, is_packed, num_tokens=most)

    calibration, _ = rows(training.examples, num_tokens)
    general, _ = rows(pieces[::2], count_tokens(calibration) // GENERAL_SHARE)
    data, indices = rows(held.examples, MEASURED_TOKENS)
    other, _ = rows(pieces[1::2], MEASURED_GENERAL_TOKENS)
    documents = held.take(indices)
    return Rows(calibration + general, data, other, documents, measured_on)


def general_pieces(tokenizer: Any, most: int) -> list[Example]:
    """Return pieces of general text, of at most so many tokens: the beginnings of the topics of Python's own help."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        must, do = "Python must have its own help, which is the general text", "install Python's whole standard library"
        raise UserError(must, str(error), do, "pydoc_data") from None
    pieces = []
    for topic in sorted(topics):
        ids = text_ids(topics[topic][: 16 * most], tokenizer, "general text")[:most]
        if len(ids) > 1:
            pieces.append(Example(ids, [IGNORE, *ids[1:]], topic))
    return pieces
