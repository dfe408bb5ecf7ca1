"""Exact: ddp and fsdp give the same bits; killed or stopped, they go on bit for bit. Bound: several processes make the
updates of one, to rounding."""

import datetime
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.load import load_model
from onecard.hf.skeleton import read_model
from onecard.memory.plan import plan
from onecard.paging.files import ALIGNMENT
from onecard.torchrun import process_number
from onecard.train import loop
from onecard.train import ranks as ranks_module
from onecard.train.prepare import check_shardable
from onecard.train.ranks import Ranks, join
from onecard.train.session import check_ranks, run_training
from onecard.train.step import optimizer_step
from tests.conftest import chat_rows, make_checkpoint, write_rows
from tests.forks import Forked, command_line, ranks
from tests.train.test_loop import adapter_bytes, fields, quiet

SHARDED = {"parallel": "fsdp"}
STACKS = ["gate_up_proj", "down_proj"]
PAIRS = [
    {"prompt": f"how many {i}?", "chosen": f" {i} mugs", "rejected": " the dog" + " lazy" * (i % 3)} for i in range(21)
]


@pytest.fixture
def settings(checkpoint, tmp_path):
    """Five windows of four micro-batches and one of a single one, which leaves a process without any."""
    rows, held = write_rows(tmp_path / "d.jsonl", chat_rows(21)), write_rows(tmp_path / "e.jsonl", chat_rows(5))
    more = {"eval_data": str(held), "eval_steps": 2, "packing": False, "gradient_accumulation_steps": 4}
    more |= {"lora_dropout": 0.0, "metric": ["exact_match"], "metric_max_new_tokens": 2}
    return fields(checkpoint, rows, tmp_path / "o", **more)


def words(settings, output, *flags):
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**settings, "output": str(output)}))
    return ["train", "--config", path, *flags]


def started(settings, output, count, *flags):
    """`onecard train` in `count` connected processes of one thread each."""
    return ranks(count, command_line, *words(settings, output, *flags))


def finished(processes):
    ends = [process.wait() for process in processes]
    assert all(end.code == 0 for end in ends), [end.err[-2000:] for end in ends]
    return "".join(end.out for end in ends)


def alone(settings, output):
    """The same run by one process, this one."""
    return run_training(make_config(TrainConfig, {**settings, "output": str(output)}), False, quiet())


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def check_equal(several, one_process):
    """Losses, evaluations and adapter; AdamW divides small gradients by their size, which raises a rounding's share."""
    for one, other in zip(metrics(several), metrics(one_process), strict=True):
        for name in ("loss", "grad_norm", "num_supervised_tokens", *(key for key in one if key.startswith("eval_"))):
            assert one[name] == pytest.approx(other[name], rel=2e-5), name
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (several, one_process))
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= 1e-4 * other[name].norm(), name


def changed(settings, what, tmp_path):
    """The settings for linears, for linears and experts, or for preferences."""
    if what == "experts":
        model = make_checkpoint(tmp_path / "m", "mixtral")
        return {**settings, "model": str(model), "target_parameters": STACKS}
    if what == "dpo":
        pairs = write_rows(tmp_path / "p.jsonl", PAIRS)
        return {**settings, "loss": "dpo", "metric": [], "eval_data": None, "data": str(pairs)}
    return settings


@pytest.mark.parametrize(
    "count, what",
    [
        (2, "experts"),
        *(pytest.param(2, what, marks=pytest.mark.slow) for what in ("dense", "dpo")),
        *(pytest.param(4, what, marks=pytest.mark.slow) for what in ("dense", "experts", "dpo")),
    ],
)
def test_several_processes_make_the_updates_of_one(count, what, settings, tmp_path):
    settings = changed(settings, what, tmp_path)
    both = {how: started({**settings, "parallel": how}, tmp_path / how, count) for how in ("ddp", "fsdp")}
    assert alone(settings, tmp_path / "alone").report.num_steps == 6
    for how, processes in both.items():
        assert finished(processes).count("6 updates of 4 x 1 rows") == 1, "one process speaks"
        check_equal(tmp_path / how, tmp_path / "alone")
        line = f"| processes | {count}, data parallel{', the base sharded' * (how == 'fsdp')} |"
        assert line in (tmp_path / how / "report.md").read_text()
    assert adapter_bytes(tmp_path / "ddp") == adapter_bytes(tmp_path / "fsdp")


def test_the_command_starts_its_processes(settings, tmp_path):
    process = Forked(command_line, *words(settings, tmp_path / "o", "--num-processes", 2), OMP_NUM_THREADS="1")
    assert finished([process]).count("6 updates of 4 x 1 rows") == 1
    assert "| processes | 2, data parallel |" in (tmp_path / "o" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, more",
    [
        (4, {}),
        (2, {"loss": "dpo"}),
        (2, {"optim": "paged_adamw_8bit", "packing": True}),
        (3, SHARDED | {"gradient_checkpointing": True, "add_tokens": ["mugs"]}),
        (2, SHARDED | {"loss": "dpo"}),
        (2, SHARDED | {"loss": "dpo", "precompute_reference": False, "use_dora": True}),
        (2, SHARDED | {"loss": "kto", "precompute_reference": False}),
        (2, SHARDED | {"optim": "paged_adamw_8bit", "packing": True, "init_lora_weights": "pissa"}),
    ],
)
def test_more_processes_and_other_losses(count, more, settings, tmp_path):
    if "loss" in more:
        settings = changed(settings, "dpo", tmp_path)
    settings |= more
    processes = started(settings, tmp_path / "o", count)
    alone(settings, tmp_path / "alone")
    finished(processes)
    check_equal(tmp_path / "o", tmp_path / "alone")


@pytest.mark.parametrize(
    "parallel, count, kills",
    [("fsdp", 2, 1), *(pytest.param(how, 3, 10, marks=pytest.mark.slow) for how in ("ddp", "fsdp"))],
)
def test_killed_at_random_they_go_on_in_the_same_bits(parallel, count, kills, settings, tmp_path):
    draw, rounds, done = random.Random(0), 0, 0
    settings |= {"lora_dropout": 0.1, "num_train_epochs": 4, "parallel": parallel, "metric": [], "eval_data": None}
    finished(started(settings, tmp_path / "straight", count))
    while done < kills:
        processes = started(settings, tmp_path / "o", count, *["--resume"] * (tmp_path / "o").exists())
        processes[0].until(lambda first=processes[0]: bool(first.out))  # before all have met, torchrun ends the others
        victim, step = processes[draw.randrange(count)], saved(tmp_path / "o") + draw.randint(0, 5)
        victim.until(lambda step=step: saved(tmp_path / "o") >= step)
        time.sleep(draw.uniform(0, 0.3))
        if not processes[0].process.is_alive():  # it was done before
            finished(processes)
            rounds += check_same(tmp_path, rounds)
            continue
        victim.send(signal.SIGKILL)
        killed, done = time.monotonic(), done + 1
        ended = {victim}
        for process in processes:
            end = process.wait(20)
            if process is victim:
                assert end.code == -signal.SIGKILL
            elif end.code:  # it may have had its last exchange before
                names = [f"process {processes.index(other)} has ended" for other in ended]
                assert end.code == 2 and any(name in end.err for name in names), end.err
                ended.add(processes[0])  # the first one has the store here, and may be gone when others ask
        assert time.monotonic() - killed < 20
    finished(started(settings, tmp_path / "o", count, "--resume"))
    check_same(tmp_path, rounds)


def saved(output):
    """The step of the newest checkpoint."""
    return max((int(path.name.split("-")[1]) for path in (output / "checkpoints").glob("checkpoint-*")), default=0)


def check_same(folder, number):
    """The interrupted run has the adapter of the undisturbed one. Make room for another run."""
    assert adapter_bytes(folder / "o") == adapter_bytes(folder / "straight")
    (folder / "o").rename(folder / f"o{number}")
    return 1


@pytest.mark.slow
def test_stopped_under_torchrun_they_go_on_in_the_same_bits(settings, tmp_path):
    settings |= {"lora_dropout": 0.1, "num_train_epochs": 4}
    finished(started(settings, tmp_path / "straight", 2))
    launch = words(settings, tmp_path / "o", "--num-processes", 2)
    process = Forked(command_line, *launch, OMP_NUM_THREADS="1")
    process.until((tmp_path / "o" / "checkpoints" / "checkpoint-4").is_dir)
    workers = subprocess.check_output(["pgrep", "-P", str(process.process.pid)], text=True).split()
    subprocess.run(["kill", "-9", workers[-1]], check=True)
    end = process.wait(30)
    assert end.code > 0 and "has ended" in end.err
    process = Forked(command_line, *launch, "--resume", OMP_NUM_THREADS="1")
    process.until((tmp_path / "o" / "checkpoints" / "checkpoint-10").is_dir)
    process.send(signal.SIGTERM)
    end = process.wait(60)
    assert "is saved" in end.err and end.code == 128 + signal.SIGTERM
    finished([Forked(command_line, *launch, "--resume", OMP_NUM_THREADS="1")])
    assert adapter_bytes(tmp_path / "o") == adapter_bytes(tmp_path / "straight")


def count_received(path, folder):
    """Train, and write each update's bytes: what the collectives bring to this process, by their kind, and the
    states of its optimizer."""
    received, updates = Counter(), []

    def counted(name, share):
        call = getattr(dist, name)

        def wrapped(*args, **named):
            received[name] += share(*args, *named.values())
            return call(*args, **named)

        setattr(dist, name, wrapped)

    def step(run):
        received.clear()
        row = optimizer_step(run)
        states = [tensor for state in run.optimizer.state.values() for tensor in state.values()]
        updates.append({**received, "states": sum(tensor.nbytes for tensor in states if tensor.ndim)})
        return row

    # A ring's all-reduce brings each value twice, but half of them, the own part, stay at 2 processes.
    counted("all_reduce", lambda tensor, *_: tensor.nbytes)
    counted("broadcast", lambda tensor, number: tensor.nbytes * (number != int(os.environ["RANK"])))
    counted("all_gather_single", lambda whole, own, *_: whole.nbytes - own.nbytes)
    loop.optimizer_step = step
    try:
        command_line("train", "--config", path)
    finally:
        (folder / os.environ["RANK"]).write_text(json.dumps(updates))


@pytest.mark.parametrize(
    "parallel, shards", [("fsdp", True), *(pytest.param("ddp", how, marks=pytest.mark.slow) for how in (False, True))]
)
def test_an_update_receives_what_the_plan_says(parallel, shards, checkpoint, settings, tmp_path):
    settings |= {"parallel": parallel, "shard_optimizer": shards, "metric": [], "eval_data": None, "max_steps": 2}
    path = words(settings, tmp_path / "o")[-1]
    finished(ranks(2, count_received, path, tmp_path))
    names = ("parallel", "shard_optimizer", "r", "gradient_accumulation_steps")
    counted = plan(str(checkpoint), num_processes=2, **{name: settings[name] for name in names})
    planned = {term.name: term.num_bytes for term in (*counted.terms, *counted.exchanged)}
    num_linears, blocks = 14, 32  # bytes of a block's codes
    (first, found), (_, other) = (json.loads((tmp_path / number).read_text()) for number in "10")
    assert first == found
    own, received = ([each.get(key, 0) for each in (found, other)] for key in ("states", "broadcast"))
    assert max(own) == planned["AdamW states"] and sum(own) == (2 if shards else 4) * planned["gradients"]
    assert sum(received) == planned["gradients"] * shards == 2 * planned.get("updated weights", 0)
    flags = 4 * 2 * num_linears + 4 + 8 * 8  # of each LoRA weight; a wait; the losses
    assert found["all_reduce"] == planned["gradients"] + flags
    gathered, passes = found.get("all_gather_single", 0), 4
    most = passes * 2 * num_linears * max(ALIGNMENT, blocks)  # of a weight's codes and of its scales
    assert abs(gathered - planned.get("layers", 0)) <= most
    assert gathered > 5 * most if parallel == "fsdp" else gathered == 0


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_several_processes_evaluate_as_one(parallel, settings, tmp_path):
    adapter = alone({**settings, "max_steps": 1, "eval_data": None, "metric": []}, tmp_path / "o").adapter
    how = ("eval", "--model", settings["model"], "--adapter", adapter, "--data", settings["data"], "--device", "cpu")
    several = ranks(2, command_line, *how, "--parallel", parallel)
    said, expected = finished(several), finished([Forked(command_line, *how)])
    assert "loss" in expected and said == expected


def exchange_once(how):
    """In each of two processes: the second one stays away, ends with an error, or ends without a word."""
    ranks_module.EXCHANGE = datetime.timedelta(seconds=2)
    ranks = join("cpu")
    with ranks.together(whole_run=True):
        if ranks.is_first:
            return ranks.wait(ranks_module.EXCHANGE)
        if how == "hangs":
            time.sleep(8)
        if how == "fails":
            raise UserError("the rows must be readable", "a bad row", "correct it")


@pytest.mark.parametrize(
    "how, said",
    [
        ("hangs", "process 1 does not answer"),
        ("fails", "process 1 has ended: the rows must be readable   found: a bad row"),
        ("leaves", "process 1 has ended"),
    ],
)
def test_the_error_names_the_process_that_is_missing(how, said):
    first, _ = ranks(2, exchange_once, how)
    end = first.wait(20)
    assert end.code == 1 and said in end.err, end.err


def meet():
    ranks_module.MEETING = datetime.timedelta(seconds=1)
    if os.environ["RANK"] == "0":
        join("cpu")


def test_processes_wait_ten_minutes_for_one_that_does_not_come():
    first, _ = ranks(2, meet)
    end = first.wait(20)
    assert end.code == 1 and "all processes of a run must meet" in end.err and "1/2 clients" in end.err, end.err


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as some cluster's jobs have it, with nothing else of torchrun's
    assert process_number() == 0, "it speaks, and it is the first one of its run"
    ranks = Ranks()
    x = torch.ones(3)
    assert ranks.sum(x) is x and ranks.share([1, 2]) == [1, 2] and ranks.gather({"a": 1}) == [{"a": 1}]
    assert join("cuda:7") == ranks, "without torchrun, nothing is connected"
    with ranks.first_alone():
        ranks.wait()


def test_shares_are_a_partition():
    for count in (1, 2, 3, 5):
        shares = [Ranks(number, count).share(list(range(7))) for number in range(count)]
        assert sorted(item for share in shares for item in share) == list(range(7))


def test_the_plan_of_a_process(checkpoint):
    one, two, three = (
        {term.name: term.num_bytes for term in plan(str(checkpoint), num_processes=n, parallel="fsdp").terms}
        for n in (1, 2, 3)
    )
    base = one["base, 4-bit codes"] + one["base, scales"]
    assert two["base, own shard"] == pytest.approx(base / 2, rel=0.02), "less the scales of scales, and alignment"
    assert three["base, own shard"] == pytest.approx(base / 3, rel=0.02)
    assert two["gathered layers"] == three["gathered layers"] == pytest.approx(3 * base / 2, rel=0.02)
    with pytest.raises(UserError, match="a run must have a process"):
        plan(str(checkpoint), num_processes=0)


REFUSED = {"weights_budget": "1GiB", "modules_to_save": ["lm_head"], "task": "reward", "calibrate": True}


@pytest.mark.parametrize("name, value", REFUSED.items())
def test_what_a_sharded_base_does_not_take(name, value, settings):
    settings |= {name: value, "metric": [], "sample_prompts": None}
    make_config(TrainConfig, settings)
    with pytest.raises(UserError, match=rf"{name}.* parallel fsdp|parallel fsdp does not take {name}"):
        make_config(TrainConfig, settings | SHARDED)


def test_models_that_cannot_be_sharded(checkpoint):
    model = read_model(inspect_checkpoint(checkpoint))
    check_shardable(replace(model))
    decoder = model.modules.model
    decoder.projection = torch.nn.Linear(64, 64, device="meta")
    with pytest.raises(UserError, match=r"model\.projection is in 4 bits outside"):
        check_shardable(replace(model))
    del decoder.projection
    decoder.layers[1].mlp = decoder.layers[0].mlp
    with pytest.raises(UserError, match=r"model\.layers\.0 and model\.layers\.1 share theirs"):
        check_shardable(replace(model))


def run_layers(folder, numbers):
    """A sharded model whose decoder runs these layers."""
    ranks = join("cpu")
    model: Any = load_model(str(folder), compute_dtype="float32", device="cpu", sharded=True)
    layers = list(model.model.layers)
    model.model.layers = torch.nn.ModuleList([layers[number] for number in numbers])
    model.model.config.num_hidden_layers = len(numbers)
    with ranks.together(whole_run=True):
        model(input_ids=torch.arange(2, 6)[None], use_cache=False)


@pytest.mark.parametrize("numbers", [[0, 0, 1], [0]])
def test_a_model_must_run_each_layer_once_and_in_order(numbers, checkpoint):
    for process in ranks(2, run_layers, checkpoint, numbers):
        end, found = process.wait(), f"layers {', '.join(map(str, numbers))} in a forward"
        assert end.code == 1 and found in end.err, end.err


def test_what_several_processes_cannot_do(settings, monkeypatch):
    with pytest.raises(UserError, match="a micro-batch of the window"):
        check_ranks(make_config(TrainConfig, settings), Ranks(0, 5))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="a device of its own"):
        join("cuda:0")
