"""A whole run: checks, preview and plan before the weights load, then training, adapter and report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from onecard.adapter.layers import lora_config
from onecard.adapter.origin import origin_of
from onecard.adapter.save import save_adapter
from onecard.adapter.served import set_grids
from onecard.adapter.start import Start, set_loftq, set_start
from onecard.adapter.tokens import add_adapter
from onecard.adapter.trained import set_trained
from onecard.config import TrainConfig
from onecard.data.dataset import Dataset
from onecard.errors import Stopped, UserError
from onecard.hf.fingerprint import fingerprint
from onecard.hf.head import start_head
from onecard.hf.load import (
    find_checkpoint,
    load_model,
    pick_device,
)
from onecard.kernels.cpu.contention import sharing_cores
from onecard.memory.inputs import MemoryStrategy
from onecard.memory.measure import (
    begin_peak,
    return_free_memory,
    return_large_blocks,
)
from onecard.memory.workload import Answers
from onecard.train.card import write_card
from onecard.train.checkpoint import (
    State,
    check_best,
    check_unchanged,
    load_best,
    load_newest,
    position_of,
    steps_of_resumed,
)
from onecard.train.deterministic import deterministic
from onecard.train.evaluate import attention_of, choose_loss
from onecard.train.evaluate import evaluate as measured_loss
from onecard.train.evaluator import Evaluator, make_evaluator
from onecard.train.head import SequenceHead, choose_outputs
from onecard.train.hub import push
from onecard.train.loop import Interrupted, count_steps, train
from onecard.train.loss import packed_loss
from onecard.train.metrics import Metrics, Rows, score_columns
from onecard.train.outcome import empty_report, finish_report, measure
from onecard.train.output import CONTINUE, lock_output
from onecard.train.preference import Preference
from onecard.train.prepare import Prepared, make_loader, prepare
from onecard.train.progress import Progress
from onecard.train.ranks import WORK, Ranks, is_sharded, join, leave
from onecard.train.record import end_of_record, write_record
from onecard.train.reference import reference_identity, set_references
from onecard.train.report import store_report, write_report
from onecard.train.result import Result
from onecard.train.run import Run, make_graphs
from onecard.train.show import resume_shown, show


@dataclass
class CalibratedBase:
    """The base that a run trains on instead of its checkpoint.

    Attributes:
        start: LoRA's start; may be empty.
        facts: lines for the report.
        measured: rows of which the calibration has measured `loss`. None: not in this run.
        loss: at which training begins.
    """

    folder: Path
    start: Start
    facts: dict[str, str]
    measured: Dataset | None
    loss: float


MakeBase = Callable[[Prepared, Console], CalibratedBase]


def run_training(
    config: TrainConfig,
    resuming: bool,
    console: Console,
    report_extra: Any = None,
    answers: Answers | None = None,
    make_base: MakeBase | None = None,
) -> Result:
    """Run `onecard train`: read a checkpoint and a data file, write output/adapter and output/report.html.

    Args:
        resuming: continue from the newest checkpoint in the output folder.
        report_extra: called as f(result, "before" | "after") -> dict of lines for the report.
        answers: the answers that report_extra generates, for the plan.
        make_base: for `calibrate`: writes the calibrated base, or finds it.

    Raises:
        UserError: an input is wrong; raised before training where possible.
    """
    output = Path(config.output)
    with deterministic(config.deterministic, config.device):
        ranks = join(config.device)
        locked = lock_output(output, resuming, ranks.is_first)
        with locked, end_of_record(output, ranks), ranks.together(whole_run=True):
            result = run_locked(config, resuming, console, report_extra, answers, make_base, ranks)
    leave(ranks)
    return result


def validate_training(
    config: TrainConfig, resuming: bool, console: Console, check_base: Callable[[Prepared], None]
) -> None:
    """Make and show every check of `run_training` that it makes before the weights load. Leave no file.

    Args:
        check_base: for `calibrate`: checks the model and a base that is already there.

    Raises:
        UserError: same as `run_training`.
    """
    with deterministic(config.deterministic, config.device), lock_output(Path(config.output), resuming):
        prepared, state = check(config, resuming, None)
        show(prepared, console)
        if config.calibrate:
            check_base(prepared)
        if state is not None:
            console.print(f"would resume at step {state.step}", highlight=False)
        console.print("valid: nothing was trained or written", style="bold green", highlight=False)


def check(config: TrainConfig, resuming: bool, answers: Answers | None) -> tuple[Prepared, State | None]:
    """Make all checks that need no weights. Return what they found, and the checkpoint to resume from."""
    output = Path(config.output)
    if not config.calibrate and (output / "base").exists():
        do = "pass --calibrate as before, or choose another --output"
        raise UserError("a run must go on with the base that it calibrated", "calibrate is off", do, str(output))
    state = load_newest(output / "checkpoints") if resuming else None
    prepared = prepare(config, position_of(state).date if state else None, answers)
    if state is not None:
        check_unchanged(config, prepared.identity, state)
        check_best(config, state)
        steps_of_resumed(position_of(state), prepared.loader, config)
    return prepared, state


def run_locked(
    config: TrainConfig,
    resuming: bool,
    console: Console,
    report_extra: Any,
    answers: Answers | None,
    make_base: MakeBase | None,
    ranks: Ranks,
) -> Result:
    """Same as `run_training`, in an output folder that is already locked, by one of several processes."""
    output = Path(config.output)
    check_ranks(config, ranks)
    with ranks.first_alone():
        prepared, state = check(config, resuming, answers)
    prepared.strategy = MemoryStrategy(**ranks.gather(asdict(prepared.strategy))[0])
    config = prepared.config
    return_large_blocks()
    show(prepared, console)
    base = None
    if config.calibrate:
        assert make_base is not None, "calibrate needs make_base"
        with ranks.first_alone():
            base = make_base(prepared, console)
        config = config.model_copy(update={"model": str(base.folder)})
        return_free_memory()
        prepared.process_bytes = begin_peak(pick_device(config.device))  # the report's peak is of the training
    model = load_adapted(config, prepared, console)
    ranks.wait(WORK)
    if not ranks.is_first:
        torch.manual_seed(
            (config.seed + 1_000_003 * ranks.number) % 2**63
        )  # the first one's dropout is that of a run alone
    if base is not None:
        set_start(model, base.start)
    elif config.init_lora_weights == "loftq" and state is None:
        set_loftq(model, prepared.folder)
    origin = origin_of(model.get_base_model(), config.model)  # before the training, so that unreadable files fail early
    loader = prepared.loader
    run = Run(
        config,
        model,
        loader,
        count_steps(loader, config),
        prepared.identity,
        strategy=prepared.strategy,
        ranks=ranks,
    )
    run.date = prepared.date
    run.loss, slow = (choose_outputs if prepared.labels else choose_loss)(model, prepared.training)
    if slow and run.is_sharded:
        must, do = "parallel fsdp needs a model that takes packed rows", "pass --parallel ddp"
        raise UserError(must, slow, do, "parallel")
    if slow:
        console.print(f"one document at a time with full logits: {slow}", style="yellow", markup=False)
    if prepared.labels:
        set_head(run, prepared)
    elif config.loss != "sft":
        set_preferences(run, prepared, console)
    if base is not None:
        check_calibration(base, model, run)
    run.graphs = make_graphs(run, prepared.plan.device_memory_bytes or 0)
    result = Result(model, prepared.tokenizer, empty_report(prepared.config, prepared), output / "adapter")
    evaluate = make_evaluator(prepared, run) if prepared.validation else None
    before = measure(result, prepared, "before", report_extra, run, evaluate)
    if state is not None:
        resume_shown(run, state, console)
        del state  # frees the loaded optimizer states: the run has its own copies
    elif resuming:
        console.print("no checkpoint yet: starting at step 0")
    begin = time.perf_counter()
    train_shown(run, prepared, result, console, output, evaluate)
    result.report.seconds = time.perf_counter() - begin
    for line in end_at_best(run, result, output):
        console.print(line, highlight=False)
    if ranks.is_first:
        origin = origin.model_copy(update={"form": prepared.form, "train_for": config.train_for})
        save_adapter(model, result.adapter, origin, prepared.own_tokenizer, prepared.head_config)
    finish_report(result, prepared, before, measure(result, prepared, "after", report_extra, run, evaluate), run)
    result.report.facts |= base.facts if base is not None else {}
    if ranks.count > 1:
        result.report.facts["processes"] = f"{ranks.count}, data parallel{', the base sharded' * run.is_sharded}"
    if not ranks.is_first:
        return result
    store_report(output, result.report)
    write_report(output, result.report)
    write_card(result.adapter, prepared.config, prepared.folder, result.report)
    if config.push_to_hub:
        console.print(f"pushed to {push(result.adapter, config)}", highlight=False, markup=False, soft_wrap=True)
    return result


def check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Raise UserError if a window has fewer micro-batches than there are processes."""
    if config.gradient_accumulation_steps < ranks.count:
        found = f"gradient_accumulation_steps {config.gradient_accumulation_steps} for {ranks.count} processes"
        do = f"pass --gradient-accumulation-steps {ranks.count} or more: the window is shared out over the processes"
        raise UserError("each process must have a micro-batch of the window", found, do, "gradient_accumulation_steps")


def set_head(run: Run, prepared: Prepared) -> None:
    """Give the run its documents and their labels, for the head."""
    how = (prepared.labels, run.loss is packed_loss, run.config.center_rewards_coefficient or 0.0)
    run.objective = SequenceHead(run.model, prepared.training, *how)
    run.held_out = {name: SequenceHead(run.model, each, *how) for name, each in prepared.validation.items()}


def set_preferences(run: Run, prepared: Prepared, console: Console) -> None:
    """Give the run its preferences, with their reference if it is to be computed before the training."""
    config, validation, packed = run.config, prepared.validation, run.loss is packed_loss
    run.objective = preference = Preference(config, run.model, prepared.training.examples, packed)
    run.held_out = {
        name: Preference(config, run.model, dataset.examples, packed) for name, dataset in validation.items()
    }
    if not prepared.precompute:
        return
    loader = make_loader(config, prepared.training)  # not the run's, which stays at the first row
    batches = (loader.next_batch() for _ in range(loader.num_batches(0)))
    checked = " ".join(dataset.fingerprint() for dataset in validation.values()) or None
    identity = reference_identity(preference, prepared.identity, checked)
    start = time.perf_counter()
    with run.ranks.first_alone(run.base), attention_of(run.base, run.loss), sharing_cores():
        done = set_references(run, batches, Path(config.output), identity)
    console.print(f"{done}, {time.perf_counter() - start:.1f} s", highlight=False, markup=False)


def check_calibration(base: CalibratedBase, model: Any, run: Run) -> None:
    """Raise UserError unless the loaded base has the loss that its calibration measured one layer at a time. The two
    may differ by what 16-bit products round, same as in `choose_loss`."""
    if base.measured is None:
        return
    found, eps = measured_loss(model, base.measured, run.loss), torch.finfo(run.compute_dtype).eps
    if abs(found - base.loss) > max(4 * eps, 1e-4) * max(1.0, base.loss):
        must = "a calibrated base must compute what its calibration measured"
        do = "leave calibrate out: its layers cannot be run one by one"
        raise UserError(must, f"a loss of {found:.4f}, measured {base.loss:.4f}", do, str(base.folder))


def load_adapted(config: TrainConfig, prepared: Prepared, console: Console) -> Any:
    """Load the 4-bit base with a new adapter. The seed sets LoRA's random start."""
    start = time.perf_counter()
    base = load_model(
        config.model,
        config.quant_type,
        config.blocksize,
        config.double_quant,
        prepared.compute_dtype,
        config.device,
        prepared.strategy.weights_budget,
        config.output,
        prepared.labels,
        is_sharded(config),
        config.text_only,
    )
    prepared.identity["base"] = fingerprint(base)
    if prepared.has_new_head:
        start_head(base, config.seed)
    torch.manual_seed(config.seed)
    try:
        model = add_adapter(base, lora_config(config, base), prepared.new_tokens)
    except ValueError as error:
        must = "target_modules must name linears of the model, target_parameters stacked weights of its experts"
        raise UserError(must, str(error), "correct it", "target_modules") from None
    if config.adapter is not None:
        set_trained(model, config.adapter)
    if config.train_for is not None:
        set_grids(model, find_checkpoint(config.model), config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.rule("training", align="left")
    console.print(
        f"loaded in {time.perf_counter() - start:.1f} s; {count:,} LoRA weights learn, the base is frozen",
        highlight=False,
    )
    return model


def train_shown(
    run: Run, prepared: Prepared, result: Result, console: Console, output: Path, evaluate: Evaluator | None
) -> None:
    """Run the loop with metrics and progress. A signal raises Stopped, which says how to resume."""
    metrics: Metrics | Rows = Rows()
    if run.ranks.is_first:
        metrics = Metrics(output, run.config.loggers, run.config.model_dump(), run.step, score_columns(run.config))
        write_record(prepared, run)
    try:
        planned, process = prepared.plan.measured_bytes, prepared.process_bytes
        with Progress(console, run.num_steps, run.step, planned, process) as progress:
            train(run, metrics, evaluate, progress.step, output / "checkpoints")
    except Interrupted as error:
        raise Stopped(error.number, f"step {run.step} of {run.num_steps} is saved", CONTINUE, str(output)) from None
    finally:
        metrics.close()
        result.report.metrics = metrics.rows


def end_at_best(run: Run, result: Result, output: Path) -> list[str]:
    """Set the adapter to the best evaluation's, if the settings ask for it. Return lines for the screen."""
    lines, facts, best = [], result.report.facts, run.best
    if run.step < run.num_steps and best is not None:
        count = best.position.num_without_improvement
        facts["stopped early"] = f"at step {run.step:,} of {run.num_steps:,}: {count} evaluations without improvement"
        lines.append(f"stopped early {facts['stopped early']}")
    if best is None or best.position.step is None:
        return lines
    facts |= best.facts()
    lines.append(f"best {best.metric} {best.position.value:.4f} at step {best.position.step:,}")
    if run.config.load_best_model_at_end:
        run.ranks.wait()  # until the first process has written it
        if best.position.step != run.step:
            load_best(run, output / "checkpoints")
        facts["the adapter is that of step"] = f"{best.position.step:,}"
        lines[-1] += ": the adapter is that of this step"
    return lines
