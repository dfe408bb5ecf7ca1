"""Exact: recomputed layers draw the random numbers of their forward, and save random states only if they draw any."""

from functools import partial

import pytest
import torch
from torch.utils import checkpoint as torch_checkpoint

from onecard.train.recompute import Recomputed

PLAIN = partial(torch_checkpoint.checkpoint, use_reentrant=False)


def gradients(call, layer, x, steps=3):
    """The gradient of x in each of several steps, from one seed, with numbers drawn between forward and backward."""
    torch.manual_seed(0)
    found = []
    for _ in range(steps):
        x.grad = None
        y = call(layer, x)
        torch.rand(3)
        y.square().sum().backward()
        found.append(x.grad)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_recomputed_layer_draws_what_its_forward_drew(dropout, monkeypatch):
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(dropout), torch.nn.Tanh())
    x = torch.randn(4, 8, requires_grad=True)
    saved = []

    def inner(*args, preserve_rng_state):
        saved.append(preserve_rng_state)
        return PLAIN(*args, preserve_rng_state=preserve_rng_state)

    recomputed = Recomputed(inner)
    with torch.no_grad():
        recomputed(layer, x)  # tells nothing: nothing is recomputed
    assert recomputed.is_random is None
    for found, expected in zip(gradients(recomputed, layer, x), gradients(lambda f, x: f(x), layer, x), strict=True):
        assert torch.equal(found, expected)
    assert saved == [True, True, *[dropout > 0] * 2]


def test_a_layer_that_failed_at_first_tells_nothing():
    def fails(x):
        raise torch.OutOfMemoryError("no memory")

    recomputed = Recomputed(PLAIN)
    with pytest.raises(torch.OutOfMemoryError):
        recomputed(fails, torch.ones(1, requires_grad=True))
    assert recomputed.is_random is None
