"""What a run prints before it trains: data, one sample, plan and schedule; and, resumed, what differs from before."""

from __future__ import annotations

import torch
from rich.console import Console

from onecard.data.preview import render_notices, render_preview, render_sources
from onecard.hf.load import pick_device
from onecard.kernels.cpu_info import arithmetic
from onecard.memory.show import plan_table
from onecard.optim.schedule import learning_rate
from onecard.train.checkpoint import State, position_of, resume
from onecard.train.loop import count_steps
from onecard.train.prepare import Prepared, rows_of
from onecard.train.run import Run


def resume_shown(run: Run, state: State, console: Console) -> None:
    """Restore a run from a checkpoint, and print what differs from then."""
    resume(run, state)
    position = position_of(state)
    for line in state.skipped:
        console.print(f"skipped a broken checkpoint: {line}", style="yellow", markup=False)
    console.print(f"resumed at step {run.step} of {run.num_steps}")
    if run.num_steps != position.num_steps:
        line = f"the schedule changes from here on: {run.num_steps:,} updates in place of {position.num_steps:,}"
        console.print(line, style="yellow", highlight=False)
    threads = position.num_threads
    if run.device.type == "cpu" and threads != torch.get_num_threads():
        line = f"saved with {threads} threads, now {torch.get_num_threads()}: equal to rounding, not to the bit"
        console.print(line, style="yellow")
    if position.num_processes != run.ranks.count:
        line = f"saved by {position.num_processes} processes, now {run.ranks.count}: equal to rounding, not to the bit"
        console.print(line, style="yellow")
    before, now = position.arithmetic, arithmetic(run.device)
    if before is not None and before != now:
        line = f"saved on {before}, now {now}: equal to rounding, not to the bit"
        console.print(line, style="yellow", markup=False)
    if run.max_forward_tokens != position.max_forward_tokens:
        same = "with other dropout masks" if run.config.lora_dropout else "equal to rounding, not to the bit"
        line = f"micro-batches now go in parts of {run.max_forward_tokens} tokens: {same}"
        console.print(line, style="yellow")


def show(prepared: Prepared, console: Console) -> None:
    """Print data, one sample, plan and schedule, before the weights load."""
    config = prepared.config
    console.rule("data", align="left")
    colour = console.color_system is not None
    console.print(render_preview(prepared.training, prepared.tokenizer, config.packing, 1, colour))
    for name, dataset in prepared.validation.items():
        shown = f"validation {name}".rstrip()
        console.print(f"{shown}: {len(dataset.examples):,} examples", markup=False, highlight=False)
        for table in render_sources(dataset) if config.eval_data is not None else ():
            console.print(table)
        for notice in render_notices(dataset) if config.eval_data is not None else ():
            console.print(notice)
        if name in prepared.questions:
            asked = f"{len(prepared.questions[name]):,} of {dataset.num_documents:,} rows"
            line = f"{', '.join(config.metric_names)} on generated answers to {asked}"
            console.print(f"{shown}: {line}", markup=False, highlight=False)
    if prepared.new_tokens:
        console.print(prepared.new_tokens.counts(prepared.occurrences, rows_of(config)), markup=False, highlight=False)
    for note in prepared.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    if config.adapter is not None:
        console.print(f"going on from {config.adapter}", markup=False, highlight=False, soft_wrap=True)
    console.rule("memory plan", align="left")
    console.print(plan_table(prepared.plan))
    console.print(prepared.why, highlight=False)
    if prepared.unmerged:
        line = f"merge and export will refuse this adapter: the checkpoint has no {prepared.unmerged} by itself"
        line += "; generate, chat and serve take it"
        console.print(line, style="yellow", markup=False, highlight=False)
    console.rule("schedule", align="left")
    loader, steps = prepared.loader, count_steps(prepared.loader, config)
    peak = max(learning_rate(step, steps, config) for step in range(steps))
    dtype = str(prepared.compute_dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    rows = "streamed" if config.streaming else f"{loader.num_batches(0):,} micro-batches an epoch"
    console.print(
        f"{steps:,} updates of {config.gradient_accumulation_steps} x {config.per_device_train_batch_size} rows"
        f" of up to {loader.row_tokens:,} tokens; {rows}\n"
        f"learning rate {config.lr_scheduler_type}, peak {peak:.2e}; computing in {dtype}"
        f" on {pick_device(config.device)}, {threads} thread{'s' * (threads != 1)}",
        highlight=False,
    )
