"""Exact: the best evaluation, early stopping and what is kept equal transformers' Trainer; a resumed run the same."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from onecard.train.best import Best, BestPosition
from onecard.train.checkpoint import save_state
from tests.conftest import chat_rows, write_rows
from tests.train.test_kill import count_lines, end_with_kills, train
from tests.train.test_loop import adapter_bytes, fields, run

GOOD = {"model": "m", "data": "d", "output": "o"}
BEST = {  # of a run that learns, the largest loss is the first: the end is behind the best for certain
    "load_best_model_at_end": True, "metric_for_best_model": "eval_b_loss", "greater_is_better": True, "eval_steps": 2,
    "num_train_epochs": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    rows = chat_rows(40)
    return {
        name: str(write_rows(folder / f"{name}.jsonl", part)) for name, part in (("a", rows[24:28]), ("b", rows[28:]))
    }


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_the_rules_are_the_trainer_s(greater, threshold):
    """Random values, with ties and NaN: best value and step, and the moment of stopping."""
    rng = random.Random(0)
    for _ in range(200):
        values = [rng.choice([float("nan"), *(i / 8 for i in range(16))]) for _ in range(12)]
        ours = Best("eval_loss", greater, 3, threshold, BestPosition())
        theirs, state = EarlyStoppingCallback(3, threshold), TrainerState()
        args = SimpleNamespace(greater_is_better=greater, metric_for_best_model="loss")
        control, best_step = TrainerControl(), None
        for step, value in enumerate(values, 1):
            theirs.on_evaluate(args, state, control, {"eval_loss": value})
            best = state.best_metric if state.best_metric is not None else float("-inf" if greater else "inf")
            state.best_metric = best  # as Trainer._determine_best_metric has it
            if value > best if greater else value < best:
                state.best_metric, best_step = value, step
            ours.update(step, value)
            value = best if ours.position.value is None else ours.position.value
            assert (ours.position.step, value) == (best_step, state.best_metric)
            assert ours.position.num_without_improvement == theirs.early_stopping_patience_counter
            assert ours.is_over == control.should_training_stop
            if ours.is_over:
                break


def test_the_best_checkpoint_is_kept_as_one_of_the_limit(tmp_path):
    def there(limit, best):
        return sorted(int(p.name.split("-")[1]) for p in (tmp_path / f"{limit}-{best}").iterdir())

    for limit, best, expected in ((1, 2, [2, 6]), (2, 2, [2, 6]), (3, 2, [2, 5, 6]), (2, None, [5, 6]), (2, 6, [5, 6])):
        for step in range(1, 7):
            known = best if best is not None and best <= step else None
            save_state(tmp_path / f"{limit}-{best}", step, {"a": {"x": torch.zeros(1)}}, {}, limit, known)
        assert there(limit, best) == expected, (limit, best)


def test_a_run_ends_with_the_best_adapter(checkpoint, chats, held_out, tmp_path):
    result = run(checkpoint, chats, tmp_path / "o", eval_data=held_out, **{**BEST, "save_steps": 100})
    rows = [row for row in result.metrics if "eval_b_loss" in row]
    assert [row["step"] for row in rows][:3] == [2, 4, 6] and all("eval_a_loss" in row for row in rows)
    best = max(rows, key=lambda row: row["eval_b_loss"])
    assert best["step"] < result.metrics[-1]["step"], "the case must end behind its best"
    kept = load_file(tmp_path / "o" / "checkpoints" / f"checkpoint-{best['step']}" / "adapter.safetensors")
    saved = load_file(tmp_path / "o" / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default", ""): t.tolist() for name, t in kept.items()} == {
        name: t.tolist() for name, t in saved.items()
    }
    assert result.report.after == {name: best[name] for name in ("eval_a_loss", "eval_b_loss")}
    text = (tmp_path / "o" / "report.md").read_text()
    assert f"best eval_b_loss | {best['eval_b_loss']:.4f} at step {best['step']}" in text
    assert f"the adapter is that of step | {best['step']}" in text
    header, *lines = (tmp_path / "o" / "metrics.csv").read_text().splitlines()
    assert header.endswith("eval_a_loss,eval_b_loss") and len(lines) == len(result.metrics)


def test_early_stopping_ends_with_an_adapter_and_says_so(checkpoint, chats, held_out, tmp_path):
    more = {"eval_data": held_out, **BEST, "early_stopping_patience": 2, "num_train_epochs": 2}
    result = run(checkpoint, chats, tmp_path / "o", **more)
    rows = [row for row in result.metrics if "eval_b_loss" in row]
    best = max(rows, key=lambda row: row["eval_b_loss"])
    last = result.metrics[-1]["step"]
    assert last == best["step"] + 4 == result.report.num_steps
    planned = result.report.facts["stopped early"]
    assert planned.startswith(f"at step {last} of ") and "2 evaluations without improvement" in planned
    expected = adapter_bytes(tmp_path / "o")
    shutil.rmtree(tmp_path / "o" / "adapter")
    again = run(checkpoint, chats, tmp_path / "o", resuming=True, **more)  # nothing is left to train
    assert adapter_bytes(tmp_path / "o") == expected and len(again.metrics) == len(result.metrics)
    shutil.rmtree(tmp_path / "o" / "checkpoints" / f"checkpoint-{best['step']}")
    with pytest.raises(UserError, match="best checkpoint must be there"):
        run(checkpoint, chats, tmp_path / "o", resuming=True, **more)


def test_epochs_end_with_an_evaluation_and_a_checkpoint(checkpoint, chats, held_out, tmp_path):
    """Windows of 3 micro-batches end where they end: the update that takes an epoch's last rows is the epoch's end."""
    result = run(
        checkpoint, chats, tmp_path / "o", eval_data=held_out["a"], eval_strategy="epoch", save_strategy="epoch",
        save_steps=None, num_train_epochs=3, gradient_accumulation_steps=3,
    )  # fmt: skip
    from onecard.config import DataConfig
    from onecard.data.load import load_dataset
    from onecard.data.loader import Loader
    from onecard.hf.load import load_tokenizer

    data = load_dataset(str(chats), load_tokenizer(str(checkpoint)), DataConfig(max_seq_length=96))
    loader = Loader(data.examples, 96, True, 1, 42)
    ends = [sum(loader.num_batches(e) for e in range(epoch + 1)) for epoch in range(3)]
    expected = [-(-end // 3) for end in ends]
    assert [row["step"] for row in result.metrics if "eval_loss" in row] == expected
    folders = (tmp_path / "o" / "checkpoints").iterdir()
    assert sorted(int(folder.name.split("-")[1]) for folder in folders) == expected


def test_a_resumed_run_keeps_the_best_value_and_the_patience(checkpoint, chats, held_out, tmp_path):
    more = {"eval_data": held_out, **BEST, "early_stopping_patience": 3, "num_train_epochs": 2}
    run(checkpoint, chats, tmp_path / "straight", **more)
    for k in (1, 3, 4, 6):  # before the best, between two evaluations, after one, and after the next
        output = tmp_path / f"resumed-{k}"
        shutil.copytree(tmp_path / "straight", output)
        shutil.rmtree(output / "adapter")
        for folder in (output / "checkpoints").iterdir():
            if int(folder.name.split("-")[1]) > k:
                shutil.rmtree(folder)
        run(checkpoint, chats, output, resuming=True, **more)
        assert adapter_bytes(output) == adapter_bytes(tmp_path / "straight")
        assert count_lines(output) == count_lines(tmp_path / "straight")


@pytest.mark.slow
def test_kill_9_keeps_the_best_value_and_the_patience(checkpoint, chats, held_out, tmp_path):
    """Killed at random moments, the run stops at the same step with the same bytes."""
    more = {"eval_data": held_out, **BEST, "early_stopping_patience": 3, "num_train_epochs": 2, "save_total_limit": 1}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    path = tmp_path / "run.yaml"

    def begin(output):
        path.write_text(json.dumps(fields(checkpoint, chats, output, **{**more, "save_steps": 3})))
        return train(path, "--resume")

    code, _, err = begin(straight).wait()
    assert code == 0, err
    end_with_kills(lambda: begin(killed), killed, 2, random.Random(1))
    assert adapter_bytes(killed) == adapter_bytes(straight)
    assert count_lines(killed) == count_lines(straight)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"eval_data": ["a.jsonl", "b=b.jsonl"]}, "must have a name"),
        ({"eval_data": ["a=x", "a=y"]}, "name of its own"),
        ({"eval_data": {"a b": "x"}}, "letters, digits"),
        ({"load_best_model_at_end": True}, "needs eval_data"),
        ({"load_best_model_at_end": True, "eval_data": "a"}, "several evaluations"),
        ({"early_stopping_patience": 2, "eval_data": "a", "eval_strategy": "no"}, "several evaluations"),
        ({"load_best_model_at_end": True, "eval_data": "a=x", "eval_steps": 1}, "one of eval_a_loss"),
        ({"eval_strategy": "epoch"}, "needs eval_data"),
        ({"eval_strategy": "epoch", "eval_data": "a", "eval_steps": 2}, "eval_steps is for"),
        ({"save_strategy": "epoch", "save_steps": 2}, "save_steps is for"),
        ({"greater_is_better": True}, "need load_best"),
        (
            {"load_best_model_at_end": True, "eval_data": "a", "eval_steps": 1, "save_strategy": "no"},
            "leave save_strategy no out",
        ),
    ],
)
def test_settings_that_cannot_hold_are_refused(more, said):
    with pytest.raises(UserError) as error:
        make_config(TrainConfig, {**GOOD, **more})
    assert said in str(error.value)


def test_names_of_eval_files():
    assert make_config(TrainConfig, {**GOOD, "eval_data": "f"}).eval_sources == {"": "f"}
    assert make_config(TrainConfig, {**GOOD, "eval_data": ["f"]}).eval_sources == {"": "f"}
    assert make_config(TrainConfig, {**GOOD, "eval_data": ["a=f", "b=g=h"]}).eval_sources == {"a": "f", "b": "g=h"}
    config = make_config(TrainConfig, {**GOOD, "eval_data": {"a": "f", "b": "g"}})
    assert config.eval_metrics == ["eval_a_loss", "eval_b_loss"]
    assert make_config(TrainConfig, config.model_dump()) == config
