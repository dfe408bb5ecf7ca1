"""Exact: the weights that a run for a file computes with are those of the file. Bound: gradients beside autograd's."""

import json
from functools import partial

import gguf
import pytest
import torch

from onecard.adapter.layers import LoraLinear4bit
from onecard.api import export
from onecard.config import ExportConfig, QuantConfig, TrainConfig, make_config
from onecard.errors import UserError
from onecard.export.gguf.architecture import Architecture
from onecard.export.merge.merged import read_4bit
from onecard.export.merge.quantized import requantize
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from onecard.kernels import ops
from onecard.kernels.dequantize import saved_weights
from onecard.kernels.reference import Lora
from onecard.memory.inputs import PlanInputs
from onecard.nn import grid as grid_module
from onecard.nn.grid import Grid, merged_bytes, merged_linear
from onecard.quant.state import PackedWeight
from onecard.train.prepare import prepare
from tests.conftest import make_checkpoint
from tests.train import test_loop as loop
from tests.train.test_loop import adapter_bytes

FORMATS = ("q4_0", "gptq", "nvfp4", "nf4")


def fields(checkpoint, chats, output, **more):
    return loop.fields(checkpoint, chats, output, **{"lora_dropout": 0.0, **more})


def run(checkpoint, chats, output, **more):
    return loop.run(checkpoint, chats, output, **{"lora_dropout": 0.0, **more})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In bfloat16, whose rounding comes before the file's. Groups of 64 divide all widths, 128 does not."""
    return make_checkpoint(tmp_path_factory.mktemp("base"), dtype=torch.bfloat16, intermediate_size=192)


def written(format, model, adapter, folder):
    """The float32 weights of the linears in a written file, as its reader computes them, by their name."""
    if format == "nf4":
        requantize(str(model), str(adapter), str(folder), QuantConfig(quant_type="nf4"))
        found = inspect_checkpoint(folder)
        names = [name.removesuffix(".absmax") for name in found.tensors if name.endswith("weight.absmax")]
        return {name: partial(dequantized, found, name) for name in names}
    kind = "gguf" if format == "q4_0" else format
    config = {"format": kind, "model": str(model), "adapter": str(adapter), "output": str(folder)}
    said = export(make_config(ExportConfig, config | ({"outtype": format} if kind == "gguf" else {}), "test"))
    assert not any("trained for" in line or "nearest code" in line for line in said.lines)
    if kind != "gguf":
        found = inspect_checkpoint(folder).weights
        return {n: partial(info.form.rows, 0, info.shape[0]) for n, info in found.items() if info.form is not None}
    arch = Architecture(json.loads((model / "config.json").read_text()))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(said.path).tensors}
    return {n: partial(from_gguf, arch, stored, n) for n in inspect_checkpoint(model).weights if "_proj" in n}


def dequantized(checkpoint, name):
    return ops.dequantize_4bit(*read_4bit(checkpoint, name), torch.float32)


def from_gguf(arch, stored, name):
    tensor, order = stored[arch.tensor_name(name)], arch.row_order(name)
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
    W = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    return W if order is None else W[order.argsort()]


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_has_the_weights_that_the_last_forward_saw(format, base, chats, tmp_path, monkeypatch):
    """The run's own calls are recorded: the last weight that each linear was multiplied by after the last update."""
    seen, own = {}, Grid.merged

    def recorded(self, weight, lora, peak, dtype):
        W = own(self, weight, lora, peak, dtype)
        seen[weight.codes.data_ptr()] = W.clone()
        return W

    monkeypatch.setattr(Grid, "merged", recorded)
    how = {"train_for": format, "max_steps": 3, "learning_rate": 1e-2, "validation_split": 0.2}
    result = run(base, chats, tmp_path / "o", **how, init_lora_weights="pissa" if format == "gptq" else "default")
    model = result.model.get_base_model()
    saw = {f"{n}.weight": seen[m.weight.data_ptr()] for n, m in linears_of(model)}
    monkeypatch.undo()
    found = written(format, base, result.adapter, tmp_path / "file")
    assert found.keys() == saw.keys() and len(found) == 14
    for name, read in found.items():
        assert torch.equal(read(), saw[name]), name
    plain = next(iter(linears_of(model)))[1].dequantize()
    assert not torch.equal(next(iter(saw.values())), plain)  # the update and the rounding are in them
    for other in {"gptq": "w4a16", "q4_0": "nvfp4"}.get(format, "").split():
        config = {"format": other, "model": str(base), "adapter": str(result.adapter), "output": str(tmp_path / other)}
        said = export(make_config(ExportConfig, config, "test")).lines
        assert said[0] == f"note     the adapter was trained for {format}, and this is {other}: its effect may differ"


def linears_of(model):
    return [(n, m.get_base_layer()) for n, m in model.named_modules() if isinstance(m, LoraLinear4bit)]


def case(format, N=24, K=64, rank=4, M=7):
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator)
    packed, state = ops.quantize_4bit(draw(N, K), "nf4", 64, True)
    lora = Lora(draw(rank, K).requires_grad_(), (0.3 * draw(N, rank)).requires_grad_(), 0.5)
    return draw(M, K).requires_grad_(), PackedWeight.of(packed, state), lora, draw(N), draw(M, N)


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_are_those_of_autograd_with_a_straight_through_rounding(format):
    x, weight, lora, bias, g = case(format)
    grid = Grid(format, torch.float32, 32, 64, True)
    peak = grid.peak(weight, Lora(*(t.detach() if isinstance(t, torch.Tensor) else t for t in lora)))
    own = merged_linear(x, weight, bias, lora, grid, peak)
    own.backward(g)
    found = [x.grad, lora.A_RK.grad, lora.B_NR.grad]
    x.grad = lora.A_RK.grad = lora.B_NR.grad = None
    merged = ops.dequantize_4bit(weight.codes, state_of(weight), torch.float32) + lora.scaling * lora.B_NR @ lora.A_RK
    W_hat = grid.merged(weight, lora, peak, torch.float32)
    assert not torch.equal(W_hat, merged)
    y = x @ (merged + (W_hat - merged).detach()).T + bias
    y.backward(g)
    expected = [x.grad, lora.A_RK.grad, lora.B_NR.grad]
    A, B, X, G = (t.detach().abs() for t in (lora.A_RK, lora.B_NR, x, g))
    sizes = [G @ W_hat.detach().abs(), lora.scaling * (G @ B).T @ X, lora.scaling * G.T @ (X @ A.T)]
    for one, other, size in zip([own, *found], [y, *expected], [X @ W_hat.detach().abs().T, *sizes]):
        # two sums of at most K + M + R products, each within n eps of the sum of magnitudes (Higham 2002, 3.5)
        assert ((one - other).abs() <= 2 * 128 * torch.finfo(torch.float32).eps * (size + 1)).all()


def state_of(weight):
    from onecard.quant.state import QuantState

    return QuantState(weight.absmax, torch.Size(weight.shape), torch.float32, weight.blocksize, weight.quant_type,
                      weight.nested_absmax, weight.nested_offset)  # fmt: skip


def test_a_run_with_recomputation_and_a_paged_base_ends_in_the_same_bytes(base, chats, tmp_path):
    how = {"train_for": "nvfp4", "max_steps": 2, "max_seq_length": 64}
    run(base, chats, tmp_path / "plain", **how, gradient_checkpointing=False)
    result = run(base, chats, tmp_path / "other", **how, gradient_checkpointing=True, weights_budget="120KB")
    assert result.model.get_base_model().pager.held_bytes
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(tmp_path / "plain")


def test_a_recomputation_keeps_its_merged_weight(monkeypatch):
    x, weight, lora, bias, g = case("q4_0")
    grid, calls = Grid("q4_0", torch.float32, 0, 64, True), []
    own = Grid.merged
    monkeypatch.setattr(Grid, "merged", lambda *args: calls.append(1) or own(*args))
    call = partial(merged_linear, x, weight, bias, lora, grid)
    torch.utils.checkpoint.checkpoint(call, use_reentrant=False, context_fn=saved_weights).backward(g)
    assert len(calls) == 2  # forward and recomputation
    kept, x.grad = x.grad, None
    call().backward(g)
    assert len(calls) == 4 and torch.equal(kept, x.grad)


@pytest.mark.parametrize("format", FORMATS)
def test_the_plan_holds_what_a_merged_weight_takes(format, tmp_path, monkeypatch):
    """Allocations as torch's profiler records them, for a matrix of several slabs."""
    monkeypatch.setattr(grid_module, "SLAB_VALUES", 1 << 18)
    monkeypatch.setitem(grid_module.PIECE_VALUES, "cpu", 1 << 14)
    _, weight, lora, _, _ = case(format, N=2048, K=256)
    lora, grid = Lora(lora.A_RK.detach(), lora.B_NR.detach(), 0.5), Grid(format, torch.bfloat16, 64, 64, True)
    grid.merged(weight, lora, 9.0, torch.bfloat16)
    with torch.profiler.profile(profile_memory=True) as profile:
        grid.merged(weight, lora, 9.0, torch.bfloat16)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    used = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
    peak, planned = max(used) - used[0], merged_bytes(format, weight.shape, 2, "cpu")
    assert 0.5 * planned < peak <= planned, (format, peak, planned)


def test_a_plan_counts_it(base, chats, tmp_path):
    model = read_model(inspect_checkpoint(base))
    config = make_config(TrainConfig, fields(base, chats, tmp_path, train_for="q4_0"))
    (term,) = PlanInputs(model, config, torch.float32).merged
    assert term.num_bytes == max(merged_bytes("q4_0", m.weight.shape, 4, "cpu") for m in model.linears.values())
    assert term in prepare(config).plan.terms


@pytest.mark.parametrize(
    "setting, must",
    [
        ({"lora_dropout": 0.1}, "takes no lora_dropout"),
        ({"use_dora": True}, "no use_dora"),
        ({"loss": "dpo"}, "does not go with loss dpo"),
        ({"task": "classification"}, "does not go with task classification"),
        ({"metric": ["exact_match"]}, "does not go with metric"),
        ({"parallel": "fsdp"}, "leave parallel fsdp out"),
        ({"target_modules": ["q_proj", "v_proj"]}, "_proj without one"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused_before_loading(setting, must, base, chats, tmp_path):
    more = {"eval_data": str(chats)} if "metric" in setting else {}
    with pytest.raises(UserError, match=must):
        prepare(make_config(TrainConfig, fields(base, chats, tmp_path / "o", train_for="gptq", **setting, **more)))


@pytest.mark.parametrize(
    "family, more, must", [("mixtral", {}, "experts, as in"), ("llama", {"intermediate_size": 104}, "a multiple of 32")]
)
def test_models_that_do_not_go_with_it_are_refused_before_loading(family, more, must, chats, tmp_path):
    model = make_checkpoint(tmp_path / "m", family, **more)
    with pytest.raises(UserError, match=must):
        prepare(make_config(TrainConfig, fields(model, chats, tmp_path / "o", train_for="q4_0")))
