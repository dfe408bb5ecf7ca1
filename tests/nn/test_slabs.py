"""No worse than plain: experts computed together against a plain loop in float64. Exact: slabs of a weight.

torch's grouped product also runs on a CPU, where it is not used. Here it is.
"""

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import onecard
from onecard.kernels import ops
from onecard.kernels.cuda_graph import forbid_device_sync
from onecard.memory.activations import valued, workings
from onecard.memory.plan import plan
from onecard.nn import slabs
from onecard.nn.experts import Experts4bit, ExpertsInTurn, Factors, products
from onecard.nn.slabs import can_group, multiplies_groups, slab_bytes, slab_of, slices
from onecard.quant.state import QuantState
from tests.conftest import make_checkpoint
from tests.nn.test_experts import no_worse

BF16, FP32 = torch.bfloat16, torch.float32
FAMILIES = {
    "mixtral": {"num_local_experts": 6, "intermediate_size": 192},
    "qwen3_moe": {"moe_intermediate_size": 64, "hidden_size": 192},
    "gpt_oss": {"intermediate_size": 192, "num_local_experts": 6},  # biases, (E, K, N), an activation with limits
}
RANK = 3  # which no grouped product takes as it is


@pytest.fixture(autouse=True)
def grouped(monkeypatch):
    monkeypatch.setattr(slabs, "multiplies_groups", lambda *_: True)


@pytest.fixture(scope="module", params=FAMILIES)
def experts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(folder, request.param, num_hidden_layers=1, **FAMILIES[request.param])
    model = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    return next(module for module in model.modules() if isinstance(module, Experts4bit))


def inputs(experts, tokens=40, choices=3):
    """Values of every input of a layer by name. Two experts have no token."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    E, one, other = experts.weights["gate_up_proj"].shape
    d = one if experts.is_transposed else other
    w, index = random(tokens, E - 2).softmax(-1).topk(choices)
    found = {"x": random(tokens, d), "w": w, "g": random(tokens, d), "index": index + (index > 0)}
    for name, weight in experts.weights.items():
        N, K = weight.shape[1:][::-1] if experts.is_transposed else weight.shape[1:]
        found |= {f"{name}.A": 0.1 * random(E, RANK, K), f"{name}.B": 0.1 * random(N, RANK, E)}
    return found


def results(experts, values, dtype, compute, adapted=("gate_up_proj", "down_proj")):
    """The output, and the gradient of every input that has one."""
    names = ["x", "w", *(f"{name}.{part}" for name in adapted for part in "AB")]
    leaves = {name: values[name].to(dtype if name in "xw" else values[name].dtype).requires_grad_() for name in names}
    terms = {name: (1.5, leaves[f"{name}.A"], leaves[f"{name}.B"]) for name in adapted}
    y = compute(experts, leaves["x"], leaves["w"], values["index"], terms)
    grads = torch.autograd.grad(y, list(leaves.values()), values["g"].to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, grads))}


def by(function):
    def compute(experts, x, w, index, terms):
        up, down = (terms.get(name, (1.0, None, None)) for name in experts.weights)
        return function.apply(x, w, index, experts, products, *up, *down)

    return compute


def layer(experts, x, w, index, terms):
    """The module itself, in x's dtype."""
    experts.compute_dtype = x.dtype
    experts.factors = {name: Factors(A, B, scaling) for name, (scaling, A, B) in terms.items()}
    return experts(x, index, w)


def plain(experts, x, w, index, terms):
    """A loop in float64 over experts, with autograd's own gradients."""
    y, x, w = torch.zeros_like(x), x.double(), w.double()
    for e in range(experts.num_experts):
        token, choice = (index == e).nonzero(as_tuple=True)
        rows = x[token]
        for number, (name, weight) in enumerate(experts.weights.items()):
            W = weight.dequantize()[e].double()
            out = rows @ (W if experts.is_transposed else W.T)
            bias = getattr(experts, f"{name}_bias", None)
            out = out if bias is None else out + bias[e].double()
            if name in terms:
                scaling, A, B = terms[name]
                out = out + scaling * (rows @ A[e].double().T) @ B[:, :, e].double().T
            rows = out if number else experts.activate(out)
        y = y.double().index_add(0, token, rows * w[token, choice, None])
    return y


@pytest.mark.parametrize("adapted", [("gate_up_proj", "down_proj"), ("down_proj",), ()])
@pytest.mark.parametrize("dtype, slab", [(FP32, 1 << 28), (FP32, 1), (BF16, 1)])
def test_experts_together_are_no_worse_than_in_turn(experts, adapted, dtype, slab, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_BYTES", slab)
    monkeypatch.setattr(slabs, "PAIRS_AT_ONCE", 50)
    values = inputs(experts)
    values["x"], values["w"] = (values[name].to(dtype).float() for name in "xw")
    exact = results(experts, {**values, "x": values["x"].double()}, torch.float64, plain, adapted)
    in_turn, together = (results(experts, values, dtype, how, adapted) for how in (by(ExpertsInTurn), layer))
    assert all(torch.isfinite(found).all() and found.abs().max() > 0 for found in together.values())
    for name, truth in exact.items():
        assert together[name].dtype == in_turn[name].dtype
        assert no_worse(together[name], in_turn[name], truth.double(), dtype), name


def test_an_expert_without_rows_has_no_gradient(experts, monkeypatch):
    """On a GPU, torch's product leaves the result of an empty group as it was in memory."""
    real = torch.nn.functional.grouped_mm

    def on_a_gpu(a, b, offs):
        found = real(a, b, offs=offs)
        if a.ndim == b.ndim == 2:
            found[offs == torch.nn.functional.pad(offs[:-1], (1, 0))] = float("nan")
        return found

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", on_a_gpu)
    values = inputs(experts)
    found = results(experts, values, FP32, layer)
    empty = torch.ones(experts.num_experts).scatter(0, values["index"].flatten(), 0).bool()
    assert empty.sum() >= 2
    for name in experts.weights:
        assert not found[f"{name}.A"][empty].any() and not found[f"{name}.B"][:, :, empty].any()
        assert found[f"{name}.A"][~empty].any((1, 2)).all()


def test_the_layer_reads_nothing_on_the_host(experts, monkeypatch):
    """On the meta device no tensor has values: a wait for one raises. torch checks the GPU's alignment there."""
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)
    values = {name: tensor.to("meta") for name, tensor in inputs(experts).items()}
    there = copy.deepcopy(experts).to("meta")
    for name, found in results(there, values, BF16, layer).items():
        assert found.is_meta and found.shape == values.get(name, values["x"]).shape, name
    with pytest.raises(RuntimeError):  # in turn, the host reads how many rows an expert has
        results(there, values, BF16, by(ExpertsInTurn))


@pytest.mark.parametrize(
    "quant_type, double_quant",
    [("nf4", True), ("nf4", False), ("mxfp4", False), ("nvfp4", False), ("uint4_zeros", False)],
)
@pytest.mark.parametrize("most", [1, 150_000, 1 << 21])
def test_slabs_are_the_whole_weight(quant_type, double_quant, most, monkeypatch):
    """Each slice of either dimension has the weight's bits, and is as large as allowed."""
    monkeypatch.setattr(slabs, "SLAB_BYTES", most)
    blocksize, generator = {"mxfp4": 32, "nvfp4": 16}.get(quant_type, 64), torch.Generator().manual_seed(0)
    W = torch.randn(5, 192, 320, generator=generator)
    if quant_type in ("nvfp4", "uint4_zeros"):  # a checkpoint's own codes
        blocks = W.numel() // blocksize
        packed = torch.randint(0, 256, (W.numel() // 2, 1), dtype=torch.uint8, generator=generator)
        scales = torch.rand(2 * blocks, generator=generator)
        codes, values = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator), scales[:256].clone()
        stored = (codes, values) if quant_type == "nvfp4" else (scales, None)
        state = QuantState(stored[0], W.shape, FP32, blocksize, quant_type, stored[1])
    else:
        packed, state = ops.quantize_stack(W, W.shape, quant_type, blocksize, double_quant)
    whole = ops.dequantize_4bit(packed, state)
    for dim in (1, 2):
        parts = slices(W.shape, dim, blocksize, 4)
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == W.shape[dim] and (len(parts) == 1) == (most == 1 << 21)
        for part in parts:
            weight = slab_of(packed, state, dim, part)
            found = ops.weights.dequantize(weight, FP32)
            assert torch.equal(found, whole[:, part] if dim == 1 else whole[:, :, part])
            assert found.nbytes <= max(most, whole.nbytes // W.shape[dim] * 64)
            small = quant_type == "nvfp4" or len(parts) == 1  # blocks of 16 have more scales than counted
            copies = 0 if small else sum(t.nbytes for t in (weight.codes, weight.absmax))
            assert found.nbytes + copies <= slab_bytes(W.shape, blocksize, 4)


def test_what_is_computed_in_turn(monkeypatch):
    """Fewer pairs than experts, columns that are no whole blocks in several slabs, and rows of odd lengths."""

    def suits(shape, pairs=64):
        states = [ops.quantize_stack(torch.zeros(shape), torch.Size(shape))[1]] * 2
        return can_group(torch.zeros(pairs, 1, dtype=torch.int64), states, torch.zeros(1, shape[2]))

    assert suits((64, 64, 64)) and not suits((65, 64, 64))
    assert suits((2, 64, 96)) and not suits((2, 64, 92)) and not suits((2, 68, 96))
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)
    assert suits((2, 64, 128)) and not suits((2, 64, 96))


def test_a_plan_counts_the_largest_slab(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path, "qwen3_moe", dtype=BF16, **FAMILIES["qwen3_moe"])
    for most, largest in ((1 << 28, 8 * 128 * 192 * 2), (50_000, 8 * 64 * 192 * 3)):  # 3: codes and scales are copied
        monkeypatch.setattr(slabs, "SLAB_BYTES", most)
        terms = {term.name: term for term in plan(str(folder), device="cuda", compute_dtype="bfloat16").terms}
        assert terms["scratch"].num_bytes == largest


def test_a_cpu_computes_in_turn():
    assert not multiplies_groups(torch.device("cpu"), BF16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_experts_do_not_wait(experts):
    if not multiplies_groups(torch.device("cuda"), BF16):
        pytest.skip("torch has no grouped product for this GPU")
    there = copy.deepcopy(experts).to("cuda")
    values = inputs(experts)
    in_turn = results(there, {name: v.cuda() for name, v in values.items()}, BF16, by(ExpertsInTurn))
    with forbid_device_sync():
        found = results(there, {name: v.to("cuda") for name, v in values.items()}, BF16, layer)
    exact = results(experts, {**values, "x": values["x"].bfloat16().double()}, torch.float64, plain)
    for name, truth in exact.items():
        assert no_worse(found[name].cpu(), in_turn[name].cpu(), truth.double(), BF16), name


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators have made and that exist, and their most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return found

    def free(self, key, num_bytes):
        self.known.discard(key)
        self.now -= num_bytes


@pytest.mark.parametrize("slab", [1 << 28, 1])
@pytest.mark.parametrize("adapted", [("gate_up_proj", "down_proj"), ()])
def test_the_plan_counts_what_the_backward_works_on(experts, adapted, slab, monkeypatch):
    """In float32, beside the slabs. A token's indices and LoRA terms are small beside its rows."""
    monkeypatch.setattr(slabs, "SLAB_BYTES", slab)
    monkeypatch.setattr(slabs, "PAIRS_AT_ONCE", 64)
    tokens, J = 4096, 3
    values = inputs(experts, tokens, J)
    d, f = values["x"].shape[1], J * experts.weights["down_proj"].shape[1 if experts.is_transposed else 2]
    leaves = [values[name].requires_grad_() for name in ("x", "w")]
    terms = {name: (2.0, values[f"{name}.A"].requires_grad_(), values[f"{name}.B"]) for name in adapted}
    with LiveBytes() as live:
        y = layer(experts, values["x"], values["w"], values["index"], terms)
        forward, kept, live.most = live.most, live.now, live.now
        torch.autograd.grad(y, leaves, values["g"])
    planned = 4 * tokens * max(valued(count, {"d": d, "f": f}) for count in workings(J))
    assert 0.9 * planned <= live.most - kept <= planned + 4 * tokens * 2 * d
    assert 0.75 <= forward / (4 * tokens * (max(4 * f + J * d, 3 * f + 2 * J * d) + 2 * d)) <= 1.05
