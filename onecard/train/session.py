"""A whole run: checks, preview and plan before the weights load; then train, save the adapter, report."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table

from onecard.config import TrainConfig, parse_bytes
from onecard.data.dataset import Dataset, load_dataset
from onecard.data.loader import Loader
from onecard.data.preview import render_preview
from onecard.data.template import prompt_ids
from onecard.errors import UserError
from onecard.hf.checkpoint import inspect_checkpoint, tokenizer_fingerprint
from onecard.hf.load import find_checkpoint, fingerprint, load_model, load_tokenizer, pick_compute_dtype, pick_device
from onecard.infer.generate import generate
from onecard.memory.measure import available_bytes, peak_memory_bytes, return_large_blocks
from onecard.memory.plan import Fit, Model, Plan, choose_fit, describe, plan_terms, read_model
from onecard.nn.lora import lora_config
from onecard.optim.schedule import learning_rate
from onecard.train.loop import Interrupted, choose_loss, count_steps, evaluate, resume, train
from onecard.train.metrics import Metrics
from onecard.train.progress import Progress
from onecard.train.report import Report, format_bytes, write_report
from onecard.train.state import load_newest
from onecard.train.step import Run

SAMPLE_TOKENS = 96
SHARE_OF_FREE = 0.8  # of the free memory, that a run may plan to take


@dataclass
class Prepared:
    """What is known before the weights load."""

    config: TrainConfig
    tokenizer: Any
    training: Dataset
    validation: Dataset | None
    plan: Plan
    fit: Fit
    why: str
    compute_dtype: torch.dtype
    identity: dict[str, str]


@dataclass
class Result:
    """What a run ends with."""

    model: Any
    tokenizer: Any
    report: Report
    adapter: Path


def run_training(config: TrainConfig, resuming: bool, console: Console, report_extra: Any = None) -> Result:
    """`onecard train`: from a checkpoint and a data file to output/adapter and output/report.html.

    Args:
        resuming: go on from the newest checkpoint in the output folder.
        report_extra: called as f(result, "before" | "after") -> dict of lines for the report.

    Raises:
        UserError: anything wrong with the input, before training where it can be known.
    """
    output = Path(config.output)
    state = load_newest(output / "checkpoints") if resuming else None
    check_output(output, resuming)
    return_large_blocks()
    prepared = prepare(config)
    config = prepared.config
    show(prepared, console)
    model = load_adapted(config, prepared, console)
    loader = Loader(
        prepared.training.examples,
        config.max_seq_length,
        config.packing,
        config.per_device_train_batch_size,
        config.seed,
    )
    run = Run(config, model, loader, count_steps(loader, config), prepared.identity)
    run.num_recomputed = prepared.fit.num_recomputed
    if run.optimizer.paged is not None:
        run.optimizer.paged.crowded = prepared.fit.states_away
    run.loss, slow = choose_loss(model, prepared.training)
    if slow:
        console.print(f"one document at a time with full logits: {slow}", style="yellow", markup=False)
    result = Result(model, prepared.tokenizer, empty_report(config, prepared), output / "adapter")
    before = measure(result, prepared, "before", report_extra, output)
    if state is not None:
        resume(run, state)
        for line in state.skipped:
            console.print(f"skipped a broken checkpoint: {line}", style="yellow", markup=False)
        console.print(f"resumed at step {run.step} of {run.num_steps}")
        threads = state.documents["progress"].get("num_threads")
        if run.device.type == "cpu" and threads != torch.get_num_threads():
            line = f"saved with {threads} threads, now {torch.get_num_threads()}: equal to rounding, not to the bit"
            console.print(line, style="yellow")
    elif resuming:
        console.print("no checkpoint yet: starting at step 0")
    start = time.perf_counter()
    train_shown(run, prepared, result, console, output)
    result.report.seconds = time.perf_counter() - start
    save_adapter(model, result.adapter)
    finish_report(result, prepared, before, measure(result, prepared, "after", report_extra, None), run)
    write_report(output, result.report)
    return result


def check_output(output: Path, resuming: bool) -> None:
    """Raise UserError rather than mix two runs."""
    if not resuming and output.exists() and any(output.iterdir()):
        raise UserError(
            "the output folder must be new or empty",
            f"{len(list(output.iterdir()))} entries",
            "pass --resume to go on with that run, or choose another --output",
            str(output),
        )


def prepare(config: TrainConfig) -> Prepared:
    """Check checkpoint, data and settings; nothing large is loaded."""
    folder = find_checkpoint(config.model)
    checkpoint = inspect_checkpoint(folder)
    dtype = pick_compute_dtype(config.compute_dtype, pick_device(config.device))
    tokenizer = load_tokenizer(config.model)
    training, validation = load_dataset(config.data, tokenizer, config), None
    if config.eval_data is not None:
        validation = load_dataset(config.eval_data, tokenizer, config)
    elif config.validation_split > 0:
        training, validation = training.split(config.validation_split, config.seed)
    identity = {
        "tokenizer": tokenizer_fingerprint(folder),
        "data": training.fingerprint(),
    }
    fit, plan, why = choose_memory(read_model(checkpoint), config, dtype)
    return Prepared(config, tokenizer, training, validation, plan, fit, why, dtype, identity)


def choose_memory(model: Model, config: TrainConfig, dtype: torch.dtype) -> tuple[Fit, Plan, str]:
    """What is kept, recomputed and paged, its bill, and why.

    Raises:
        UserError: nothing fits in device_memory, or in all that is free.
    """
    free = available_bytes(pick_device(config.device))
    limit = parse_bytes(config.device_memory) if config.device_memory else int(SHARE_OF_FREE * free)
    fit, plan = choose_fit(model, config, dtype, limit)
    kept = Plan(plan_terms(model, config, dtype, "qlora", Fit(0)))
    of = f"{format_bytes(limit)} given" if config.device_memory else f"{format_bytes(free)} free"
    if plan.total_bytes > (limit if config.device_memory else free):
        raise UserError(
            "the run must fit in memory",
            f"{format_bytes(plan.total_bytes)} with {describe(fit, model)}; {of}",
            "lower max_seq_length, per_device_train_batch_size or r, or pass --optim paged_adamw_8bit",
            "device_memory",
        )
    return (
        fit,
        plan,
        f"{describe(fit, model)}; resident and all kept it would be {format_bytes(kept.total_bytes)}, {of}",
    )


def show(prepared: Prepared, console: Console) -> None:
    """Data, one sample, plan and schedule, before the weights load."""
    config = prepared.config
    console.rule("data", align="left")
    colour = console.color_system is not None
    console.print(render_preview(prepared.training, prepared.tokenizer, config.packing, 1, colour))
    if prepared.validation:
        console.print(f"validation: {len(prepared.validation.examples):,} examples")
    console.rule("memory plan", align="left")
    console.print(plan_table(prepared.plan))
    console.print(prepared.why, highlight=False)
    console.rule("schedule", align="left")
    loader = Loader(
        prepared.training.examples,
        config.max_seq_length,
        config.packing,
        config.per_device_train_batch_size,
        config.seed,
    )
    steps = count_steps(loader, config)
    peak = max(learning_rate(step, steps, config) for step in range(steps))
    dtype = str(prepared.compute_dtype).removeprefix("torch.")
    console.print(
        f"{steps:,} updates of {config.gradient_accumulation_steps} x {config.per_device_train_batch_size} rows"
        f" of up to {config.max_seq_length:,} tokens; {loader.num_batches(0):,} micro-batches an epoch\n"
        f"learning rate {config.lr_scheduler_type}, peak {peak:.2e}; computing in {dtype}"
        f" on {pick_device(config.device)}, {torch.get_num_threads()} threads",
        highlight=False,
    )


def plan_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for term in plan.terms:
        table.add_row(term.name, format_bytes(term.num_bytes), term.formula)
    table.add_row("total", format_bytes(plan.total_bytes), "beside the process itself", style="bold")
    return table


def plan_lines(plan: Plan) -> list[Any]:
    """A plan for the terminal: its table, and what fits."""
    lines: list[Any] = [plan_table(plan)]
    if plan.device_memory_bytes is not None:
        verdict = "fits in" if plan.fits else "does not fit in"
        how = f" with {plan.choice}" if plan.choice else ""
        lines.append(f"{verdict} {format_bytes(plan.device_memory_bytes)}{how}")
        lines.append(f"largest context {plan.largest_length:,} tokens; largest micro-batch {plan.largest_batch:,} rows")
        if not plan.fits:
            lines.append("to make it fit: a shorter --max-seq-length, a smaller --r, --optim paged_adamw_8bit")
    return lines


def load_adapted(config: TrainConfig, prepared: Prepared, console: Console) -> Any:
    """The 4-bit base with a fresh adapter; LoRA's random start follows from the seed."""
    start = time.perf_counter()
    base = load_model(
        config.model,
        config.quant_type,
        config.blocksize,
        config.double_quant,
        prepared.compute_dtype,
        config.device,
        prepared.fit.weights_budget,
        config.output,
    )
    prepared.identity["base"] = fingerprint(base)
    torch.manual_seed(config.seed)
    try:
        model = get_peft_model(base, lora_config(config, base))
    except ValueError as error:
        must = "target_modules must name linears of the model, target_parameters stacked weights of its experts"
        raise UserError(must, str(error), "correct it", "target_modules") from None
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.rule("training", align="left")
    console.print(
        f"loaded in {time.perf_counter() - start:.1f} s; {count:,} LoRA weights learn, the base is frozen",
        highlight=False,
    )
    return model


def train_shown(run: Run, prepared: Prepared, result: Result, console: Console, output: Path) -> None:
    """The loop with its metrics and progress; Ctrl-C becomes a UserError that says how to go on."""
    metrics = Metrics(output, run.config.loggers, run.config.model_dump(), run.step)
    try:
        with Progress(console, run.num_steps, run.step) as progress:
            train(run, metrics, prepared.validation, progress.step, output / "checkpoints")
    except Interrupted:
        raise UserError(
            "the run was interrupted",
            f"step {run.step} of {run.num_steps} is saved",
            "the same command with --resume goes on from there",
            str(output),
        ) from None
    finally:
        metrics.close()
        result.report.metrics = metrics.rows


def save_adapter(model: Any, folder: Path) -> None:
    """Write peft's adapter folder under a temporary name, then rename it."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def measure(result: Result, prepared: Prepared, when: str, extra: Any, cache: Path | None) -> dict[str, Any]:
    """Loss on the validation part and answers to the sample prompts, with the adapter as it now is."""
    found: dict[str, Any] = {"facts": {}, "loss": None}
    if prepared.validation:
        found["loss"] = evaluate(result.model, prepared.validation)
    answers = []
    for prompt in sample_prompts(prepared):
        ids = prompt_ids([{"role": "user", "content": prompt}], prepared.tokenizer)
        answers.append((prompt, generate(result.model, prepared.tokenizer, ids, SAMPLE_TOKENS)))
    found["answers"] = answers
    if extra:
        found["facts"] = extra(result, when)
    return found


def sample_prompts(prepared: Prepared) -> list[str]:
    """The prompts of the report: the user's, or the first three of the validation or training part."""
    if prepared.config.sample_prompts is not None:
        return prepared.config.sample_prompts
    dataset, prompts = prepared.validation or prepared.training, []
    for record in dataset.records[:3]:
        first = next((turn["content"] for turn in record.messages or () if turn["role"] == "user"), None)
        prompts.append(first or record.prompt or (record.text or "")[:80])
    return prompts


def empty_report(config: TrainConfig, prepared: Prepared) -> Report:
    return Report(
        title=f"{Path(config.model).name} tuned on {Path(config.data).name}",
        command=" ".join(sys.argv),
        config=config.model_dump(),
        data=prepared.training.summary(),
        memory=[(f"plan: {term.name}", term.num_bytes) for term in prepared.plan.terms],
        metrics=[],
        num_steps=0,
        seconds=0.0,
    )


def finish_report(result: Result, prepared: Prepared, before: dict[str, Any], after: dict[str, Any], run: Run) -> None:
    """Fill the report with what was measured."""
    report = result.report
    report.num_steps = run.num_steps
    report.loss_before, report.loss_after = before["loss"], after["loss"]
    report.samples = [(prompt, a, b) for (prompt, a), (_, b) in zip(before["answers"], after["answers"])]
    report.facts = {**before["facts"], **after["facts"]}
    report.memory += [
        ("plan: total", prepared.plan.total_bytes),
        ("measured: peak of the process" if run.device.type == "cpu" else "measured: peak on the GPU",
         peak_memory_bytes(run.device)),
    ]  # fmt: skip
    report.next_commands = [
        f"onecard generate --model {run.config.model} --adapter {result.adapter} --prompt '…'",
        f"onecard chat --model {run.config.model} --adapter {result.adapter}",
        f"onecard eval --model {run.config.model} --adapter {result.adapter} --data {run.config.data}",
    ]
