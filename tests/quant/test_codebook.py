"""Bound from the maths: the codebooks follow from their definitions."""

import pytest
import torch

from onecard.quant.codebook import ASCENDING, CODES, NF4, decision_bounds, derive_nf4, dynamic_map, quant_map


def test_nf4_is_the_normal_distributions_quantiles():
    # The published constants were made with a float32 linspace, whose rounding (2^-24) the quantile function's
    # slope, at most 14 at the tail, and the division by the largest level, 1.85, leave below 14 * 2^-24 / 1.85.
    error = (derive_nf4() - torch.tensor(NF4, dtype=torch.float64)).abs().max()
    assert error <= 14 * 2**-24 / 1.85


@pytest.mark.parametrize("quant_type", list(CODES))
def test_ascending_sorts_the_levels(quant_type):
    levels = quant_map(quant_type)[list(ASCENDING[quant_type])]
    assert (levels.diff() >= 0).all()
    assert sorted(ASCENDING[quant_type]) == list(range(16))
    bounds, _ = decision_bounds(quant_type)
    assert torch.equal(bounds, (levels[:-1] + levels[1:]) / 2)


def test_zero_and_the_ends_are_exact():
    for quant_type in CODES:
        levels = quant_map(quant_type).tolist()
        assert 0.0 in levels and 1.0 in levels and -1.0 in levels


def test_int4_is_uniform_and_nf4_is_denser_around_zero():
    int4 = quant_map("int4").double()
    assert (int4.diff() - 1 / 7).abs().max() <= 2**-24
    assert quant_map("nf4")[7:9].diff() < 1 / 7 < quant_map("nf4")[14:16].diff()


def test_dynamic_map_has_256_levels_and_an_exact_zero_and_one():
    levels = dynamic_map()
    assert levels.numel() == levels.unique().numel() == 256
    assert levels[127] == 0 and levels[255] == 1
