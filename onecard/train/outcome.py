"""What a run has measured before and after, for its report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from onecard.adapter.served import without_grids
from onecard.config import TrainConfig
from onecard.data.sources import flags_of, name_of
from onecard.data.stream import StreamLoader
from onecard.memory.measure import apart, format_bytes, peak_memory_bytes
from onecard.paging.mover import Statistics
from onecard.train.evaluator import Evaluator
from onecard.train.prepare import Prepared, rows_of
from onecard.train.report import Report
from onecard.train.result import Result
from onecard.train.run import Run
from onecard.train.samples import answer_samples


def measure(
    result: Result, prepared: Prepared, when: str, extra: Any, run: Run, evaluate: Evaluator | None
) -> dict[str, Any]:
    """Return the evaluation and the answers to the sample prompts, with the current adapter."""
    found: dict[str, Any] = {"facts": {}, "scores": {}}
    if evaluate is not None:
        found["scores"] = last_scores(result, run) or evaluate(run)
    result.model.eval()  # no dropout in the samples; the loop sets training mode again
    found["answers"] = []
    with run.ranks.in_step(run.base), apart():
        if run.ranks.is_first:
            asked = (prepared.tokenizer, prepared.samples, prepared.form.end_tokens)
            with without_grids(result.model):  # as generate and chat answer with the adapter
                found["answers"] = answer_samples(result.model, *asked)
            if extra:
                found["facts"] = extra(result, when)
    return found


def last_scores(result: Result, run: Run) -> dict[str, float]:
    """Return the evaluation of the current adapter from the metrics; empty if there is none."""
    best = run.best
    step = best.position.step if run.config.load_best_model_at_end and best is not None else None
    rows = [row for row in result.report.metrics if row["step"] == (step or run.step)]
    scores = {name: value for name, value in (rows[-1] if rows else {}).items() if name.startswith("eval_")}
    return scores if set(run.config.eval_losses) <= set(scores) else {}


def empty_report(config: TrainConfig, prepared: Prepared) -> Report:
    return Report(
        title=f"{Path(config.model).name} tuned on {name_of(config.data)}",
        command=shlex.join(sys.argv),
        config=config.model_dump(),
        data=prepared.training.summary(),
        sources=[share.cells() for share in prepared.training.shares],
        memory=[(f"plan: {term.name}", term.num_bytes) for term in prepared.plan.terms],
        metrics=[],
        num_steps=0,
        seconds=0.0,
    )


def finish_report(result: Result, prepared: Prepared, before: dict[str, Any], after: dict[str, Any], run: Run) -> None:
    """Fill the report with what was measured."""
    report = result.report
    report.num_steps = run.step
    if isinstance(run.loader, StreamLoader):
        report.data = run.loader.stream.summary()
    report.before, report.after = before["scores"], after["scores"]
    prompts = [text for text, _ in prepared.samples]
    report.samples = list(zip(prompts, before["answers"], after["answers"]))
    report.facts |= {**before["facts"], **after["facts"]}
    if run.config.adapter is not None:
        report.facts["went on from"] = run.config.adapter
    if prepared.new_tokens:
        name, _, counts = prepared.new_tokens.counts(prepared.occurrences, rows_of(run.config)).partition(": ")
        report.facts[name] = counts
    report.facts |= paging_facts(run.paged)
    report.memory += [
        ("plan: total", prepared.plan.total_bytes),
        ("measured: peak beside the process", peak_memory_bytes(run.device) - prepared.process_bytes),
        ("the process itself", prepared.process_bytes),
    ]  # fmt: skip
    model, adapter = map(shlex.quote, (run.config.model, str(result.adapter)))
    data = flags_of(run.config.data, run.config)
    uses = ["generate --prompt '…'", "chat"] if not prepared.labels else ["classify --text '…'"]
    commands = [use.split(" ", 1) for use in uses]
    report.next_commands = [
        *(" ".join([f"onecard {name} --model {model} --adapter {adapter}", *more]) for name, *more in commands),
        *([f"onecard eval --model {model} --adapter {adapter} {data}"] if data and run.config.loss == "sft" else []),
    ]


def paging_facts(paged: Statistics) -> dict[str, str]:
    """Return what was paged, for the report. Empty if nothing was paged."""
    if not paged.bytes_in and not paged.bytes_out:
        return {}
    facts = {"paged in, out": f"{format_bytes(paged.bytes_in)}, {format_bytes(paged.bytes_out)}"}
    if paged.touches:
        facts["pages there in time"] = f"{paged.hits / paged.touches:.1%}"
    return {**facts, "waited for pages": f"{paged.stall_seconds:,.1f} s"}
