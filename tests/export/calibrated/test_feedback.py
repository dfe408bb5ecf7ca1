"""Codes and scales chosen for a linear's inputs, against the definitions in float64.

Exact: plain cases, pieces. Bound from the maths: the low-rank start. No worse than plain: output errors.
"""

import pytest
import torch

from onecard.config import StoredConfig
from onecard.export.calibrated import feedback
from onecard.export.calibrated.feedback import (
    DAMPING,
    SHARES,
    Factor,
    choose_codes,
    choose_scales,
    column_weights,
    low_rank,
    quantize,
    quantize_with_start,
)
from onecard.kernels import ops
from onecard.quant.blockwise import nearest_codes, unpack
from onecard.quant.codebook import CODES
from onecard.quant.scales import state_absmax
from tests.export.calibrated.test_calibrated import correlated, output_error

TYPES = ("nf4", "fp4", "int4")


def weight(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.1


def damped(H):
    """H as `Factor` has it, float64."""
    H = H.double().clone()
    mean = H.diagonal().mean()
    H.diagonal()[H.diagonal() == 0] = mean
    return H + DAMPING * mean * torch.eye(len(H)).double()


@pytest.mark.parametrize("quant_type", TYPES)
def test_each_code_is_the_best_after_those_before(quant_type):
    """In the order of falling H_kk, against the minimum over all weights that are not rounded yet: with the inverse of
    their Hessian, float64."""
    N, K = 16, 64
    H, _ = correlated(K, 256)
    W, scale = weight(N, K), 0.05 + 0.3 * torch.rand(N, K, generator=torch.Generator().manual_seed(1))
    found = choose_codes(W, scale, Factor.of(H.clone()), quant_type)
    levels = torch.tensor(CODES[quant_type], dtype=torch.float64)
    levels = torch.where(levels.abs() <= 1, levels, torch.inf)
    left, order, exact = W.double().clone(), H.diagonal().argsort(stable=True).flip(0), damped(H)
    differing = 0
    for at, k in enumerate(order):
        inverse = torch.linalg.inv(exact[order[at:]][:, order[at:]])
        values = levels * scale[:, k, None]
        best = (left[:, k, None] - values).abs().argmin(1)
        error = (left[:, k] - values[torch.arange(N), best]) / inverse[0, 0]
        left[:, order[at:]] -= error[:, None] * inverse[:1]
        differing += int((values[torch.arange(N), found[:, k].long()] != values[torch.arange(N), best]).sum())
    assert differing <= 0.005 * W.numel()  # float32 against float64, where a weight is between two levels


@pytest.mark.parametrize("quant_type", TYPES)
def test_without_correlations_the_nearest_code_is_taken(quant_type):
    W, scale = weight(8, 96), torch.full((8, 96), 0.25)
    found = choose_codes(W, scale, Factor.of(torch.eye(96)), quant_type)
    expected = nearest_codes((W / scale).clamp(-1, 1).view(-1), quant_type).view_as(found)
    levels = torch.tensor(CODES[quant_type])
    assert torch.equal(levels[found.long()], levels[expected.long()])


def test_a_block_of_zeros_and_an_input_that_is_always_zero():
    H, _ = correlated(128, 256)  # input 3 is always 0
    W = weight(4, 128)
    W[1, :64] = 0
    packed, state = quantize(W, Factor.of(H), StoredConfig(double_quant=False), "W")
    back = ops.dequantize_4bit(packed, state)
    assert torch.isfinite(back).all() and (back[1, :64] == 0).all() and (back[2] != 0).any()


@pytest.mark.parametrize("blocksize, shape", [(64, (24, 128)), (64, (10, 48)), (128, (7, 33)), (32, (5, 64))])
@pytest.mark.parametrize("quant_type", TYPES)
def test_output_errors_are_below_the_nearest_codes(quant_type, blocksize, shape):
    """Also where a block goes over rows and where the last block is short."""
    N, K = shape
    H, _ = correlated(K, 512)
    W = weight(N, K)
    for nested in (True, False):
        how = StoredConfig(quant_type=quant_type, blocksize=blocksize, double_quant=nested)
        packed, state = quantize(W, Factor.of(H.clone()), how, "W")
        plain, plain_state = ops.quantize_4bit(W, quant_type, blocksize, nested)
        assert packed.shape == plain.shape and state.absmax.shape == plain_state.absmax.shape
        assert (state.shape, state.dtype, state.nested) == (plain_state.shape, plain_state.dtype, nested)
        errors = [output_error(W, ops.dequantize_4bit(*pair), H) for pair in ((packed, state), (plain, plain_state))]
        assert errors[0] < 0.8 * errors[1], (nested, errors)
        codes = unpack(packed, W.numel()).view(N, K)
        if quant_type == "int4":
            assert (codes > 0).all(), "the level below -1 is no choice"


def test_pieces_do_not_change_a_bit(monkeypatch):
    """N = 100 rows in pieces of 32, of which each begins a block and a byte, and in one piece."""
    H, _ = correlated(48, 256)
    W, factor = weight(100, 48), Factor.of(H)
    found = []
    for rows in (1024, 32, 1):
        monkeypatch.setattr(feedback, "PIECE_ROWS", rows)
        found.append(quantize(W, factor, StoredConfig(), "W"))
        assert (len(feedback.row_pieces(100, 48, 64)) > 1) == (rows < 1024)
    for packed, state in found[1:]:
        assert torch.equal(packed, found[0][0]) and torch.equal(state.absmax, found[0][1].absmax)


def test_scales_are_the_best_of_the_shares():
    """Against every share of every block, in float64."""
    H, _ = correlated(64, 256)
    W, weights = weight(12, 64), column_weights(H.diagonal())
    scales = choose_scales(W, weights, StoredConfig(), "W")
    errors = []
    for share in SHARES:
        limit = share * W.abs().amax(1, keepdim=True)
        back = ops.dequantize_4bit(*ops.quantize_4bit(W.clamp(-limit, limit), "nf4", 64, False))
        errors.append(((back - W).double().square() * weights.double()).sum(1))
    best = torch.stack(errors).argmin(0)
    assert torch.equal(scales, SHARES[best] * W.abs().amax(1)) and best.unique().numel() > 2
    exact = damped(H).diagonal()
    assert torch.allclose(weights.double(), exact, rtol=1e-5)


@pytest.mark.parametrize("shape, rank", [((48, 96), 8), ((96, 48), 16), ((8, 96), 16)])
def test_the_start_is_the_best_of_its_rank(shape, rank):
    """Its output error against that of the exact singular vectors in float64, and the form of A."""
    H, _ = correlated(shape[1], 512)
    D = weight(*shape)
    A, B = low_rank(D, Factor.of(H.clone()), rank)
    rank = min(rank, *shape)
    assert A.shape == (rank, shape[1]) and B.shape == (shape[0], rank)
    L = torch.linalg.cholesky(damped(H))
    S = torch.linalg.svdvals(D.double() @ L)
    least = S[rank:].square().sum()
    found = ((D.double() - B.double() @ A.double()) @ L).square().sum()
    assert found <= 1.01 * least + 1e-6 * S.square().sum()
    usual = damped(H).diagonal().mean() / 3  # the mean of a H a^T over values a of the variance 1 / (3 K)
    assert torch.allclose((A.double() @ L).square().sum(1), usual.expand(rank), rtol=1e-3)


def test_codes_and_start_together_are_better_than_either():
    H, _ = correlated(128, 512)
    W, factor, how = weight(64, 128), Factor.of(H.clone()), StoredConfig()
    packed, state, A, B = quantize_with_start(W.bfloat16(), factor, how, "W", 8)
    assert state.dtype == torch.bfloat16 and state.shape == W.shape
    both = output_error(W, ops.dequantize_4bit(packed, state).float() + B @ A, H)
    alone = quantize(W, factor, how, "W")
    D = W - ops.dequantize_4bit(*alone)
    A, B = low_rank(D, factor, 8)
    assert both < output_error(D, B @ A, H) < output_error(W, ops.dequantize_4bit(*alone), H)


def test_scales_are_those_that_a_reader_gets():
    """Double quantization moves the scales; the codes are chosen after it: with H = I each is the nearest for them."""
    W = weight(16, 64)
    packed, state = quantize(W, Factor.of(torch.eye(64)), StoredConfig(), "W")
    scale, levels = state_absmax(state)[:, None], torch.tensor(CODES["nf4"])
    nearest = (W[..., None] - levels * scale[..., None]).abs().amin(-1)
    assert torch.equal((W - ops.dequantize_4bit(packed, state)).abs(), nearest)
