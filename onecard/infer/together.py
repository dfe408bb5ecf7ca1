"""One forward pass that feeds a token of each of several answers: the codes of the base are read once for all of them.

The tokens are one row, (1, B). Linears, norms and the head see B tokens. Each token has its own position, and attends
to the cache of its own answer only. So there is no padding, an answer joins or leaves between any two passes, and an
answer's attention is the one that it has alone. Products of B rows may round in another order: in float32 that changes
a token only if two logits are equal to about seven digits.

Before a model's first such pass, its logits are compared with those of each answer alone. If they differ, the model's
answers are computed one after the other.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from onecard.hf.attention import supports_packing, use_together_attention
from onecard.infer.check import agree, bound_of
from onecard.infer.decoding import CachedContext, OneByOne, Uncached
from onecard.infer.graphs import make_context
from onecard.memory.measure import is_out_of_memory
from onecard.nn.embedding import device_of

PROBE = ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10], [11])  # prompts
NEXT = ([12, 13, 14], [15, 16, 17])  # a token of each, twice

_takes: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # of each model, set at its first question


@torch.no_grad()
def feed_together(model: Any, contexts: list[CachedContext], tokens: list[int]) -> Tensor:
    """Append one token to each context. Return the logits of the next ones, (B, V) float32.

    A failure leaves the contexts with a part of the layers appended: clear them.
    """
    assert not model.training, "a cache needs a model in eval mode"
    device = device_of(model)
    for context in contexts:
        context.reserve_token()
    positions_1B = torch.tensor([[len(context.tokens) for context in contexts]], device=device)
    with use_together_attention(model):
        out = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=positions_1B,
            use_cache=False,
            caches=contexts,
        )
    for context, token in zip(contexts, tokens):
        context.tokens.append(token)
    return out.logits[0].float()


@torch.no_grad()
def takes_together(model: Any) -> bool:
    """Whether `feed_together` gives the logits of each answer alone."""
    if model not in _takes:
        _takes[model] = gives_the_same(model)
    return _takes[model]


def gives_the_same(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    contexts = [make_context(model) for _ in PROBE]
    if isinstance(contexts[0], (OneByOne, Uncached)) or not supports_packing(base):
        return False
    alone, bound = [make_context(model) for _ in PROBE], bound_of(model)
    try:
        for context, other, ids in zip(contexts, alone, PROBE):
            context.feed(list(ids))
            other.feed(list(ids))
        for tokens in NEXT:
            expected = torch.cat([context.feed([token]) for context, token in zip(alone, tokens)])
            found = feed_together(model, contexts, list(tokens))
            if not all(agree(a, b, bound) for a, b in zip(found, expected)):
                return False
    except Exception as error:  # the model's own code takes no such row
        if is_out_of_memory(error):
            raise
        return False
    return True
