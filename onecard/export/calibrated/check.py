"""Compares a model that runs one decoder layer at a time with its own forward, before anything is made from such a run.

A model may pass more between its layers than hidden states, or ignore the documents' ends in a packed row. Nothing else
would show it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onecard.config import LOSS_PROBE_TOKENS
from onecard.data.chat.mask import IGNORE, Example
from onecard.data.packing import collate
from onecard.errors import UserError, first_line
from onecard.export.calibrated.layers import LayeredModel
from onecard.memory.measure import is_out_of_memory

CLOSE = 1e-4  # of two losses in float32, of 46 tokens


@torch.no_grad()
def check_layers(layered: LayeredModel, examples: Sequence[Example]) -> None:
    """Compare the losses of two short documents, layer by layer, with those of the model's own forward, in float32. If
    they differ in one row, each document gets a row of its own.

    Raises:
        UserError: they differ in rows of their own, too.
    """
    two = [*examples[:2], examples[0]][:2]
    length = min(LOSS_PROBE_TOKENS, *(len(example.input_ids) for example in two))
    ids = [example.input_ids[:length] for example in two]
    documents = [Example(piece, [IGNORE, *piece[1:]], "probe") for piece in ids]
    before, layered.dtype, why = layered.dtype, torch.float32, ""
    expected = None
    try:
        for is_packed in sorted({layered.is_packed, False}, reverse=True):
            layered.is_packed = is_packed
            try:
                expected = own_loss(layered, torch.tensor(ids)) if expected is None else expected
                found = layered_loss(layered, [documents] if is_packed else [documents[:1], documents[1:]])
            except (UserError, OSError):
                raise
            except Exception as error:  # a model's code may ask for anything of its layers
                if is_out_of_memory(error):
                    raise
                why = f"{type(error).__name__}: {first_line(error)}"
                continue
            if abs(found - expected) <= CLOSE * max(1.0, abs(expected)):
                return
            why = f"a loss of {found:.5f} layer by layer, and of {expected:.5f} as a whole"
    finally:
        layered.dtype = before
    raise layered.refused(why)


def layered_loss(layered: LayeredModel, documents: list[list[Example]]) -> float:
    """Return the mean loss of rows of documents, run layer by layer."""
    batches = [collate(row) for row in documents]
    rows = layered.first_rows(batches)
    for index, _, module in layered.each():
        layered.advance(index, module, rows)
    with layered.recorded(with_head=True) as recorders:
        sums, counts = zip(*layered.losses(rows, batches, recorders[-1]))
    return sum(sums) / sum(counts)


def own_loss(layered: LayeredModel, ids: Tensor) -> float:
    """Return the mean loss of documents of one length, (B, T), by the model's own forward. Each layer is loaded when it
    is called, and freed when it has returned."""
    hooks = []
    for name, module in layered.layers.items():
        hooks.append(module.register_forward_pre_hook(lambda module, args, name=name: layered.load(module, name)))
        hooks.append(module.register_forward_hook(lambda module, args, out: module.to("meta") and None))
    try:
        with layered.rest_loaded(with_head=True):
            logits = layered.model(input_ids=ids.to(layered.device), use_cache=False).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(logits.device)))
