"""No worse than plain: RMSNorm, SwiGLU and the in-place cross-entropy, with their gradients, against float64 and
beside torch in the same dtype."""

import pytest
import torch
from torch.nn import functional as F

from onecard.kernels import elementwise, ops, reference
from onecard.kernels.cpu.library import library
from tests.kernels.cpu.test_native import isa  # noqa: F401

pytestmark = pytest.mark.skipif(library() is None, reason="built without a compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm(x, w):
    wide = x if x.dtype == torch.float64 else x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def with_gradients(call, inputs, grad=None):
    given = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*given)
    grad = random(*out.shape, seed=9).to(out.dtype) if grad is None else grad
    return out, *torch.autograd.grad(out, given, grad)


def check(ours, torchs, truth):
    """|error| <= 2 |torch's error| + 8 roundings of float32, in the Euclidean norm."""
    for a, b, c in zip(ours, torchs, truth):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + 8 * 2**-24 * c.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 576), (64, 64)])
def test_rms_norm(isa, dtype, shape):  # noqa: F811
    x, w = random(*shape).to(dtype), random(shape[-1], seed=1).to(dtype)
    check(
        with_gradients(lambda x: elementwise.rms_norm(x, w, EPS)[0], [x]),
        with_gradients(lambda x: norm(x, w), [x]),
        with_gradients(lambda x: norm(x, w.double()), [x.double()]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 576)])
@pytest.mark.parametrize("adds", [True, False])
def test_residual_norm(isa, dtype, shape, adds):  # noqa: F811
    """The sum is torch's to the bit; both of the norm's results have a gradient, or either alone."""
    x, delta = random(*shape).to(dtype), random(*shape, seed=3).to(dtype)
    w, g = random(shape[-1], seed=1).to(dtype), random(*shape, seed=4)

    def ours(x, delta):
        return elementwise.residual_norm(x, delta if adds else None, w, EPS)

    def plain(x, delta):
        total = x + delta if adds else x
        return total, norm(total, w.to(total.dtype))

    assert torch.equal(ours(x, delta)[0], plain(x, delta)[0])
    for of in (0, 1, 2):

        def gradients(call, dtype, of=of):
            given = [t.to(dtype).requires_grad_() for t in (x, delta)]
            total, y = call(*given)
            total, y = total * 1, y * 1  # as what comes behind would use them
            (total if of == 0 else y if of == 1 else 2 * total + y).backward(g.to(dtype))
            return [y.detach(), *(t.grad for t in given if t.grad is not None)]

        check(gradients(ours, dtype), gradients(plain, dtype), gradients(plain, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 5, 1536)])
def test_swiglu(isa, dtype, shape):  # noqa: F811
    gate, up = 4 * random(*shape).to(dtype), random(*shape, seed=1).to(dtype)

    def plain(gate, up):
        return F.silu(gate) * up

    check(
        with_gradients(elementwise.swiglu, [gate, up]),
        with_gradients(plain, [gate, up]),
        with_gradients(plain, [gate.double(), up.double()]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_of_large_gates(isa, dtype):  # noqa: F811
    """Where exp leaves float32's range on either side: the dtype's rounding, float32's below it, and 0 for 2^-100."""
    gate = torch.tensor([-3e4, -1e3, -200, -178, -100, -90, -89, -88, -87, 87, 88, 89, 90, 200, 1e3, 3e4]).to(dtype)
    up = torch.full_like(gate, 0.75)
    ours = with_gradients(elementwise.swiglu, [gate, up], up)
    truth = with_gradients(lambda a, b: F.silu(a) * b, [gate.double(), up.double()], up.double())
    for found, exact in zip(ours, truth):
        bound = (torch.finfo(dtype).eps / 2 + 8 * 2**-24) * exact.abs() + 2**-100
        assert ((found - exact).abs() <= bound).all(), (found, exact)


@pytest.mark.parametrize("where", [0, 5, 18])
def test_nan_is_not_lost(isa, where):  # noqa: F811
    logits = random(1, 19)
    logits[0, where] = float("nan")
    assert ops.cross_entropy_(logits, torch.tensor([3])).isnan().all() and logits.isnan().all()
    gate = random(19)
    gate[where] = float("nan")
    assert elementwise.swiglu(gate, torch.ones(19)).isnan().nonzero().tolist() == [[where]]


def turned(x, cos, sin):
    """x (B, H, T, D) as transformers' Llama writes it."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, H, T, D, angles", [(1, 1, 1, 2, 1), (1, 3, 5, 64, 1), (2, 4, 7, 80, 1), (2, 1, 33, 32, 2)])
def test_rope(isa, dtype, B, H, T, D, angles):  # noqa: F811
    """The two halves of the angles differ, so that each is seen to meet its own."""
    x = random(B, T, H, D).to(dtype).transpose(1, 2)
    cos, sin = random(angles, T, D, seed=1).to(dtype), random(angles, T, D, seed=2).to(dtype)
    check(
        with_gradients(lambda x: elementwise.rope(x, cos, sin), [x]),
        with_gradients(lambda x: turned(x, cos, sin), [x]),
        with_gradients(lambda x: turned(x, cos.double(), sin.double()), [x.double()]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 1000])
def test_cross_entropy_in_place(isa, dtype, vocab):  # noqa: F811
    logits = (5 * random(9, vocab)).to(dtype)
    target = torch.arange(9) % vocab
    found, plain, exact = logits.clone(), logits.clone(), logits.double()
    losses = ops.cross_entropy_(found, target)
    torchs = reference.cross_entropy_(plain, target)
    truth = F.cross_entropy(exact, target, reduction="none")
    gradient = exact.softmax(-1) - F.one_hot(target, vocab)
    check((losses, found), (torchs, plain), (truth, gradient))


def test_large_logits_stay_finite(isa):  # noqa: F811
    logits = torch.tensor([[3e38, -3e38, 0.0] * 8, [-3e38] * 24])
    losses = ops.cross_entropy_(logits, torch.tensor([0, 0]))
    assert torch.isfinite(logits).all() and torch.isfinite(losses).all()


def test_opcheck():
    x, w = random(4, 32).requires_grad_(), random(32)
    torch.library.opcheck(torch.ops.onecard.rms_norm.default, (x, w, EPS))
    torch.library.opcheck(torch.ops.onecard.add_norm.default, (x.detach(), random(4, 32, seed=1), w, EPS))
    torch.library.opcheck(torch.ops.onecard.swiglu.default, (x, random(4, 32).requires_grad_()))
    heads = random(2, 3, 5, 32).requires_grad_()
    torch.library.opcheck(torch.ops.onecard.rope.default, (heads, random(1, 5, 32), random(1, 5, 32), False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N, K", [(1, 5, 3), (1, 300, 576), (4, 33, 130)])
def test_dense_product(isa, dtype, M, N, K):  # noqa: F811
    """float32 sums of K exact products, rounded once to the dtype: (K + 2) 2^-24 sum |x w|, and one rounding."""
    x, W = random(M, K).to(dtype), random(N, K, seed=1).to(dtype)
    exact = x.double() @ W.double().T
    bound = (K + 2) * 2**-24 * (x.double().abs() @ W.double().abs().T) + torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((elementwise.dense_product(x, W) - exact).abs() <= bound).all()
