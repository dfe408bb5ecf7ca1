"""Metrics on generated answers: each compares the model's greedy answers with the rows' own.

`exact_match` is the share of answers that equal their reference, without the white space at both ends. `rouge` is the
mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L of the rouge_score package (Lin 2004), without stemming, as in evaluate. A name
MODULE:FUNCTION is the user's own.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onecard.data.chat.mask import alpaca_text, prompt_form, prompt_ids, text_ids
from onecard.data.chat.spans import learned_turns
from onecard.data.dataset import Dataset
from onecard.data.records import Record
from onecard.errors import UserError, first_line

Score = Callable[[list[str], list[str]], dict[str, float]]  # predictions, references -> values by name


@dataclass(frozen=True)
class Question:
    """A row's prompt, in the form of training, and the answer that the row has.

    Attributes:
        goes_on: whether the answer continues the prompt's text.
    """

    ids: list[int]
    goes_on: bool
    reference: str


def make_questions(dataset: Dataset, tokenizer: Any, most: int | None) -> list[Question]:
    """Return the questions of the first rows: the last learned answer of each is left out.

    Rows of calls, and prompts longer than max_seq_length, have none.

    Raises:
        UserError: no row has a question.
    """
    questions: list[Question] = []
    for record in dataset.records:
        if most is not None and len(questions) == most:
            break
        question = question_of(record, tokenizer)
        if question is not None and len(question.ids) <= dataset.max_seq_length:
            questions.append(question)
    if not questions:
        must = "a metric needs rows with a prompt and an answer"
        do = "leave metric out, or pass eval data of chats or of prompt and completion"
        raise UserError(must, f"none, in rows of format {dataset.format}", do, dataset.examples[0].where)
    return questions


def question_of(record: Record, tokenizer: Any) -> Question | None:
    """Return a record's question; None for a text, and for an answer that is no text."""
    if record.messages is None:
        if record.completion is None:
            return None
        return Question(text_ids(record.prompt or "", tokenizer), True, record.completion)
    if prompt_form(record, tokenizer) == "alpaca":
        prompt, answer = alpaca_text(record)
        return Question(text_ids(prompt, tokenizer), False, answer)
    last = max(learned_turns(record), default=0)
    answer = record.messages[last].get("content")
    if not last or not isinstance(answer, str) or not answer.strip() or record.messages[last].get("tool_calls"):
        return None
    asked = [dict(turn) for turn in record.messages[:last]]
    return Question(prompt_ids(asked, tokenizer, record.tools), False, answer)


def make_score(metric: str) -> Score:
    """Return the function that computes a metric. Raises UserError if it is not there."""
    if metric == "exact_match":
        return exact_match
    return make_rouge() if metric == "rouge" else own_metric(metric)


def exact_match(predictions: list[str], references: list[str]) -> dict[str, float]:
    hits = sum(found.strip() == expected.strip() for found, expected in zip(predictions, references))
    return {"exact_match": hits / len(references)}


def make_rouge() -> Score:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        do = 'pip install "onecard[rouge]"'
        raise UserError("the metric rouge needs the package rouge_score", str(error), do, "metric") from None
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)

    def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
        found = [scorer.score(expected, answer) for answer, expected in zip(predictions, references)]
        return {
            name: sum(each[name].fmeasure for each in found) / len(found) for name in ("rouge1", "rouge2", "rougeL")
        }

    return rouge


def own_metric(metric: str) -> Score:
    """Import the user's function: f(prediction, reference), or f(predictions, references) over all answers."""
    module, _, name = metric.partition(":")
    must, do = "a metric must be a function that can be imported", f"write it in {module}.py in the current folder"
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, same as for python -c
    try:
        function: Any = getattr(importlib.import_module(module), name)
        names = list(inspect.signature(function).parameters)
    except Exception as error:  # the module is the user's code
        raise UserError(must, f"{type(error).__name__}: {first_line(error)}", do, f"metric {metric}") from None
    if len(names) < 2:
        do = "take prediction and reference, or the lists predictions and references"
        raise UserError("a metric must take two arguments", ", ".join(names) or "none", do, f"metric {metric}")
    over_lists = names[0].endswith("s")

    def score(predictions: list[str], references: list[str]) -> dict[str, float]:
        try:
            if over_lists:
                value = float(function(predictions, references))
            else:
                value = sum(float(function(*pair)) for pair in zip(predictions, references)) / len(references)
            if not math.isfinite(value):
                raise ValueError(f"{value}")
        except Exception as error:
            found, do = f"{type(error).__name__}: {first_line(error)}", "correct the function, then --resume"
            raise UserError("a metric must return a finite number", found, do, f"metric {metric}") from None
        return {name: value}

    return score
