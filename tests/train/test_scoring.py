"""Exact: metrics on generated answers, their prompts, and what is refused."""

import json
import math

import pytest

from onecard.config import DataConfig, TrainConfig, make_config
from onecard.data.chat.mask import IGNORE
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.hf.load import load_tokenizer
from onecard.infer.batch import answer_all
from onecard.kernels.cpu import allocator
from onecard.train.scoring import exact_match, make_questions, make_rouge, make_score
from tests.conftest import chat_rows, write_rows
from tests.train.test_loop import run

ROWS = [
    {"prompt": "how many?", "completion": " two mugs"},
    *chat_rows(2),
    {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
            {"role": "assistant", "content": "four"},
        ]
    },
]


@pytest.mark.parametrize("row", ROWS)
def test_a_question_is_the_row_without_its_last_answer(row, checkpoint, tmp_path):
    """The row's own tokens up to its last run of labels."""
    tokenizer = load_tokenizer(str(checkpoint))
    dataset = load_dataset(str(write_rows(tmp_path / "d.jsonl", [row])), tokenizer, DataConfig())
    (question,) = make_questions(dataset, tokenizer, None)
    (example,) = dataset.examples
    learned = [label != IGNORE for label in example.labels]
    end = max(i for i, yes in enumerate(learned) if yes)
    start = max(i for i, yes in enumerate(learned[:end]) if not yes) + 1
    assert question.ids == example.input_ids[:start]
    text = tokenizer.decode(example.input_ids[start:end], skip_special_tokens=True)
    assert text.strip() == question.reference.strip()


def test_rows_without_an_answer_are_refused(checkpoint, tmp_path):
    tokenizer = load_tokenizer(str(checkpoint))
    data = str(write_rows(tmp_path / "d.jsonl", [{"text": "the lazy dog"}]))
    with pytest.raises(UserError, match="prompt and an answer"):
        make_questions(load_dataset(data, tokenizer, DataConfig()), tokenizer, None)


def test_the_metrics(tmp_path, monkeypatch):
    assert exact_match(["a ", "b"], ["a", "c"]) == {"exact_match": 0.5}
    found = make_rouge()(["the cat sat"], ["the cat ran off"])
    assert found["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))  # F1 of 2 of 3 and 2 of 4 words
    assert found["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onecard_own_metric.py").write_text(
        "def longer(prediction, reference):\n    return len(prediction) > len(reference)\n"
        "def total(predictions, references):\n    return len(predictions) + len(references)\n"
        "def broken(prediction, reference):\n    return float('nan')\n"
        "def one(prediction):\n    return 0\n"
    )
    assert make_score("onecard_own_metric:longer")(["aa", "b"], ["a", "b"]) == {"longer": 0.5}
    assert make_score("onecard_own_metric:total")(["a", "b"], ["c", "d"]) == {"total": 4.0}
    for name, said in (("broken", "finite number"), ("one", "two arguments"), ("none", "no attribute 'none'")):
        with pytest.raises(UserError) as error:
            make_score(f"onecard_own_metric:{name}")(["a"], ["b"])
        assert said in str(error.value), error.value
    with pytest.raises(UserError, match="No module named"):
        make_score("onecard_no_such_module:f")


def test_a_run_measures_answers_at_each_evaluation(checkpoint, tmp_path, monkeypatch):
    """A run that learns one answer by heart goes from 0 to 1, and the best is the first with the largest value."""
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": f"{i % 4} mugs", "completion": " fox"} for i in range(32)])
    held = write_rows(tmp_path / "e.jsonl", [{"prompt": f"{i} mugs", "completion": " fox"} for i in range(4)])
    held_at = {}

    def watched(*args):
        held_at["start"] = max(held_at.get("start", 0), sum(map(len, allocator._free.values())))
        return answer_all(*args)

    monkeypatch.setattr("onecard.train.evaluator.answer_all", watched)
    monkeypatch.setattr(allocator, "SMALLEST", 1 << 10)  # a small model's results count as large
    result = run(
        checkpoint, data, tmp_path / "o", eval_data={"held": str(held)}, metric=["exact_match"], eval_steps=4,
        metric_max_new_tokens=4, num_train_epochs=24, max_seq_length=48, learning_rate=2e-2, lora_dropout=0.0,
        metric_for_best_model="held_exact_match", load_best_model_at_end=True, per_device_eval_batch_size=3,
    )  # fmt: skip
    assert held_at == {"start": 0}, "blocks of a training step wait beside the answers"
    name = "eval_held_exact_match"
    values = {row["step"]: row[name] for row in result.metrics if name in row}
    assert result.report.before[name] == 0 and max(values.values()) == 1
    best = min(step for step, value in values.items() if value == 1)
    assert result.report.facts[f"best {name}"] == f"1.0000 at step {best}"
    assert result.report.after[name] == 1
    rows = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row[name]) for row in rows if "eval_held_loss" in row)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"metric": ["bleu"]}, "exact_match, rouge or module:function"),
        ({"metric": ["exact_match"], "eval_data": None}, "metric needs eval_data"),
        ({"metric": ["a:f", "b:f"]}, "name of its own"),
        ({"metric_for_best_model": "rouge1", "eval_steps": 1}, "must be one of eval_loss"),
    ],
)
def test_settings_that_cannot_hold_are_refused(more, said):
    with pytest.raises(UserError) as error:
        make_config(TrainConfig, {"model": "m", "data": "d", "output": "o", "eval_data": "e", **more})
    assert said in str(error.value)
