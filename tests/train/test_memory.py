"""Exact where nothing is reordered: runs with a paged base, and steps in which allocations fail."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.config import TrainConfig, make_config
from onecard.data.loader import Loader
from onecard.data.packing import split
from onecard.errors import UserError
from onecard.hf.attention import use_packed_attention
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.memory.plan import choose_fit, read_model
from onecard.train import step as step_module
from onecard.train.loss import IGNORE
from onecard.train.session import choose_memory, load_adapted, prepare
from onecard.train.step import Run, gradients, recompute_layers
from tests.conftest import make_checkpoint
from tests.train.test_loop import adapter_bytes, fields, quiet, run

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


def choice(checkpoint, chats, tmp_path, free, **more):
    """What a run on a machine with so much free memory would do."""
    config = make_config(TrainConfig, fields(checkpoint, chats, tmp_path / "o", **{"max_seq_length": 256, **more}))
    model, dtype = read_model(inspect_checkpoint(checkpoint)), torch.float32
    fit, plan = choose_fit(model, config, dtype, free)
    return fit, plan


def test_memory_is_traded_for_time_no_further_than_it_must_be(deep, chats, tmp_path):
    free, seen = 1 << 40, []
    while True:
        fit, plan = choice(deep, chats, tmp_path, free, optim="paged_adamw_32bit")
        if not plan.fits:
            break
        seen.append(fit)
        free = plan.total_bytes - 1 if fit.weights_budget is None else int(0.97 * plan.total_bytes)
    recomputed = [fit.num_recomputed for fit in seen if fit.weights_budget is None]
    assert recomputed == sorted(set(recomputed)) and recomputed[0] == 0 and recomputed[-1] >= 5
    paged = [fit for fit in seen if fit.weights_budget is not None]
    assert paged and all(fit.num_recomputed == 6 for fit in paged)
    assert [fit.states_away for fit in paged] == sorted(fit.states_away for fit in paged) and paged[-1].states_away
    with pytest.raises(UserError, match="must fit in memory"):
        choose_memory(
            read_model(inspect_checkpoint(deep)),
            make_config(TrainConfig, fields(deep, chats, tmp_path / "o", device_memory="100KB")),
            torch.float32,
        )


def test_what_the_settings_fix_stays(deep, chats, tmp_path):
    assert choice(deep, chats, tmp_path, 1 << 40, gradient_checkpointing=True)[0].num_recomputed == 6
    assert choice(deep, chats, tmp_path, 1, gradient_checkpointing=False)[0].num_recomputed == 0
    assert choice(deep, chats, tmp_path, 1 << 40, weights_budget="400KB")[0].weights_budget == 400_000


def test_a_run_within_a_small_device_memory_ends_in_the_same_bytes(deep, chats, tmp_path):
    run(deep, chats, tmp_path / "resident", max_steps=4)
    fit, plan = choice(deep, chats, tmp_path, 1, optim="paged_adamw_32bit", max_seq_length=96)
    more = {"optim": "paged_adamw_32bit", "device_memory": f"{plan.total_bytes}", "max_seq_length": 96}
    result = run(deep, chats, tmp_path / "small", max_steps=4, **more)
    pager = result.model.get_base_model().pager
    assert fit.states_away and pager.budget_bytes < sum(page.num_bytes for page in pager.pages)
    assert adapter_bytes(tmp_path / "small") == adapter_bytes(tmp_path / "resident")


def make_run(checkpoint, chats, tmp_path, **more):
    """A run before its first step, and its first window."""
    config = make_config(TrainConfig, fields(checkpoint, chats, tmp_path / "o", packing=True, **more))
    prepared = prepare(config)
    model = load_adapted(config, prepared, quiet())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    loader = Loader(prepared.training.examples, config.max_seq_length, True, 2, 0)
    made = Run(config, model, loader, 4, prepared.identity)
    model.train()
    window = [loader.next_batch() for _ in range(2)]
    return made, window, sum(int((batch["labels"] != IGNORE).sum()) for batch in window)


def fresh_gradients(made, window, num_tokens):
    """Loss and gradients from the same random numbers each time."""
    made.optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with use_packed_attention(made.base):
        loss, _ = gradients(made, window, num_tokens)
    return loss, {name: p.grad.clone() for name, p in made.trainable.items()}


@pytest.mark.parametrize("number", [0, 1, 3, 6])
def test_recomputing_some_layers_changes_no_bit(number, deep, chats, tmp_path):
    made, window, num_tokens = make_run(deep, chats, tmp_path)
    recompute_layers(made.base, 0)
    expected = fresh_gradients(made, window, num_tokens)
    recompute_layers(made.base, number)
    found = fresh_gradients(made, window, num_tokens)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_the_parts_of_a_batch_are_its_documents(deep, chats, tmp_path):
    made, window, num_tokens = make_run(deep, chats, tmp_path, lora_dropout=0.0)
    expected = fresh_gradients(made, window, num_tokens)
    for num_parts in (2, 3, 64):
        parts = [part for batch in window for part in split(batch, num_parts)]
        assert len(parts) > 2
        assert sum(int((part["labels"] != IGNORE).sum()) for part in parts) == num_tokens
        made.num_parts = num_parts
        found = fresh_gradients(made, window, num_tokens)
        # float32 sums in another order: the bound of the accumulation test, 1e-5 of the gradient.
        assert abs(found[0] - expected[0]) <= 1e-5 * abs(expected[0])
        for name, gradient in expected[1].items():
            assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


class Spike(TorchDispatchMode):
    """Fails the operation number `at` as an allocator out of memory would."""

    def __init__(self, at):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 == self.at:
            raise torch.OutOfMemoryError("injected")
        return function(*args, **(kwargs or {}))


def with_spike(monkeypatch, spike):
    real = step_module.micro_batch

    def spiky(*args):
        with spike:
            return real(*args)

    monkeypatch.setattr(step_module, "micro_batch", spiky)


def test_a_failed_allocation_anywhere_splits_and_repeats(deep, chats, tmp_path, monkeypatch):
    made, window, num_tokens = make_run(deep, chats, tmp_path, lora_dropout=0.0)
    expected = fresh_gradients(made, window, num_tokens)
    counter = Spike(-1)
    with_spike(monkeypatch, counter)
    assert fresh_gradients(made, window, num_tokens)[0] == expected[0]
    monkeypatch.undo()
    assert counter.count > 500
    for at in range(0, counter.count, 61):
        made.num_parts = 1
        with_spike(monkeypatch, Spike(at))
        found = fresh_gradients(made, window, num_tokens)
        monkeypatch.undo()
        assert made.num_parts == 2, at
        for name, gradient in expected[1].items():
            assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, (at, name)


def adapter_of(made):
    return {name: p.detach().clone() for name, p in made.trainable.items()}


def steps_with_spikes(made, count, monkeypatch, spikes):
    """Updates, each with a failed allocation where `spikes` says (None for none)."""
    made.loader.load_state_dict({"epoch": 0, "batch": 0})
    torch.manual_seed(5)
    with use_packed_attention(made.base):
        for number in range(count):
            if spikes[number] is not None:
                with_spike(monkeypatch, Spike(spikes[number]))
            step_module.update(made)
            monkeypatch.undo()
    return adapter_of(made)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("crowded", [False, True])
def test_paged_states_are_the_unpaged_ones_bit_for_bit(optim, crowded, deep, chats, tmp_path, monkeypatch):
    count = 100
    plain, _, _ = make_run(deep, chats, tmp_path / "a", optim=optim.removeprefix("paged_").removesuffix("_32bit"))
    paged, _, _ = make_run(deep, chats, tmp_path / "b", optim=optim)
    paged.optimizer.paged.crowded = crowded
    plain.num_steps = paged.num_steps = count
    paged.model.load_state_dict(plain.model.state_dict())
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(0, 400, (count,), generator=generator).tolist()
    # The first update has no states yet, so a spike there could only split; later ones send the states away.
    spikes = [None if number % 3 == 0 or crowded else at[number] for number in range(count)]
    expected = steps_with_spikes(plain, count, monkeypatch, [None] * count)
    found = steps_with_spikes(paged, count, monkeypatch, spikes)
    assert paged.num_parts == 1
    assert paged.optimizer.paged.bytes_brought > 0
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for (_, a), (_, b) in zip(plain.trainable.items(), paged.trainable.items()):
        mine, theirs = plain.optimizer.state_tensors(a), paged.optimizer.state_tensors(b)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


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


def test_when_nothing_can_be_split_the_error_says_so(deep, chats, tmp_path, monkeypatch):
    made, window, num_tokens = make_run(deep, chats, tmp_path)

    def never(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(step_module, "micro_batch", never)
    with pytest.raises(UserError, match="each document goes alone"):
        fresh_gradients(made, window, num_tokens)
