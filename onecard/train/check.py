"""Whether a loaded model computes at all, and is one that predicts the next token: tried on one short document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onecard.errors import UserError
from onecard.hf.load import first_line
from onecard.train.step import is_out_of_memory

SEEN = 0.01  # of the logits' size: a change of earlier positions that rounding cannot make
DO = "docs/families.md names the families that train"


@torch.no_grad()
def check_computes(model: Any, ids: Tensor) -> None:
    """Raise UserError unless the model runs on a document, in training and out of it, and never looks ahead.

    Args:
        model: transformers' own, adapters inside it.
        ids: int64 (1, T), T at least 2.
    """
    training, family = model.training, model.config.model_type
    other = ids.clone()
    other[0, -1] = (
        ids[0, 0] if ids[0, 0] != ids[0, -1] else (ids[0, -1] + 1) % model.config.get_text_config().vocab_size
    )
    try:
        model.train()
        model(input_ids=ids, use_cache=False)
        model.eval()
        before, after = (model(input_ids=x, use_cache=False).logits[0, :-1].float() for x in (ids, other))
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        found = f"{family}: {type(error).__name__}: {first_line(error)}"
        raise UserError("the model's code must run with its linears in 4 bits", found, DO, "model") from error
    finally:
        model.train(training)
    if (after - before).norm() > SEEN * before.norm():
        found = f"{family}, whose earlier positions see later tokens"
        do = "if it is a decoder stored as an encoder, set is_decoder to true in a copy of config.json"
        raise UserError("the model must predict each token from those before it", found, do, "config.json")
