"""Exact: bytes of blocks, read by the gguf package. Bound: errors beside rounding with the largest weight's scale."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from onecard.export.gguf.blocks import LAYOUTS, OURS, PLACES, TABLE, codes_of, quantize
from onecard.export.gguf.scales import affine_scales, signed_scales

AFFINE = {Kind.Q4_K: 15, Kind.Q5_K: 31}  # the largest code
SIGNED = {Kind.Q6_K: 31, Kind.Q3_K: 3, Kind.IQ4_NL: 113}  # of the smaller side, which both signs have


def dequantized(raw, kind, shape):
    return torch.from_numpy(gguf.dequantize(raw.reshape(shape[0], -1), kind)).view(shape)


def by_definition(blocks, kind, importance=None):
    """d c q - dmin b of our own codes. Products of F16 with integers are exact in float32, so only the difference is
    rounded."""
    found = codes_of(blocks, kind, importance)
    q = TABLE[found.codes.long()] if kind == Kind.IQ4_NL else found.codes
    x = (found.d * found.scales).unsqueeze(1) * q
    if found.dmin is not None:
        x = x - (found.dmin * found.mins).unsqueeze(1)
    return x.flatten(0, 1).T


def rounded(W, kind):
    """Each group rounded to nearest with a scale of float32 that its largest weight needs; no other loss."""
    size = gguf.GGML_QUANT_SIZES[kind][0] // LAYOUTS[kind].groups
    x = W.view(-1, size)
    if kind in AFFINE:
        low = x.amin(1, True).clamp(max=0)
        s = (x.amax(1, True) - low) / AFFINE[kind]
        return ((x - low) / s).round().mul(s).add(low).view(W.shape)
    s = x.abs().amax(1, True) / SIGNED[kind]
    if kind != Kind.IQ4_NL:
        return (x / s).round().mul(s).view(W.shape)
    return TABLE[((x / s).unsqueeze(2) - TABLE).abs().argmin(2)].mul(s).view(W.shape)


def hard_rows():
    """Rows (24, 512) of many kinds: zeros, one value, one sign, outliers, subnormal F16, close to F16's end."""
    W = torch.randn(24, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    W[1], W[2], W[3, :256] = 0.0, 0.5, -0.25
    W[4], W[5], W[6, ::32] = W[4].abs(), -W[5].abs(), 3.0
    W[7], W[8], W[9] = W[7] * 1e-5, W[8] * 1e-30, W[9] * 6e5
    W[10], W[11, 5:] = 1e-42, 0.0
    return W


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.name)
def test_the_gguf_package_reads_our_codes(kind):
    W, size = hard_rows(), gguf.GGML_QUANT_SIZES[kind][0]
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2)) ** 4
    importance[64:128] = 0.0
    by_row = importance.expand(24, -1).reshape(-1, size)
    for given, by_block in [(None, None)] * (kind in OURS) + [(importance, by_row)]:
        found = dequantized(quantize(W, kind, given), kind, W.shape)
        assert torch.equal(found.view(-1, size), by_definition(W.view(-1, size), kind, by_block))
        assert found.isfinite().all() and (found[1] == 0).all()
        assert ((found[2] - 0.5).abs() <= 0.5 * 2**-6).all()  # half a step of a scale of 6 bits, a bit below its end


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.name)
def test_errors_are_less_than_those_of_rounding_to_nearest(kind):
    """On Gaussian weights, although our scales have few bits and theirs are float32. With the weights of the errors
    that the search has, and without.

    No code of R bits a weight has a relative error under 2^-R (Shannon, on Gaussian weights).
    """
    W = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3)) * 0.02
    found, plain = dequantized(quantize(W, kind), kind, W.shape) - W, rounded(W, kind) - W
    assert found.norm() < 0.95 * plain.norm()
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    assert found.norm() / W.norm() > 2 ** (-8 * nbytes / values)


def test_the_number_of_threads_changes_no_bit():
    W = torch.randn(96, 2048, generator=torch.Generator().manual_seed(4))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(quantize(W, Kind.Q4_K))
    finally:
        torch.set_num_threads(before)
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("kind, n", [(Kind.Q3_K, 4), (Kind.Q6_K, 32), (Kind.IQ4_NL, 127)])
def test_signed_scales_are_close_to_the_best(kind, n):
    """Against 800 scales of each block, in float64, with weights of the errors."""
    x, w = torch.randn(2, 16, 60, generator=torch.Generator().manual_seed(5))
    w, places = w.square() + 0.1, PLACES if kind == Kind.IQ4_NL else None

    def code(q):
        return TABLE[(q[..., None] - TABLE).abs().argmin(-1)] if places is not None else q.round_().clamp_(-n, n - 1)

    def weighted(s):
        return ((code(x / s) * s - x).double().square() * w).sum(0)

    found = weighted(signed_scales(x, w, n, code, places))
    tried = x.abs().amax(0) / n * torch.linspace(0.5, 1.6, 400)[:, None]
    best = torch.stack([weighted(s) for s in (*tried, *-tried)]).amin(0)
    assert found.sum() < 1.05 * best.sum()


def test_affine_scales_are_close_to_the_best():
    """Against 60 x 60 scales and minima of each block, in float64."""
    n = 15
    x, w = torch.randn(2, 32, 40, generator=torch.Generator().manual_seed(6))
    w = w.square() + 0.1

    def weighted(s, m):
        return ((((x + m) / s).round().clamp(0, n) * s - m - x).double().square() * w).sum(0)

    found = weighted(*affine_scales(x, w, n))
    low, span = -x.amin(0), x.amax(0) - x.amin(0)
    shares = torch.linspace(0.7, 1.1, 60)
    best = torch.stack([weighted(span * a / n, low * b) for a in shares for b in shares]).amin(0)
    assert found.sum() < 1.1 * best.sum()  # the search has one dimension: 5 % of the error


def test_q4_0_without_importance_has_the_packages_bytes():
    """Also of several largest magnitudes of both signs, and of rows whose scale is no F16."""
    ties = torch.randint(-3, 4, (64, 512), generator=torch.Generator().manual_seed(1)).float()
    for W in (hard_rows()[:10], ties):
        assert (quantize(W, Kind.Q4_0) == gguf.quantize(W.numpy(), Kind.Q4_0).reshape(-1)).all()
