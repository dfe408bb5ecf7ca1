"""Whether a loaded model computes at all, predicts the next token, and goes on from a cache: tried on a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onecard.config import CACHE_PROBE
from onecard.errors import UserError, first_line
from onecard.infer.decoding import CachedContext, OneByOne, Uncached
from onecard.memory.measure import is_out_of_memory
from onecard.nn.linear import Linear4bit

SEEN = 0.01  # of the logits' norm: a change of earlier positions that rounding cannot make
MAX_RELATIVE_ERROR = 2**-4  # of the logits' norm: roundings of every layer add up; a lost context changes all of it
FLOAT32 = 1e-3  # as much where all is computed in float32, its sums in another order
DO = "docs/families.md names the families that train"


@torch.no_grad()
def check_computes(model: Any, ids: Tensor) -> None:
    """Raise UserError unless the model runs on a document, in training and out of it, and never looks ahead: what a
    position gives rests neither on later tokens nor on their number.

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
        whole, changed, part = (model(input_ids=x, use_cache=False).logits[0] for x in (ids, other, ids[:, :-1]))
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        found = f"{family}: {type(error).__name__}: {first_line(error)}"
        must = f"the model's own code must run on a document of {ids.shape[1]} tokens"
        raise UserError(must, found, DO, "model") from error
    finally:
        model.train(training)
    if not agree(changed[:-1], whole[:-1], SEEN) or not agree(part, whole[:-1], bound_of(model)):
        found = f"{family}, whose earlier positions change with what follows"
        do = "if it is a decoder stored as an encoder, set is_decoder to true in a copy of config.json"
        raise UserError("the model must predict each token from those before it", found, do, "config.json")


@torch.no_grad()
def context_of(model: Any) -> type[CachedContext]:
    """The first of three ways to go on after a prompt whose logits are those without a cache.

    Some families want a cache of another kind, and pass ours by without a word.

    Raises:
        UserError: as check_computes.
    """
    tokens = [token for piece in CACHE_PROBE for token in piece]
    ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
    try:
        whole = model(input_ids=ids, use_cache=False).logits
        for kind in (CachedContext, OneByOne):
            if gives(kind(model), whole, bound_of(model)):
                return kind
    except Exception as error:
        if is_out_of_memory(error):
            raise
    check_computes(model, ids)
    return Uncached


def gives(context: CachedContext, whole: Tensor, bound: float) -> bool:
    """Whether a context's logits behind each piece of the probe are those of the whole, (1, T, V)."""
    end = 0
    try:
        for piece in CACHE_PROBE:
            end += len(piece)
            if not agree(context.feed(piece), whole[:, end - 1], bound):
                return False
    except Exception as error:  # it wants something else of its cache
        if is_out_of_memory(error):
            raise
        return False
    return True


def bound_of(model: Any) -> float:
    """By how much of their norm logits may differ where products had other shapes."""
    dtypes = {m.compute_dtype for m in model.modules() if isinstance(m, Linear4bit)} or {model.dtype}
    return FLOAT32 if dtypes == {torch.float32} else MAX_RELATIVE_ERROR


def agree(found: Tensor, expected: Tensor, bound: float) -> bool:
    found, expected = found.float(), expected.float()
    return bool((found - expected).norm() <= bound * expected.norm())
