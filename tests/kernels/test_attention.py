"""No worse than plain: packed attention and its gradients against float64, beside torch's own in the same dtype.
Exact: the bits at any thread count, and torch's checks of the operator."""

import pytest
import torch

from onecard.hf import attention as plain
from onecard.kernels import attention as kernel
from onecard.kernels.cpu.library import library
from tests.kernels.cpu.test_native import isa  # noqa: F401

pytestmark = pytest.mark.skipif(library() is None, reason="built without a compiler")
CASES = [
    (4, 2, 16, [0, 5], None),
    (3, 1, 64, [0, 64, 70, 200], None),
    (2, 2, 80, [0, 130], 50),
    (4, 1, 32, [0, 1, 2, 300], 7),
    (6, 3, 128, [0, 129], None),
]


def exact(q, k, v, cu_seqlens, scale, window):
    """The definition, document by document."""
    pieces, group = [], q.shape[1] // k.shape[1]
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        at = torch.arange(end - start)
        distance = at[:, None] - at[None]
        seen = (distance >= 0) & (distance < (window or end - start))
        keys, values = (t[:, :, start:end].repeat_interleave(group, 1) for t in (k, v))
        scores = q[:, :, start:end] @ keys.transpose(2, 3) * scale
        pieces.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(1, 2))
    return torch.cat(pieces, 1)


def inputs(H, G, D, T, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, T, h, D, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for h in (H, G, G)]


def with_gradients(call, inputs):
    out = call(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("H, G, D, cu_seqlens, window", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_torch(isa, dtype, H, G, D, cu_seqlens, window, monkeypatch):  # noqa: F811
    """|error| <= 2 |torch's error| + 8 roundings of float32, in the Euclidean norm."""
    given = inputs(H, G, D, cu_seqlens[-1], dtype)
    wide = [x.detach().double().requires_grad_() for x in given]
    truth = with_gradients(lambda *x: exact(*x, cu_seqlens, 0.3, window), wide)
    ours = with_gradients(lambda *x: kernel.attention(*x, cu_seqlens, 0.3, window), given)
    monkeypatch.setattr(kernel, "supports", lambda *x: False)
    torchs = with_gradients(
        lambda *x: plain.packed_attention(torch.nn.Identity(), *x, None, 0.3, 0.0, cu_seqlens, window)[0], given
    )
    for a, b, c in zip(ours, torchs, truth):
        assert (a - c).norm() <= 2 * (b - c).norm() + 8 * 2**-24 * c.norm()


def test_any_thread_count_gives_the_same_bits():
    given = inputs(6, 2, 64, 300)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(with_gradients(lambda *x: kernel.attention(*x, [0, 100, 300], 0.125, None), given))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_opcheck():
    arguments = (*inputs(4, 2, 16, 20), [0, 7, 20], 0.25, 0)
    torch.library.opcheck(torch.ops.onecard.attention.default, arguments)


def test_scores_far_apart_stay_finite():
    q, k, v = (torch.full((1, 1, 70, 16), fill) for fill in (100.0, 50.0, 1.0))
    k[0, 0, ::2] *= -1
    out = kernel.attention(q, k, v, [0, 70], 1.0, None)
    assert torch.equal(out, torch.ones(1, 70, 1, 16))
