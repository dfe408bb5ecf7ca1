"""Exact where nothing is reordered: runs with a paged base, and steps in which allocations fail."""

import errno
import gc
import io
import json
import os
import shutil
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.config import MLP_CHUNK_TOKENS, TrainConfig, make_config
from onecard.data.loader import Loader
from onecard.data.packing import split
from onecard.errors import UserError
from onecard.hf.attention import use_packed_attention
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.fused import FusedGatedMLP
from onecard.hf.skeleton import read_model
from onecard.kernels import ops
from onecard.kernels.cpu import native
from onecard.kernels.dequantize import saved_weights
from onecard.memory.inputs import MemoryStrategy, PlanInputs
from onecard.memory.measure import is_out_of_memory
from onecard.memory.strategy import candidates, choose_strategy, price, total_bytes
from onecard.optim.adamw import AdamW
from onecard.paging.activations import Offload
from onecard.train import checkpoint as checkpoint_module
from onecard.train import run as run_module
from onecard.train import step as step_module
from onecard.train.loss import IGNORE
from onecard.train.prepare import choose_memory, prepare
from onecard.train.recompute import recompute_layers
from onecard.train.run import Run
from onecard.train.session import load_adapted, run_training
from onecard.train.step import gradients, to_device
from tests.conftest import make_checkpoint
from tests.train.test_loop import adapter_bytes, copy_at, fields, quiet, run

DEEP = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 192}
BUDGET = "360KB"  # two of the pages of DEEP, six layers and a head


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("deep"), dtype=torch.bfloat16, **DEEP)


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"compute_dtype": "bfloat16"}])
def test_a_run_with_a_paged_base_ends_in_the_same_bytes(more, deep, chats, tmp_path):
    run(deep, chats, tmp_path / "resident", max_steps=4, **more)
    result = run(deep, chats, tmp_path / "paged", max_steps=4, weights_budget=BUDGET, **more)
    pager = result.model.get_base_model().pager
    assert pager.held_bytes <= pager.budget_bytes < sum(page.num_bytes for page in pager.pages)
    assert adapter_bytes(tmp_path / "paged") == adapter_bytes(tmp_path / "resident")


def test_a_run_may_change_its_budget_when_it_is_resumed(deep, chats, tmp_path):
    run(deep, chats, tmp_path / "straight", max_steps=4)
    run(deep, chats, tmp_path / "o", max_steps=4, weights_budget=BUDGET)
    shutil.rmtree(tmp_path / "o" / "adapter")
    for folder in (tmp_path / "o" / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > 2:
            shutil.rmtree(folder)
    run(deep, chats, tmp_path / "o", resuming=True, max_steps=4, weights_budget="500KB")
    assert adapter_bytes(tmp_path / "o") == adapter_bytes(tmp_path / "straight")


def test_a_resumed_run_keeps_its_chunks(deep, chats, tmp_path, monkeypatch):
    """Also where there is room for whole MLPs by now, so that dropout's masks and sums over tokens are the same."""
    monkeypatch.setitem(MLP_CHUNK_TOKENS, "cpu", 40)
    more = {"max_steps": 4, "lora_dropout": 0.3, "optim": "adamw"}
    least = smallest(case_of(deep, chats, tmp_path, max_seq_length=96, lora_dropout=0.3))
    run(deep, chats, tmp_path / "whole", **more)
    run(deep, chats, tmp_path / "straight", device_memory=str(least), **more)
    resumed = copy_at(tmp_path / "straight", tmp_path / "o", 2)
    run(deep, chats, resumed, resuming=True, **more)
    assert adapter_bytes(resumed) == adapter_bytes(tmp_path / "straight") != adapter_bytes(tmp_path / "whole")


def case_of(checkpoint, chats, tmp_path, **more):
    settings = {"max_seq_length": 256, **more}
    config = make_config(TrainConfig, fields(checkpoint, chats, tmp_path / "o", **settings))
    return PlanInputs(read_model(inspect_checkpoint(checkpoint)), config, torch.float32)


def test_memory_is_traded_for_time_no_further_than_it_must_be(deep, chats, tmp_path):
    """As the memory shrinks, a run takes ever longer, and gives up ever more: nothing that was not needed."""
    inputs = case_of(deep, chats, tmp_path, optim="paged_adamw_32bit", per_device_train_batch_size=4)
    limit, seen = 1 << 40, []
    while total_bytes(inputs, strategy := choose_strategy(inputs, limit)) <= limit:
        seen.append(strategy)
        limit = min(total_bytes(inputs, strategy) - 1, int(0.995 * limit))
    assert seen[0] == MemoryStrategy()
    times = [price(inputs, strategy).seconds for strategy in seen]
    assert times == sorted(times)
    assert {strategy.num_recomputed for strategy in seen} >= {0, 6}
    assert {strategy.max_forward_tokens for strategy in seen} >= {None, 256}
    assert any(strategy.weights_budget for strategy in seen) and any(
        strategy.offload_optimizer_states for strategy in seen
    )
    first_offloaded = next(number for number, strategy in enumerate(seen) if strategy.num_offloaded)
    assert all(strategy.num_offloaded for strategy in seen[first_offloaded:])
    assert seen[-1].num_offloaded and seen[-1].num_recomputed == 6 and seen[-1].offload_optimizer_states
    with pytest.raises(UserError, match="must fit in memory"):
        choose_memory(case_of(deep, chats, tmp_path, device_memory="100KB"), False)


def test_the_choice_is_the_quickest_of_all_that_fits(deep, chats, tmp_path):
    inputs = case_of(deep, chats, tmp_path, optim="paged_adamw_8bit", per_device_train_batch_size=4)
    whole = total_bytes(inputs, MemoryStrategy())
    for share in (0.9, 0.7, 0.5, 0.4):
        limit = int(share * whole)
        strategy = choose_strategy(inputs, limit)
        assert total_bytes(inputs, strategy) <= limit
        others = [other for other in candidates(inputs, limit, False) if total_bytes(inputs, other) <= limit]
        assert all(price(inputs, strategy).seconds <= price(inputs, other).seconds for other in others)


def test_what_the_settings_fix_stays(deep, chats, tmp_path):
    assert choose_strategy(case_of(deep, chats, tmp_path, gradient_checkpointing=True), 1 << 40).num_recomputed == 6
    assert choose_strategy(case_of(deep, chats, tmp_path, gradient_checkpointing=False), 1).num_recomputed == 0
    assert choose_strategy(case_of(deep, chats, tmp_path, weights_budget="400KB"), 1 << 40).weights_budget == 400_000


def smallest(inputs):
    """The least that a run can take."""
    return total_bytes(inputs, choose_strategy(inputs, 1))


def test_a_run_within_a_small_device_memory_ends_in_the_same_bytes(deep, chats, tmp_path):
    """Everything at once: pages, states outside, all recomputed, all inputs outside."""
    run(deep, chats, tmp_path / "resident", max_steps=4)
    more = {"optim": "paged_adamw_32bit", "max_seq_length": 96, "per_device_train_batch_size": 1}
    least = smallest(case_of(deep, chats, tmp_path, **more))
    console = Console(file=io.StringIO(), width=300)
    settings = fields(deep, chats, tmp_path / "small", max_steps=4, device_memory=f"{least}", **more)
    result = run_training(make_config(TrainConfig, settings), False, console)
    pager = result.model.get_base_model().pager
    assert pager.budget_bytes < sum(page.num_bytes for page in pager.pages)
    assert "6 of 6 layers recomputed, the inputs of 6" in console.file.getvalue()
    rows = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["paged_in_bytes"] > row["paged_out_bytes"] > 0 and 0 < row["page_hit_rate"] <= 1 for row in rows)
    assert "waited for pages" in (tmp_path / "small" / "report.md").read_text()
    assert adapter_bytes(tmp_path / "small") == adapter_bytes(tmp_path / "resident")


def make_run(checkpoint, chats, tmp_path, strategy=None, **more):
    """A run before its first step, and its first window."""
    config = make_config(TrainConfig, fields(checkpoint, chats, tmp_path / "o", packing=True, **more))
    prepared = prepare(config)
    model = load_adapted(config, prepared, quiet())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    loader = Loader(prepared.training.examples, config.max_seq_length, True, 2, 0)
    made = Run(config, model, loader, 4, prepared.identity, strategy=strategy or MemoryStrategy())
    model.train()
    window = [loader.next_batch() for _ in range(2)]
    return made, window, sum(int((batch["labels"] != IGNORE).sum()) for batch in window)


def fresh_gradients(made, window, num_tokens, spike=None):
    """Loss and gradients from the same random numbers each time."""
    made.drop_gradients()
    torch.manual_seed(3)
    with use_packed_attention(made.base), spike or nullcontext():
        loss, *_ = gradients(made, window, num_tokens)
    return loss, {name: p.grad for name, p in made.trainable.items()}  # a copy could be what a Spike hits


@pytest.mark.parametrize("number, offloaded", [(0, 0), (1, 0), (3, 1), (6, 0), (6, 1), (6, 6)])
def test_recomputing_and_offloading_some_layers_changes_no_bit(number, offloaded, deep, chats, tmp_path):
    made, window, num_tokens = make_run(deep, chats, tmp_path)
    recompute_layers(made.base, MemoryStrategy())
    expected = fresh_gradients(made, window, num_tokens)
    offload = Offload(made.device, tmp_path / "away")
    recompute_layers(made.base, MemoryStrategy(number, num_offloaded=offloaded), offload)
    found = fresh_gradients(made, window, num_tokens)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
    counted = offload.statistics
    hidden = sum(4 * 128 * batch["input_ids"].numel() for batch in window)  # float32, 128 values a token
    assert counted.bytes_out == counted.bytes_in == offloaded * hidden
    assert counted.touches - counted.hits == (len(window) if offloaded else 0)  # the last layer's comes unprepared
    assert not offloaded or not os.listdir(tmp_path / "away"), "files without a name leave nothing behind"


@pytest.mark.parametrize("more", [{}, {"weights_budget": BUDGET}, {"offloaded": 6}])
def test_mlps_in_chunks_give_the_same_gradients(more, deep, chats, tmp_path, monkeypatch):
    """Bound from the maths: float32 sums over tokens in another order; 1e-5 of the gradient, as where micro-batches
    are split. Never more than a chunk's tokens at a time."""
    made, window, num_tokens = make_run(deep, chats, tmp_path, lora_dropout=0.0)
    recompute_layers(made.base, MemoryStrategy(6))
    expected = fresh_gradients(made, window, num_tokens)
    offloaded = {"num_offloaded": more["offloaded"]} if "offloaded" in more else {}
    if "weights_budget" in more:
        made, *_ = make_run(deep, chats, tmp_path / "paged", lora_dropout=0.0, **more)
    lengths, whole = [], FusedGatedMLP.whole
    monkeypatch.setattr(FusedGatedMLP, "whole", lambda self, x: lengths.append(len(x)) or whole(self, x))
    offload = Offload(made.device, tmp_path / "away")
    recompute_layers(made.base, MemoryStrategy(6, mlp_chunk=40, **offloaded), offload)
    found = fresh_gradients(made, window, num_tokens)
    chunks = sum(-(-batch["input_ids"].numel() // 40) for batch in window)
    # The forward, the layer's recomputation up to the last chunk, whose result nothing needs, and the chunk's own.
    assert max(lengths) == 40 and len(lengths) == 6 * (3 * chunks - len(window))
    assert abs(found[0] - expected[0]) <= 1e-5 * abs(expected[0])
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    recompute_layers(made.base, MemoryStrategy())
    assert all(module.chunk is None for module in made.base.modules() if isinstance(module, FusedGatedMLP))


def test_a_chunk_is_recomputed_with_its_own_dropout(deep, chats, tmp_path):
    """The same bits whether a layer's recomputation draws the masks anew, or the layer is kept."""
    made, window, num_tokens = make_run(deep, chats, tmp_path, lora_dropout=0.5)
    results = []
    for number in (0, 6):
        recompute_layers(made.base, MemoryStrategy(number, mlp_chunk=40))
        results.append(fresh_gradients(made, window, num_tokens))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[1][1][name], gradient) for name, gradient in results[0][1].items())


def test_chunks_let_a_longer_context_fit(deep, chats, tmp_path, monkeypatch):
    """By the plan: at the least memory of whole MLPs nothing is in chunks, below it they are. A run does as the plan
    says."""
    inputs = case_of(deep, chats, tmp_path, max_seq_length=256)
    whole = smallest(inputs)
    assert choose_strategy(inputs, whole).mlp_chunk is None
    monkeypatch.setitem(MLP_CHUNK_TOKENS, "cpu", 64)
    chunked = choose_strategy(inputs, whole - 1)
    assert chunked.mlp_chunk == 64 and total_bytes(inputs, chunked) < whole
    assert chunked.num_recomputed == 6 and not chunked.keep_dequantized_weights
    assert price(inputs, chunked).seconds > price(inputs, replace(chunked, mlp_chunk=None)).seconds
    more = {"max_seq_length": 256, "per_device_train_batch_size": 1, "max_steps": 2, "gradient_accumulation_steps": 1}
    inputs = case_of(deep, chats, tmp_path, **more)
    more |= {"device_memory": str(smallest(inputs))}
    console = Console(file=io.StringIO(), width=300)
    run_training(make_config(TrainConfig, fields(deep, chats, tmp_path / "o", **more)), False, console)
    assert "their MLPs in chunks of 64 tokens" in console.file.getvalue()


@pytest.mark.parametrize("offloaded", [0, 3])
def test_recomputed_weights_stay_for_the_backward(offloaded, deep, chats, tmp_path, monkeypatch):
    """The same bits with a third fewer dequantizations, and one layer's weights at a time."""
    made, window, num_tokens = make_run(deep, chats, tmp_path)
    offload, counts, results, alive = Offload(made.device, tmp_path / "away"), [], [], []
    monkeypatch.setattr(native, "can_fuse", lambda *_: False)  # as where products do not read the codes themselves
    monkeypatch.setattr(native, "can_multiply", lambda *_: False)
    dequantize, weights = native.dequantize_into, weakref.WeakSet()

    def counted(*arguments):
        counts[-1] += 1
        weights.add(arguments[-1])
        alive.append(len(weights))
        return dequantize(*arguments)

    monkeypatch.setattr(native, "dequantize_into", counted)
    for keeps in (False, True):
        counts.append(0)
        strategy = MemoryStrategy(6, num_offloaded=offloaded, keep_dequantized_weights=keeps)
        recompute_layers(made.base, strategy, offload)
        results.append(fresh_gradients(made, window, num_tokens))
        assert max(alive) <= (9 if keeps else 2)
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[1][1][name], gradient) for name, gradient in results[0][1].items())
    assert counts == [6 * 7 * len(window) * times for times in (3, 2)]


def test_no_call_saves_the_weight_of_another(monkeypatch):
    """A call without a graph leaves nothing for the next one's backward."""
    monkeypatch.setattr(native, "can_fuse", lambda *_: False)
    first, second = (ops.quantize_4bit(torch.randn(64, 64)) for _ in range(2))
    forward, recompute = saved_weights()
    for context in (forward, recompute):
        with context:
            with torch.no_grad():
                ops.qlora_linear(torch.randn(40, 64), *first)
            x = torch.randn(1, 64, requires_grad=True)  # few rows: no weight is dequantized
            y = ops.qlora_linear(x, *second)
        y.sum().backward()
        W = ops.dequantize_4bit(*second).double()
        assert (
            (x.grad[0].double() - W.sum(0)).abs() <= 64 * 2**-24 * W.abs().sum(0)
        ).all()  # a float32 sum of 64 terms


def test_inputs_that_wait_outside_are_not_here(deep, chats, tmp_path):
    made, window, num_tokens = make_run(deep, chats, tmp_path)
    recompute_layers(made.base, MemoryStrategy(6, num_offloaded=6), Offload(made.device, tmp_path / "away"))
    entered = []
    layers = [module for module in made.base.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(lambda _, args: entered.append(weakref.ref(args[0]))) for layer in layers]
    with use_packed_attention(made.base):
        loss = made.loss(made.base, to_device(window[0], made.device), num_tokens)
        for hook in hooks:
            hook.remove()
        assert len(entered) == 6 and sum(ref() is not None for ref in entered) <= 2
        loss.backward()


def test_the_parts_of_a_batch_are_its_documents(deep, chats, tmp_path):
    made, window, num_tokens = make_run(deep, chats, tmp_path, lora_dropout=0.0)
    expected = fresh_gradients(made, window, num_tokens)
    for max_forward_tokens in (100, 60, 1):
        parts = [part for batch in window for part in split(batch, max_forward_tokens)]
        assert len(parts) > 2
        assert sum(int((part["labels"] != IGNORE).sum()) for part in parts) == num_tokens
        made.max_forward_tokens = max_forward_tokens
        found = fresh_gradients(made, window, num_tokens)
        # float32 sums in another order: the bound of the accumulation test, 1e-5 of the gradient.
        assert abs(found[0] - expected[0]) <= 1e-5 * abs(expected[0])
        for name, gradient in expected[1].items():
            assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


@cache
def allocates(function):
    """Whether an operator makes a tensor of its own: not a view, and not in place."""
    return any("Tensor" in str(result.type) and result.alias_info is None for result in function._schema.returns)


class Spike(TorchDispatchMode):
    """Fails the allocations number `at` as an allocator out of memory would."""

    def __init__(self, *at):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if allocates(function):
            self.count += 1
            if self.count - 1 in self.at:
                raise torch.OutOfMemoryError("injected")
        return function(*args, **(kwargs or {}))


SPIKED = {
    "resident": ({"optim": "adamw"}, MemoryStrategy(0)),
    "paged": (
        {"optim": "paged_adamw_32bit", "weights_budget": "95KB", "target_modules": ["q_proj", "down_proj"]},
        MemoryStrategy(2, None, False, 2),
    ),
    "8bit": ({"optim": "paged_adamw_8bit", "weights_budget": "95KB", "r": 64}, MemoryStrategy(1, None, True, 1)),
}


@pytest.mark.parametrize(
    "kind, each", [("paged", 3), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in SPIKED)]
)
def test_a_spike_at_every_allocation_of_a_step_changes_no_bit(kind, each, checkpoint, chats, tmp_path):
    """In the loader, forward, backward, clipping, AdamW and paging: the update is made, once, and is the same."""
    settings, strategy = SPIKED[kind]
    made, _, _ = make_run(checkpoint, chats, tmp_path, strategy=strategy, gradient_accumulation_steps=1, **settings)
    recompute_layers(made.base, strategy, made.offload)
    with use_packed_attention(made.base):
        step_module.optimizer_step(made)  # from here on there are states
        start, counter = saved(made), Spike()
        with counter:
            row = step_module.optimizer_step(made)
        expected = saved(made)
        assert counter.count > 200 and not equal(start, expected)
        gc.freeze()  # so that each collection, one a spike, is quick
        for at in range(0, counter.count, each):
            put_back(made, start)
            with Spike(at):
                found = step_module.optimizer_step(made)
            assert equal(saved(made), expected), at
            assert (found["loss"], found["grad_norm"], made.max_forward_tokens) == (
                row["loss"],
                row["grad_norm"],
                None,
            ), at
        gc.unfreeze()


def saved(made):
    """All that an update depends on."""
    tensors = {name: p.detach().clone() for name, p in made.trainable.items()}
    for name, p in made.trainable.items():
        states = made.optimizer.state_tensors(p)
        tensors |= {f"{name}.{key}": tensor.clone() for key, tensor in states.items()}
    return tensors, made.step, made.loader.state_dict(), torch.get_rng_state()


def put_back(made, before):
    tensors, made.step, loader, generator = before
    made.loader.load_state_dict(loader)
    torch.set_rng_state(generator)
    if made.optimizer.paged is not None:
        for p in made.trainable.values():
            made.optimizer.paged.bring(p, made.optimizer.state[p])
    for name, p in made.trainable.items():
        p.data.copy_(tensors[name])
        for key in made.optimizer.state[p]:
            made.optimizer.state[p][key].copy_(tensors[f"{name}.{key}"])


def equal(a, b):
    same = all(torch.equal(tensor, b[0][name]) for name, tensor in a[0].items())
    return same and a[1:3] == b[1:3] and torch.equal(a[3], b[3])


@pytest.mark.parametrize("each", [183, pytest.param(61, marks=pytest.mark.slow)])
def test_allocations_that_go_on_failing_split_the_batch(each, deep, chats, tmp_path):
    made, window, num_tokens = make_run(deep, chats, tmp_path, lora_dropout=0.0)
    expected = fresh_gradients(made, window, num_tokens)
    counter = Spike()
    assert fresh_gradients(made, window, num_tokens, counter)[0] == expected[0]
    for at in range(0, counter.count, each):
        made.max_forward_tokens = None
        found = fresh_gradients(made, window, num_tokens, Spike(at, at + 1 + at // 2))  # in the repetition too
        for name, gradient in expected[1].items():
            assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, (at, name)
    assert made.max_forward_tokens is not None and made.max_forward_tokens < 2 * 96


def test_a_file_that_cannot_be_written_or_read_is_told(deep, chats, tmp_path, monkeypatch):
    made, window, num_tokens = make_run(deep, chats, tmp_path)
    recompute_layers(made.base, MemoryStrategy(6, num_offloaded=6), Offload(made.device, tmp_path / "away"))
    for name, match in (("pwrite", "room for offloaded data"), ("preadv", "paged file must stay unchanged")):
        real, calls = getattr(os, name), []

        def broken(*args, real=real, calls=calls):
            calls.append(args)
            if len(calls) == 4:
                raise OSError(28 if real is os.pwrite else 5, "injected")
            return real(*args)

        monkeypatch.setattr(os, name, broken)
        with pytest.raises(UserError, match=match):
            fresh_gradients(made, window, num_tokens)
        monkeypatch.undo()


def adapter_of(made):
    return {name: p.detach().clone() for name, p in made.trainable.items()}


def steps_with_spikes(made, count, spikes):
    """Updates, each with a failed allocation where `spikes` says."""
    made.loader.load_state_dict({"epoch": 0, "batch": 0})
    torch.manual_seed(5)
    with use_packed_attention(made.base):
        for number in range(count):
            with Spike(*spikes[number]):
                step_module.optimizer_step(made)
    return adapter_of(made)


@pytest.mark.parametrize("count", [12, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "optim, crowded, batched",
    [
        ("paged_adamw_32bit", False, False),
        ("paged_adamw_8bit", True, False),
        ("paged_adamw_8bit", False, True),  # as on a GPU
        pytest.param("paged_adamw_32bit", True, False, marks=pytest.mark.slow),
        pytest.param("paged_adamw_8bit", False, False, marks=pytest.mark.slow),
        pytest.param("paged_adamw_32bit", False, True, marks=pytest.mark.slow),
    ],
)
def test_paged_states_are_the_unpaged_ones_bit_for_bit(
    optim, crowded, batched, count, deep, chats, tmp_path, monkeypatch
):
    monkeypatch.setattr(AdamW, "is_batched", batched)
    unpaged = optim.removeprefix("paged_").removesuffix("_32bit")
    plain, _, _ = make_run(deep, chats, tmp_path / "a", optim=unpaged, max_steps=count)
    paged, _, _ = make_run(deep, chats, tmp_path / "b", optim=optim, max_steps=count)
    paged.optimizer.paged.crowded = crowded
    plain.num_steps = paged.num_steps = count
    paged.model.load_state_dict(plain.model.state_dict())
    generator = torch.Generator().manual_seed(0)
    spikes = [(at,) for at in torch.randint(0, 2500, (count,), generator=generator).tolist()]
    expected = steps_with_spikes(plain, count, [()] * count)
    found = steps_with_spikes(paged, count, spikes)
    assert paged.max_forward_tokens is None
    assert paged.paged.bytes_in > 0
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for (_, a), (_, b) in zip(plain.trainable.items(), paged.trainable.items()):
        mine, theirs = plain.optimizer.state_tensors(a), paged.optimizer.state_tensors(b)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_loss_scale_of_float16_is_that_of_grad_scaler(checkpoint, chats, tmp_path, monkeypatch):
    """An overflow halves it, and the same update follows; steps without one double it, also over a checkpoint."""
    monkeypatch.setattr(run_module, "GROWTH_INTERVAL", 3)
    made, window, num_tokens = make_run(checkpoint, chats, tmp_path, compute_dtype="float16")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    made.loss_scale = 2.0**8  # so that what overflows is only what the test fills in
    weight = torch.nn.Parameter(torch.ones(1))
    micro_batch = step_module.micro_batch

    def overflowing(run, batch, divisor):
        loss = micro_batch(run, batch, divisor)
        if overflows.pop(0):
            next(iter(run.trainable.values())).grad.fill_(torch.inf)
        return loss

    monkeypatch.setattr(step_module, "micro_batch", overflowing)
    for number in range(9):
        overflows = [number == 4] + [False] * 9
        fresh_gradients(made, window, num_tokens)
        for bad in [True, False] if number == 4 else [False]:
            optimizer = torch.optim.SGD([weight])
            weight.grad = torch.full((1,), torch.inf if bad else 1.0)
            scaler.scale(torch.zeros(1))
            scaler.step(optimizer)
            scaler.update()
        assert made.loss_scale == scaler.get_scale(), number
        made.step = number + 1
        checkpoint_module.checkpoint(made, tmp_path / "c")
        made.num_finite_steps, made.loss_scale = 99, 1.0
        checkpoint_module.resume(made, checkpoint_module.load_newest(tmp_path / "c"))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_every_optimizer_resumes_exactly(optim, deep, chats, tmp_path):
    run(deep, chats, tmp_path / "straight", max_steps=4, optim=optim)
    shutil.copytree(tmp_path / "straight", tmp_path / "o")
    shutil.rmtree(tmp_path / "o" / "adapter")
    for folder in (tmp_path / "o" / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > 2:
            shutil.rmtree(folder)
    run(deep, chats, tmp_path / "o", resuming=True, max_steps=4, optim=optim)
    assert adapter_bytes(tmp_path / "o") == adapter_bytes(tmp_path / "straight")


FAILED = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]


def test_a_failed_allocation_is_known_by_what_libraries_say():
    assert all(map(is_out_of_memory, FAILED))
    others = OSError(errno.ENOSPC, "No space left"), RuntimeError("CUDA error: an illegal memory access")
    assert not any(map(is_out_of_memory, others))


def test_when_nothing_can_be_split_the_error_says_so(deep, chats, tmp_path, monkeypatch):
    made, window, num_tokens = make_run(deep, chats, tmp_path)

    def never(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(step_module, "micro_batch", never)
    with pytest.raises(UserError, match="each document goes alone"):
        fresh_gradients(made, window, num_tokens)
