"""Exact: the Triton kernels under Triton's interpreter give quant/'s bits in float32 (its bfloat16 cast truncates, so
16-bit outputs are compared on a GPU only)."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from onecard.errors import UserError
from onecard.kernels import reference
from onecard.kernels.triton import codec, product
from onecard.kernels.triton import elementwise as triton_rows
from onecard.quant.blockwise import make_state
from onecard.quant.codebook import decision_bounds
from onecard.quant.dynamic import quantize_8bit
from onecard.quant.state import PackedWeight
from tests.kernels.cpu.test_native import bits, weights
from tests.kernels.test_elementwise import norm, with_gradients

ON_GPU = torch.cuda.is_available()  # else conftest.py has turned the interpreter on
DEVICE = "cuda" if ON_GPU else "cpu"
PLAIN = (torch.float32, torch.float64)
OUTPUTS = [torch.float32, torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]
pytestmark = pytest.mark.gpu if ON_GPU else []
DTYPES = {"nf4": torch.float32, "fp4": torch.bfloat16, "int4": torch.float16}
SLOW = [] if ON_GPU else pytest.mark.slow  # the interpreter takes three seconds each


def on_device(weight):
    return PackedWeight(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in weight))


@pytest.mark.parametrize(
    "quant_type, dtype",
    [pytest.param(q, d, marks=[] if DTYPES[q] == d else SLOW) for q in DTYPES for d in DTYPES.values()],
    ids=str,
)
def test_quantize_is_bit_equal(quant_type, dtype):
    for W in weights(dtype):
        if dtype == torch.bfloat16 and not ON_GPU and 0 < W.abs().max() < 1e-38:
            continue  # the interpreter takes denormal bfloat16 for zero
        for blocksize in (32, 64, 1024):
            packed, absmax = codec.quantize_blocks(W.to(DEVICE), quant_type, blocksize, "W")
            expected_packed, expected_absmax = reference.quantize_blocks(W, quant_type, blocksize, "W")
            assert torch.equal(packed.cpu(), expected_packed)
            assert torch.equal(bits(absmax.cpu()), bits(expected_absmax))


def test_a_short_block_is_divided_by_its_scale():
    """Where a product with the inverse lies on the other side of a bound."""
    bounds = decision_bounds("nf4", "cpu")[0]
    absmax = 1 + torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0))
    x = bounds * absmax
    apart = ((x / absmax > bounds) != (x * (1 / absmax) > bounds)).nonzero()
    assert len(apart) >= 50
    for row, column in apart[:: len(apart) // 5]:
        tail = torch.cat([absmax[row], x[row, column].view(1), torch.zeros(1)])
        W = torch.cat([torch.ones(64), tail])
        found = codec.quantize_blocks(W.to(DEVICE), "nf4", 64, "W")[0].cpu()
        assert torch.equal(found, reference.quantize_blocks(W, "nf4", 64, "W")[0])


@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_dequantize_is_bit_equal(quant_type, dtype):
    for W in weights(torch.float32):
        for blocksize in (32, 64, 1024):
            packed, absmax = reference.quantize_blocks(W, quant_type, blocksize, "W")
            nested = make_state(absmax, W.shape, W.dtype, quant_type, blocksize, True)
            for scales in ((absmax, None, None), (nested.absmax, nested.nested_absmax, nested.nested_offset)):
                expected = torch.empty(W.shape, dtype=dtype)
                weight = PackedWeight(packed, *scales, quant_type, blocksize, list(W.shape))
                reference.dequantize_into(weight, expected)
                found = torch.empty(W.shape, dtype=dtype, device=DEVICE)
                codec.dequantize_into(on_device(weight), found)
                assert torch.equal(bits(found.cpu()), bits(expected))


@pytest.mark.parametrize("num_rows", [1, 3, 16])
@pytest.mark.parametrize("N, K, blocksize", [(5, 64, 64), (48, 576, 64), (33, 512, 128), (7, 96, 32)])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_k", [64] if ON_GPU else [64, 256])  # the latter is 16-bit x's
def test_product_is_within_its_rounding(num_rows, N, K, blocksize, double_quant, block_k, monkeypatch):
    """float32 sums of K terms: |error| <= (K + 2) 2^-24 sum |x w|; of one row, scaled behind the sums, K + 4."""
    monkeypatch.setitem(product.ROWS, 4, {**product.ROWS[4], "BLOCK_K": block_k})
    generator = torch.Generator().manual_seed(0)
    packed, absmax = reference.quantize_blocks(torch.randn(N, K, generator=generator), "nf4", blocksize, "W")
    state = make_state(absmax, torch.Size((N, K)), torch.float32, "nf4", blocksize, double_quant).to(DEVICE)
    weight = PackedWeight.of(packed.to(DEVICE), state)
    W = torch.empty(N, K, device=DEVICE)
    reference.dequantize_into(weight, W)
    x = torch.randn(num_rows, K, generator=generator).to(DEVICE)
    assert ON_GPU or product.can_multiply(x, blocksize)
    exact = x.double() @ W.double().T
    bound = (K + (4 if num_rows == 1 else 2)) * 2**-24 * (x.double().abs() @ W.double().abs().T)
    assert ((product.multiply(x, weight) - exact).abs() <= bound).all()


@pytest.mark.parametrize("R", [1, 16, 24, 130])
@pytest.mark.parametrize("M", [1, 3])
def test_product_with_a_lora_term_is_within_its_rounding(M, R):
    """The bounds above with K + R terms and a product by s: two roundings more, of the terms' sizes."""
    generator = torch.Generator().manual_seed(0)
    N, K, scaling = 37, 128, 1.7
    packed, absmax = reference.quantize_blocks(torch.randn(N, K, generator=generator), "nf4", 64, "W")
    weight = on_device(PackedWeight(packed, absmax, None, None, "nf4", 64, [N, K]))
    W = torch.empty(N, K, device=DEVICE)
    reference.dequantize_into(weight, W)
    x, xA, B = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((M, K), (M, R), (N, R)))
    exact = x.double() @ W.double().T + scaling * xA.double() @ B.double().T
    sizes = x.double().abs() @ W.double().abs().T + scaling * xA.double().abs() @ B.double().abs().T
    found = product.multiply(x, weight, (xA, B, scaling))
    assert ((found - exact).abs() <= (K + R + (6 if M == 1 else 4)) * 2**-24 * sizes).all()


def worst(ours, torchs, truth):
    """|error| / (2 |torch's error| + 8 roundings of float32), in the Euclidean norm."""
    return max((a - c).norm() / (2 * (b - c).norm() + 8 * 2**-24 * c.norm()) for a, b, c in zip(ours, torchs, truth))


@pytest.mark.parametrize("D", [1, 17, 576])
def test_rms_norm_is_no_worse_than_plain(D):
    x, g, w = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((5, D), (5, D), (D,)))
    moved = [t.to(DEVICE) for t in (x, g, w)]
    total, y, rstd = triton_rows.rms_norm(moved[0], None, moved[2], 1e-5)
    assert total is moved[0]
    grad = triton_rows.rms_norm_backward(moved[1], moved[0], moved[2], rstd, None)
    plain = [with_gradients(lambda x: norm(x, w.to(x.dtype)), [x.to(t)], g.to(t)) for t in PLAIN]
    assert worst([y.cpu(), grad.cpu()], *plain) <= 1
    total, y, rstd = triton_rows.rms_norm(moved[0], moved[1], moved[2], 1e-5)
    assert torch.equal(total.cpu(), x + g)
    grad = triton_rows.rms_norm_backward(moved[1], total, moved[2], rstd, moved[0])
    plain = [with_gradients(lambda t: norm(t, w.to(t.dtype)), [(x + g).to(t)], g.to(t)) for t in PLAIN]
    plain = [(made, back + x.to(back.dtype)) for made, back in plain]
    assert worst([y.cpu(), grad.cpu()], *plain) <= 1


@pytest.mark.parametrize("size", [1, 1500])
def test_swiglu_is_no_worse_than_plain(size):
    gate, up, g = (4 * torch.randn(size, generator=torch.Generator().manual_seed(i)) for i in range(3))
    moved = [x.to(DEVICE) for x in (g, gate, up)]
    ours = [triton_rows.swiglu(*moved[1:]), *triton_rows.swiglu_backward(*moved)]
    silu = torch.nn.functional.silu
    plain = [with_gradients(lambda a, b: silu(a) * b, [gate.to(t), up.to(t)], g.to(t)) for t in PLAIN]
    assert worst([x.cpu() for x in ours], *plain) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("odd", [0, 1], ids=["aligned", "off by an element"])
def test_product_in_16_bits_is_within_its_rounding(dtype, M, odd):
    """A tensor core's tile has the weight rounded to x's dtype."""
    N, K = 37, 128
    random = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    packed, absmax = reference.quantize_blocks(random, "nf4", 64, "W")
    W = torch.empty(N, K, dtype=torch.float32 if M == 1 else dtype)
    weight = PackedWeight(packed, absmax, None, None, "nf4", 64, [N, K])
    reference.dequantize_into(weight, W)
    x = torch.randn(M * K + odd, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)[odd:].view(M, K)
    found = product.multiply(x, on_device(weight)).cpu()
    exact, sizes = x.cpu().double() @ W.double().T, x.cpu().double().abs() @ W.double().abs().T
    assert ((found - exact).abs() <= (K + 4) * 2**-24 * sizes).all()


@pytest.mark.parametrize("H, D, P", [(1, 2, 1), (3, 64, 5), (5, 96, 10), (40, 128, 10)])
def test_rope_is_no_worse_than_plain(H, D, P):
    T = 10
    x, g = (torch.randn(T, H, D, generator=torch.Generator().manual_seed(i)) for i in range(2))
    cos, sin = (torch.randn(P, D, generator=torch.Generator().manual_seed(2 + i)) for i in range(2))
    moved = [t.to(DEVICE) for t in (cos, sin)]
    ours = [triton_rows.rope(x.to(DEVICE), *moved, False), triton_rows.rope(g.to(DEVICE), *moved, True)]

    def plain(x):
        c, s = (t.repeat(T // P, 1)[:, None].to(x.dtype) for t in (cos, sin))
        return x * c + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * s

    assert worst([y.cpu() for y in ours], *[with_gradients(plain, [x.to(t)], g.to(t)) for t in PLAIN]) <= 1


@pytest.mark.parametrize("vocab", [1, 7, 5000])
def test_cross_entropy_in_place(vocab):
    """|error| <= 2 |torch's error| + 8 roundings of float32, in the Euclidean norm."""
    logits = 5 * torch.randn(9, vocab, generator=torch.Generator().manual_seed(0))
    target = torch.arange(9) % vocab
    found, plain = logits.to(DEVICE), logits.clone()
    losses = codec.cross_entropy_(found, target.to(DEVICE))
    torchs = reference.cross_entropy_(plain, target)
    truth = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    gradient = logits.double().softmax(-1) - torch.nn.functional.one_hot(target, vocab)
    for a, b, c in ((losses.cpu(), torchs, truth), (found.cpu(), plain, gradient)):
        assert (a - c).norm() <= 2 * (b - c).norm() + 8 * 2**-24 * max(c.norm(), 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [(3, 4), (9, 12)], ids=["a whole block", "the last, short one"])
def test_not_finite_is_an_error(bad, where):
    W = torch.randn(10, 13, device=DEVICE)
    W[where] = bad
    with pytest.raises(UserError, match=rf"\[{where[0]}, {where[1]}\]"):
        codec.quantize_blocks(W, "nf4", 64, "some.weight")


def test_every_launch_is_on_its_tensors_device(monkeypatch):
    """Triton takes the thread's current device, which with cuda:1 is another one."""
    of = torch.cuda.device_of
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x.device.type) or of(x))
    W = torch.ones(4, 64, device=DEVICE)
    packed, absmax = codec.quantize_blocks(W, "nf4", 64, "W")
    weight = PackedWeight(packed, absmax, None, None, "nf4", 64, [4, 64])
    codec.dequantize_into(weight, torch.empty_like(W))
    product.multiply(W[:1], weight)
    product.multiply(W[:2], weight)
    triton_rows.rope(W.view(4, 1, 64), W, W, False)
    codec.cross_entropy_(W.clone(), torch.zeros(4, dtype=torch.int64, device=DEVICE))
    _, y, rstd = triton_rows.rms_norm(W, None, W[0], 1e-5)
    triton_rows.rms_norm_backward(y, W, W[0], rstd, None)
    triton_rows.swiglu_backward(triton_rows.swiglu(W, W), W, W)
    states = [x.to(DEVICE) for signed in (True, False) for x in quantize_8bit(torch.ones(256), signed)]
    codec.adamw_8bit_([(W, W.clone(), *states)], reference.Rates.of(1, 1e-2, (0.9, 0.999), 1e-8, 0.1))
    assert seen == [DEVICE] * 11


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one():
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    packed, absmax = codec.quantize_blocks(W.to("cuda:1"), "nf4", 64, "W")
    expected = reference.quantize_blocks(W, "nf4", 64, "W")
    assert torch.equal(packed.cpu(), expected[0]) and torch.equal(absmax.cpu(), expected[1])
