"""Checks on a few tokens that a loaded model runs, predicts the next token, and continues from a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onecard.config import CACHE_PROBE
from onecard.errors import UserError, first_line
from onecard.hf.head import is_headed
from onecard.infer.decoding import CachedContext, OneByOne, Uncached
from onecard.memory.measure import is_out_of_memory
from onecard.nn.embedding import device_of
from onecard.nn.linear import Linear4bit

SEEN = 0.01  # of the logits' norm: rounding cannot change earlier positions by so much
MAX_RELATIVE_ERROR = 2**-4  # of the logits' norm: roundings of every layer add up; a lost context changes all of it
FLOAT32 = 1e-3  # the same bound in float32, where only the order of the sums differs
DO = "docs/families.md names the families that train"


@torch.no_grad()
def check_computes(model: Any, ids: Tensor) -> None:
    """Raise UserError unless the model runs on a document in train and eval mode, and a position's logits depend
    neither on later tokens nor on their number.

    Args:
        model: transformers' own, with the adapters inside.
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
        whole, changed, part = (outputs(model, x) for x in (ids, other, ids[:, :-1]))
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


def outputs(model: Any, ids: Tensor) -> Tensor:
    """Return each position's logits, or, for a model with a classification head, its hidden state: (T, V) or (T, H)."""
    if is_headed(model.config):
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    return model(input_ids=ids, use_cache=False).logits[0]


@torch.no_grad()
def context_of(model: Any) -> type[CachedContext]:
    """Return the first of CachedContext and OneByOne whose logits equal those without a cache, else Uncached.

    Some families need another kind of cache, and ignore ours without an error.

    Raises:
        UserError: same as `check_computes`.
    """
    tokens = [token for piece in CACHE_PROBE for token in piece]
    ids = torch.tensor([tokens], device=device_of(model))
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
    """Whether a context's logits after each piece of the probe agree with `whole`, (1, T, V), from a single pass."""
    end = 0
    try:
        for piece in CACHE_PROBE:
            end += len(piece)
            if not agree(context.feed(piece), whole[:, end - 1], bound):
                return False
    except Exception as error:  # the model needs another kind of cache
        if is_out_of_memory(error):
            raise
        return False
    return True


def bound_of(model: Any) -> float:
    """Return the relative error that logits may have when products had other shapes."""
    dtypes = {m.compute_dtype for m in model.modules() if isinstance(m, Linear4bit)} or {model.dtype}
    return FLOAT32 if dtypes == {torch.float32} else MAX_RELATIVE_ERROR


def agree(found: Tensor, expected: Tensor, bound: float) -> bool:
    found, expected = found.float(), expected.float()
    return bool((found - expected).norm() <= bound * expected.norm())
