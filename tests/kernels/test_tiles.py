"""The linear on AMX tiles. Exact: the weight that it multiplies with, and the bits at any thread count. Bound from the
maths: outputs and gradients against float64."""

import pytest
import torch

from onecard.kernels import elementwise, ops
from onecard.kernels.cpu import native
from onecard.kernels.cpu.library import call, library
from onecard.kernels.dequantize import SAVE_NOTHING
from onecard.kernels.reference import Lora
from onecard.quant.state import PackedWeight

pytestmark = pytest.mark.skipif(
    library() is None or not call("onecard_has_linear"), reason="this CPU or build has no AMX"
)


def quantized(N, K, **options):
    """The weight of a random 4-bit weight, and what it stands for, bfloat16 (N, K)."""
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05
    packed, state = ops.quantize_4bit(W, **options)
    return PackedWeight.of(packed, state), ops.dequantize_4bit(packed, state, torch.bfloat16)


def random(*shape, seed=1, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("N, K", [(32, 32), (96, 672), (544, 64), (1056, 96)])
@pytest.mark.parametrize("options", [
    {}, {"double_quant": False}, {"blocksize": 32}, {"blocksize": 4096}, {"quant_type": "fp4"}, {"quant_type": "int4"}
], ids=str)  # fmt: skip
def test_the_weight_is_that_of_dequantize(N, K, options):
    """x the identity: every sum has one term that is not zero."""
    weight, W = quantized(N, K, **options)
    y, _ = native.linear(torch.eye(K, dtype=torch.bfloat16), weight, None)
    assert torch.equal(y, W.T)
    grad_x, *rest = native.linear_backward(torch.eye(N).bfloat16(), weight, [True] * 4)
    assert torch.equal(grad_x, W)
    assert rest == [None] * 3


@pytest.mark.parametrize("M, N, K, R", [(17, 32, 64, 8), (33, 96, 672, 16), (512, 576, 96, 40), (1100, 64, 32, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("separate", [False, True])
def test_within_the_bound(M, N, K, R, dtype, separate):
    """One rounding of the result to bfloat16, those of A, B, x A^T and g B, and float32's along the depth."""
    weight, W = quantized(N, K)
    x, g, bias, scaling = random(M, K), random(M, N, seed=2), random(N, seed=3), 1.7
    A, B = random(R, K, seed=4, dtype=dtype), random(N, R, seed=5, dtype=dtype)
    seen = random(M, K, seed=6) if separate else x
    y, xA = native.linear(x, weight, bias, Lora(A, B, scaling), seen)
    grads = native.linear_backward(g, weight, [True] * 4, Lora(A, B, scaling), seen, xA, separate)

    def exact(size):
        """y, xA and the gradients in float64; with size the sums of absolute values instead."""
        wide = [t.double().abs() if size else t.double() for t in (x, g, bias, A, B, seen, W)]
        x_, g_, bias_, A_, B_, seen_, W_ = wide
        term, gB = scaling * (seen_ @ A_.T) @ B_.T, scaling * g_ @ B_
        return x_ @ W_.T + term + bias_, seen_ @ A_.T, g_ @ W_, gB @ A_, gB.T @ seen_, scaling * g_.T @ (seen_ @ A_.T)

    names = ["y", "xA", "grad_x", "grad_x_lora", "grad_A", "grad_B"]
    true, size = dict(zip(names, exact(False))), dict(zip(names, exact(True)))
    found = dict(zip(names, (y, xA, *grads)))
    if not separate:
        true["grad_x"] += true.pop("grad_x_lora")
        size["grad_x"] += size["grad_x_lora"]
        assert found.pop("grad_x_lora") is None
    for name, value in true.items():
        rounding = 2**-9 * 4 + 2**-24 * (M + N + K + R)
        assert ((found[name].double() - value).abs() <= rounding * size[name]).all(), name
        # the roundings are as often up as down: in the norm they nearly cancel
        assert (found[name].double() - value).norm() <= 2**-7 * value.norm(), name


def test_what_is_not_wanted_is_not_made():
    weight, _ = quantized(64, 96)
    x, A, B = random(40, 96), random(8, 96), random(64, 8)
    _, xA = native.linear(x, weight, None, Lora(A, B, 2.0))
    for needs in ([True, False, False, False], [False, False, True, True], [True, True, False, True]):
        grads = native.linear_backward(random(40, 64), weight, needs, Lora(A, B, 2.0), x, xA, needs[1])
        assert [grad is not None for grad in grads] == needs


def test_any_thread_count_gives_the_same_bits():
    weight, _ = quantized(288, 352)
    x, g, A, B = random(200, 352), random(200, 288), random(16, 352), random(288, 16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y, xA = native.linear(x, weight, None, Lora(A, B, 2.0))
        found.append((y, xA, *native.linear_backward(g, weight, [True] * 4, Lora(A, B, 2.0), x, xA)))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(found[0], other))


def test_the_operator_takes_it():
    """qlora_linear's own gradients agree with those of torch's products, and torch's products still work after it."""
    weight, W = quantized(96, 128)
    leaves = [random(5, 8, 128), random(4, 128, dtype=torch.float32), random(96, 4, dtype=torch.float32)]
    results = []
    for compute in ("tiles", "plain"):
        x, A, B = (t.clone().requires_grad_() for t in leaves)
        if compute == "tiles":
            y, *_ = torch.ops.onecard.qlora_linear(x, *weight, None, A, B, 2.0, None, SAVE_NOTHING)
        else:
            y = x @ W.T + 2 * (x @ A.bfloat16().T) @ B.bfloat16().T
        y.backward(torch.ones_like(y))
        results.append((y, x.grad, A.grad, B.grad))
    for ours, plain in zip(*results):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        assert (ours.float() - plain.float()).norm() <= 0.02 * plain.float().norm()


@torch.no_grad()
@pytest.mark.parametrize("N", [352, 48032], ids=["small", "a head's, whose gradient is not copied whole"])
def test_a_dense_weight(N):
    W, x, g = random(N, 96), random(3, 30, 96, seed=2), random(3, 30, N, seed=3)
    assert (
        elementwise.has_tiles(x, W) and not elementwise.has_tiles(x.float(), W) and not elementwise.has_tiles(x, W[:31])
    )
    bias = random(N, seed=4)
    y, grad_x = elementwise.tiled_product(x, W, bias), elementwise.tiled_product_back(g, W)
    for found, true in ((y, x.double() @ W.double().T + bias.double()), (grad_x, g.double() @ W.double())):
        assert found.shape == true.shape
        assert (found.double() - true).norm() <= 2**-8 * true.norm()
