"""The commands of a training run: before it, the run, and figures of it."""

from __future__ import annotations

import signal
import sys
from typing import Any, Literal

from onecard.cli.app import DataFields, OptionalWords, PlanFields, TrainFields, app
from onecard.cli.launch import launch
from onecard.config import DataConfig, LoraSettings, TrainConfig, make_config, parse_bytes
from onecard.documents import read_yaml
from onecard.errors import Stopped, UserError, one_line
from onecard.terminal import finish, given, make_console, quiet_libraries
from onecard.torchrun import is_started, process_number


@app.command
def demo(output: str = "demo-run") -> None:
    """Embedded model and data: the whole way in about two minutes on two CPU cores."""
    console = make_console()
    from onecard.demo.run import run_demo

    finish(run_demo(output, console), console)


@app.command
def train(
    *,
    fields: TrainFields = None,
    config: str | None = None,
    from_llamafactory: str | None = None,
    from_axolotl: str | None = None,
    resume: bool = False,
    validate: bool = False,
    num_processes: int | None = None,
) -> None:
    """Train a LoRA adapter over a 4-bit base.

    Ctrl-C, SIGTERM and SIGHUP finish the step and write a checkpoint, from which --resume goes on; the exit status is
    130, 143 or 129. A second one ends the run at once.

    Args:
        config: YAML file of the same fields; flags win over it.
        from_llamafactory: LLaMA-Factory's YAML file of a run; --config and flags win over it.
        from_axolotl: Axolotl's YAML file of a run; --config and flags win over it.
        resume: Go on from the newest whole checkpoint in the output folder.
        validate: Check settings, data, template, memory plan, disk and output folder; train and write nothing.
        num_processes: Start so many processes with torchrun, each on a GPU of its own, or on a part of the CPU's cores;
            they share out each update's micro-batches.
    """
    if num_processes is not None and not is_started():
        return launch(num_processes, sys.argv[1:])
    merged = merge_fields(config, from_llamafactory, from_axolotl, fields)
    checked = make_config(TrainConfig, merged, config or from_llamafactory or from_axolotl or "command line")
    try:
        console = make_console()
        from onecard.export.calibrated.base import base_of_run, check_base_of_run
        from onecard.train.session import run_training, validate_training
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, "nothing was begun", "start again", checked.output) from None

    if validate:
        if process_number() == 0:  # one output folder, which one process locks, and one answer
            validate_training(checked, resume, console, check_base_of_run)
        return
    finish(run_training(checked, resume, console, make_base=base_of_run), console)


def merge_fields(
    config: str | None, from_llamafactory: str | None, from_axolotl: str | None, fields: Any
) -> dict[str, Any]:
    """Return the fields of another tool's file, a YAML file and the flags; later ones win. Print notes on stderr."""
    from onecard.recipes.axolotl import read_axolotl
    from onecard.recipes.llamafactory import read_llamafactory

    if from_llamafactory and from_axolotl:
        must, do = "one file of another tool can be read", "leave one out"
        raise UserError(must, "--from-llamafactory and --from-axolotl", do)
    merged: dict[str, Any] = {}
    for path, read in ((from_llamafactory, read_llamafactory), (from_axolotl, read_axolotl)):
        if path:
            recipe = read(path)
            merged |= recipe.fields
            for note in recipe.notes:
                print(f"note: {one_line(note)}", file=sys.stderr)
    return {**merged, **(read_yaml(config) if config else {}), **given(fields)}


@app.command
def runs(root: str = ".", *, json: bool = False) -> None:
    """List the runs under a folder: state, steps, loss, last change. The newest change is first.

    A run is a folder with run.json or metrics.jsonl. States: running; finished; stopped (by a signal, can be resumed);
    failed (by an error); killed (its process is gone); unknown (no record, or a damaged one).

    Args:
        root: Folder that is searched, six levels deep.
        json: Print JSON.
    """
    from json import dumps

    from onecard.train.folders import list_runs, run_lines

    rows, is_cut = list_runs(root)
    if is_cut:
        print("note: there are too many folders: some were not searched", file=sys.stderr)
    if json:
        return print(dumps(rows, allow_nan=False))
    print("\n".join(run_lines(rows)) if rows else f"no run under {one_line(root)}")


@app.command
def report(output: str) -> None:
    """Make the report of a run again, from the files in its output folder.

    Of a run that did not end, the report has its settings, its plan, its curve and its last evaluation.

    Args:
        output: The run's output folder.
    """
    from onecard.train.remade import remake_report

    path, source = remake_report(output)
    print(f"report   {path}  (of {source})")


@app.command(name="config")
def show_config(
    dump: str | None = None,
    *,
    fields: TrainFields = None,
    from_llamafactory: str | None = None,
    from_axolotl: str | None = None,
) -> None:
    """Print every setting of a training run as YAML, with its default and its description, for `train --config`.

    Args:
        dump: YAML file of fields, whose values are printed in place of the defaults; flags win over it.
        from_llamafactory: LLaMA-Factory's YAML file of a run, as our settings.
        from_axolotl: Axolotl's YAML file of a run, as our settings.
    """
    from onecard.config.document import config_yaml

    merged = merge_fields(dump, from_llamafactory, from_axolotl, fields)
    missing = {
        name: "-" for name, info in TrainConfig.model_fields.items() if info.is_required() and name not in merged
    }
    checked = make_config(TrainConfig, {**missing, **merged}, dump or "command line")
    print(config_yaml(TrainConfig, checked.model_dump(mode="json", exclude=set(missing))), end="")


@app.command
def plan(
    model: str,
    *,
    fields: PlanFields = None,
    method: Literal["full", "lora", "qlora", "generate"] = "qlora",
    device_memory: str | None = None,
    num_processes: int = 1,
    prefix_cache: str | None = None,
    json: bool = False,
    plot: str | None = None,
) -> None:
    """Say what memory training takes, term by term with its formula, before anything is loaded.

    Args:
        model: Checkpoint folder, hub id, or the name of a public model, such as llama-2-7b.
        method: qlora; generate (its KV cache for max_seq_length tokens); lora (16-bit base) and full, to compare.
        device_memory: What there is, such as 24GiB: plans for what train would keep, recompute, offload and page in it.
        num_processes: Processes of the run, each on a device of its own; the plan is of one of them.
        prefix_cache: With --method generate: the server's prefix cache, such as 256MiB. The plan is then that of
            `onecard serve` with --per-device-train-batch-size answers at a time.
        json: Print JSON.
        plot: PNG file for the terms as bars.
    """
    from dataclasses import asdict
    from json import dumps

    from onecard.memory.plan import plan as run

    quiet_libraries()
    limit = None if device_memory is None else parse_bytes(device_memory)
    prefix = None if prefix_cache is None else parse_bytes(prefix_cache)
    found = run(model, method, limit, num_processes, prefix, **given(fields))
    if plot:
        from onecard.memory.figures import plot_plan

        plot_plan(plot, found, f"{model}, {method}")
    if json:
        print(dumps({**asdict(found), "total_bytes": found.total_bytes, "fits": found.fits}))
        return
    from onecard.memory.show import plan_lines

    console = make_console()
    for line in plan_lines(found):
        console.print(line, highlight=False)


@app.command
def figures(output: str = "figures", model: str | None = None) -> None:
    """Draw where a 7B model's training memory goes, and NF4 against Int4 over a real layer's weights.

    Args:
        output: Folder for memory_bill.png and nf4_int4.png.
        model: Checkpoint folder or hub id whose largest linear is taken; default: the demo's. Of a calibrated base,
            what its 4 bits cost is drawn in bill.png, and the demo's linear is taken.
    """
    from onecard.export.calibrated.bill import draw_if_there
    from onecard.memory.figures import draw_figures

    quiet_libraries()
    bill = draw_if_there(model, output) if model else []
    print("\n".join([*bill, *draw_figures(output, None if bill else model)]))


@app.command
def preview(
    model: str | None = None,
    data: OptionalWords = None,
    *,
    fields: DataFields = None,
    config: str | None = None,
    num_examples: int = 3,
    tokenizer: str | None = None,
    add_tokens: OptionalWords = None,
    add_special_tokens: OptionalWords = None,
) -> None:
    """Show what will be learned: tokens coloured by trained and masked, counts, bad rows.

    Args:
        model: Checkpoint folder or hub id; only its tokenizer is read.
        data: Files, folders, patterns or hub ids; PATH:0.3 is a weight in a mixture.
        config: YAML file of train, whose model, data and settings of them are taken; flags win over it.
        num_examples: Examples shown.
        tokenizer: Folder of the tokenizer; default: the model's.
        add_tokens: Tokens that train adds, or a .txt file of them.
        add_special_tokens: Same, for control tokens.
    """
    named = {"model": model, "data": data, "tokenizer": tokenizer, "add_tokens": add_tokens,
             "add_special_tokens": add_special_tokens}  # fmt: skip
    asked = {name: value for name, value in named.items() if value is not None} | given(fields)
    if config:
        whole = make_config(TrainConfig, {"output": "-", **read_yaml(config), **asked}, config)
        asked = {name: getattr(whole, name) for name in whole.model_fields_set}
    for name in ("model", "data"):
        if name not in asked:
            raise UserError(
                f"a preview needs {name}", "none", f"pass --{name}, or --config with a file that has it", name
            )
    tokens = make_config(LoraSettings, {n: asked[n] for n in list(named)[3:] if n in asked}, "command line")
    settings = make_config(DataConfig, {n: asked[n] for n in DataConfig.model_fields if n in asked}, "command line")
    console = make_console()
    from onecard.data.chat.template import set_template
    from onecard.data.load import load_dataset
    from onecard.data.preview import render_preview
    from onecard.hf.load import load_tokenizer
    from onecard.hf.tokens import add_tokens as extend

    loaded = load_tokenizer(asked["model"], asked.get("tokenizer"))
    new = extend(loaded, tokens.add_tokens, tokens.add_special_tokens)
    set_template(loaded, settings.chat_template, settings.template_variables)
    dataset = load_dataset(asked["data"], loaded, settings, loss=None)
    colour = console.color_system is not None
    console.print(render_preview(dataset, loaded, settings.packing, num_examples, colour))
    if new:
        console.print(new.counts(dataset.stored.count(list(new.texts))), markup=False, highlight=False)
    for note in new.notes():
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
