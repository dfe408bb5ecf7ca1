"""`onecard demo`: train and evaluate the embedded model on the embedded data, with the code of `onecard train`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from onecard.config import TrainConfig, make_config
from onecard.data.chat.mask import prompt_ids
from onecard.errors import UserError
from onecard.hf.load import load_tokenizer
from onecard.infer.batch import answer_all
from onecard.memory.workload import Answers
from onecard.train.report import format_bytes
from onecard.train.result import Result
from onecard.train.session import run_training

FOLDER = Path(__file__).parent
BATCH_SIZE, ANSWER_TOKENS = 64, 96  # prompts that are answered at a time, and the most tokens of an answer
SETTINGS: dict[str, Any] = {
    "model": str(FOLDER / "base"),
    "data": str(FOLDER / "data" / "train.jsonl"),
    "eval_data": str(FOLDER / "data" / "heldout.jsonl"),
    "r": 16,
    "lora_alpha": 32,
    "learning_rate": 2e-3,
    "max_seq_length": 512,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 5,
    "warmup_ratio": 0.05,
}


def run_demo(output: str, console: Console) -> Result:
    """Train on the embedded data, then print the share of exactly right held-out answers before and after.

    Raises:
        UserError: the share after training is not larger than before.
    """
    config = make_config(TrainConfig, {**SETTINGS, "output": output}, "demo")
    tokenizer = load_tokenizer(config.model)
    rows = read_rows(Path(SETTINGS["eval_data"]))
    scores: dict[str, float] = {}

    def accuracy(result: Result, when: str) -> dict[str, str]:
        scores[when] = exact_match(result.model, result.tokenizer, rows)
        return {f"exact match {when}": f"{scores[when]:.1%} of {len(rows)} held-out messages"}

    prompts = ordered_prompts(rows, tokenizer)
    widths = tuple(max(len(ids) for ids, _ in batch) for batch in in_batches(prompts))
    result = run_training(config, False, console, accuracy, Answers(BATCH_SIZE, widths, ANSWER_TOKENS))
    console.rule("result", align="left")
    console.print(
        f"exact match on {len(rows)} held-out messages: {scores['before']:.1%} before, {scores['after']:.1%} after"
    )
    for name, num_bytes in result.report.memory[-2:]:
        console.print(f"{name}: {format_bytes(num_bytes)}", highlight=False)
    if scores["after"] <= scores["before"]:
        releases = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
        raise UserError(
            "the demo must answer more held-out messages right after training than before",
            f"{scores['before']:.1%} before, {scores['after']:.1%} after, with {releases}",
            "install the releases that constraints.txt names, and run `onecard demo` again",
            output,
        )
    return result


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exact_match(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Return the share of rows whose greedy answer equals the reference in every character."""
    pairs = ordered_prompts(rows, tokenizer)
    prompts = [ids for ids, _ in pairs]
    answers = answer_all(model, tokenizer, prompts, ANSWER_TOKENS, BATCH_SIZE, [False] * len(prompts))
    return sum(answer == expected for answer, (_, expected) in zip(answers, pairs)) / len(rows)


def ordered_prompts(rows: list[dict[str, Any]], tokenizer: Any) -> list[tuple[list[int], str]]:
    """Return the rows' (prompt tokens, expected answer), the shortest prompt first."""
    pairs = [(prompt_ids(row["messages"][:-1], tokenizer), row["messages"][-1]["content"]) for row in rows]
    return sorted(pairs, key=lambda pair: len(pair[0]))


def in_batches(prompts: list[tuple[list[int], str]]) -> list[list[tuple[list[int], str]]]:
    return [prompts[start : start + BATCH_SIZE] for start in range(0, len(prompts), BATCH_SIZE)]
