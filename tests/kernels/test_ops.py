"""Exact: torch's own checks of the operators. No worse than plain: gradients against float64."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.kernels import attention, dequantize, elementwise, ops
from onecard.kernels.cpu.library import library
from onecard.kernels.dequantize import SAVE_COPY, SAVE_NOTHING, SAVE_SHAPE, dequantize_to_scratch
from onecard.nn.embedding import Head
from onecard.quant.state import PackedWeight

N, K, R = 96, 160, 8


def make(dtype=torch.float32, bias=True, separate=False, seed=0):
    """Everything that a 4-bit linear with LoRA takes."""
    torch.manual_seed(seed)
    packed, state = ops.quantize_4bit(torch.randn(N, K, dtype=dtype))
    x = torch.randn(3, 7, K, dtype=dtype, requires_grad=True)
    A = torch.randn(R, K, requires_grad=True)
    B = torch.randn(N, R, requires_grad=True)
    b = torch.randn(N, dtype=dtype, requires_grad=True) if bias else None
    x_lora = torch.randn(3, 7, K, dtype=dtype, requires_grad=True) if separate else None
    return x, packed, state, b, A, B, x_lora


def flat(x, packed, state, b, A, B, x_lora, save=SAVE_NOTHING):
    return x, *PackedWeight.of(packed, state), b, A, B, 0.5, x_lora, save


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_opcheck(bias, separate, lora):
    operator = torch.ops.onecard.qlora_linear.default
    x, packed, state, b, A, B, x_lora = make(bias=bias, separate=separate)
    if not lora:
        A = B = x_lora = None
    for save in (SAVE_NOTHING, SAVE_COPY):
        torch.library.opcheck(operator, flat(x, packed, state, b, A, B, x_lora, save))
    few, few_lora = (t if t is None else t[:1, :1].detach().bfloat16().requires_grad_() for t in (x, x_lora))
    for arguments in (
        flat(x, packed, state, b, A, B, x_lora, SAVE_SHAPE),  # a NaN, which is no equal of itself for other checks
        flat(few, packed, state, b, A, B, few_lora, SAVE_COPY),  # no weight is dequantized
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_dequantize():
    _, packed, state, *_ = make()
    args = (*PackedWeight.of(packed, state), torch.bfloat16)
    torch.library.opcheck(torch.ops.onecard.dequantize_4bit.default, args)


def test_compile_has_no_graph_break():
    x, packed, state, b, A, B, _ = make()
    compiled = torch.compile(
        lambda x: ops.qlora_linear(x, packed, state, b, A, B, 0.5), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), ops.qlora_linear(x, packed, state, b, A, B, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("learning", [False, True])
def test_the_head_compiles_without_a_graph_break(dtype, rows, learning):
    head = Head(torch.nn.Linear(64, 128, bias=False, dtype=dtype))
    head.weight.requires_grad_(False)
    x = torch.randn(rows, 64, dtype=dtype, requires_grad=learning)
    with torch.set_grad_enabled(learning):
        compiled = torch.compile(head, fullgraph=True, backend="aot_eager")(x)
    exact = x.double() @ head.weight.double().T
    bound = (65 * 2**-24 + torch.finfo(dtype).eps) * (x.double().abs() @ head.weight.double().abs().T)
    assert ((compiled - exact).abs() <= bound).all()


def test_a_weight_of_another_device_goes_to_no_kernel():
    """Its address means nothing to one."""
    x, W = torch.randn(1, 64), torch.empty(128, 64, device="meta")
    with torch.no_grad():
        assert not elementwise.has_dense_product(x, W) and not elementwise.has_tiles(x, W)
        assert elementwise.has_dense_product(x, torch.empty(128, 64)) == (library() is not None)


def plain(x, W, b, A, B, x_lora):
    seen = x if x_lora is None else x_lora
    y = x @ W.T + 0.5 * (seen @ A.T) @ B.T
    return y if b is None else y + b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("separate", [True, False])
def test_no_worse_than_plain(dtype, separate):
    x, packed, state, b, A, B, x_lora = make(dtype, separate=separate)
    g = torch.randn(3, 7, N, dtype=dtype)
    leaves = [t for t in (x, b, A, B, x_lora) if t is not None]
    y = ops.qlora_linear(x, packed, state, b, A, B, 0.5, x_lora)
    ours = [y, *torch.autograd.grad(y, leaves, g)]

    def reference(to):
        moved = {id(t): t.detach().to(to).requires_grad_() for t in leaves}
        W = ops.dequantize_4bit(packed, state, torch.float32).to(to)
        take = [None if t is None else moved[id(t)] for t in (x, b, A, B, x_lora)]
        out = plain(take[0], W, *take[1:])
        return [out, *torch.autograd.grad(out, list(moved.values()), g.to(to))]

    exact, same = reference(torch.float64), reference(dtype)
    for mine, truth, theirs in zip(ours, exact, same):
        floor = truth.abs().max() * torch.finfo(dtype).eps  # one rounding of the largest value
        assert (mine.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


def test_nothing_is_saved_of_W():
    x, packed, state, b, A, B, _ = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.qlora_linear(x, packed, state, b, A, B, 0.5)
    assert not any(t.numel() == N * K and t.is_floating_point() for t in saved)
    assert any(t.shape == x.shape for t in saved) and any(t.shape == (21, R) for t in saved)


def test_results_can_be_changed_in_place():
    """As falcon adds its attention's output to its MLP's."""
    W = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    packed, state = ops.quantize_4bit(W)
    x = torch.ones(2, 1024, 64, requires_grad=True)
    y = ops.qlora_linear(x, packed, state)
    y += 1
    y.sum().backward()
    W = ops.dequantize_4bit(packed, state).double()
    bound = 512 * 2**-24 * W.abs().sum(0)  # a float32 sum of 512 terms
    assert ((x.grad.double() - W.sum(0)).abs() <= bound).all()


def test_a_scratch_buffer_is_that_of_a_stream(monkeypatch):
    """Not of a thread: the backward's thread launches on the stream of the forward."""
    _, packed, state, *_ = make()
    monkeypatch.setattr(dequantize, "_scratch", {})

    def address(stream):
        monkeypatch.setattr(dequantize, "stream_of", lambda device: stream)
        with dequantize_to_scratch(PackedWeight.of(packed, state), torch.float32) as W:
            return W.data_ptr()

    with ThreadPoolExecutor(1) as other:
        assert address(1) == address(1) == other.submit(address, 1).result()
    assert address(1) != address(2) and len(dequantize.scratch_buffers()) == 2


def test_threads_in_one_stream_at_the_same_time_do_not_share_a_buffer(monkeypatch):
    monkeypatch.setattr(dequantize, "_scratch", {})
    made = [ops.quantize_4bit(torch.full((n, 64), float(n))) for n in (8, 16, 24, 32)]
    together = Barrier(len(made), timeout=60)

    def values(packed, state):
        with dequantize_to_scratch(PackedWeight.of(packed, state), torch.float32) as W:
            together.wait()  # all are in their bodies
            return W.unique().tolist()

    with ThreadPoolExecutor(len(made)) as threads:
        assert list(threads.map(values, *zip(*made))) == [[n] for n in (8, 16, 24, 32)]
    (kept,) = dequantize.scratch_buffers()
    assert kept.numel() == 4 * 32 * 64  # the largest


def everything_on_the_cpu():
    """A call of each kernel that makes its own results."""
    generator = torch.Generator("cpu").manual_seed(0)
    x, W, A, B, g = (
        torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").bfloat16()
        for shape in ((33, 64), (96, 64), (8, 64), (96, 8), (33, 96))
    )
    packed, state = ops.quantize_4bit(W)
    given = [t.clone().requires_grad_() for t in (x, A, B)]
    y = ops.qlora_linear(given[0], packed, state, None, *given[1:])
    q = x.view(1, 33, 4, 16).transpose(1, 2)
    return [
        packed, y, *torch.autograd.grad(y, given, g), ops.qlora_linear(x[:1], packed, state),
        ops.cross_entropy_(x.clone(), packed.view(-1)[:33].long() % 64), *elementwise.rms_norm(x, x[0].clone(), 1e-5),
        elementwise.dense_product(x[:1], W), attention.attention(q, q, q, [0, 33], 0.25, None),
    ]  # fmt: skip


def test_torchs_defaults_change_nothing():
    # The C++ kernels write float32 on the CPU: memory of another default dtype would be too small for it.
    expected = everything_on_the_cpu()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            found = everything_on_the_cpu()
    finally:
        torch.set_default_dtype(before)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize(
    "hip, version, expected",
    [(None, "2.9.1", "float32"), ("6.4", "2.9.1+rocm6.4", "bfloat16"), ("7.1", "2.10.0+rocm7.1", "float32")],
)
def test_a_gradient_is_a_float32_product_where_torch_has_one(hip, version, expected, monkeypatch):
    """torch 2.9 on ROCm has none and raises RuntimeError."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "__version__", version)
    with FakeTensorMode():
        a = torch.empty(4, 4, dtype=torch.bfloat16, device="cuda")
        assert ops.wide_product(a, a).dtype == getattr(torch, expected)
