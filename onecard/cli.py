"""The command line. A command parses, makes a config and calls one function. Heavy imports are inside commands."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from onecard.config import (
    DataConfig,
    ExportConfig,
    PlanConfig,
    QuantConfig,
    QuantizeConfig,
    ServeConfig,
    StoredConfig,
    TrainConfig,
    make_config,
    parse_bytes,
)
from onecard.documents import read_yaml
from onecard.errors import Stopped, UserError, printable
from onecard.terminal import finish, given, load, load_base, make_console, partial, quiet_libraries, read_data, run_app

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

app = App(
    name="onecard",
    help="Fine-tune language models up to the 100-billion class on one card.",
    version_flags=["--version"],
)
if TYPE_CHECKING:
    TrainFields = DataFields = PlanFields = QuantFields = StoredFields = ExportFields = ServeFields = Any
    QuantizeFields = Any
else:
    flags = Parameter(name="*", negative_iterable=(), consume_multiple=True)
    TrainFields = Annotated[partial(TrainConfig) | None, flags]
    DataFields = Annotated[partial(DataConfig) | None, flags]
    ServeFields = Annotated[partial(ServeConfig) | None, flags]
    QuantFields = Annotated[partial(QuantConfig) | None, flags]
    QuantizeFields = Annotated[partial(QuantizeConfig) | None, flags]
    StoredFields = Annotated[partial(StoredConfig) | None, flags]
    ExportFields = Annotated[partial(ExportConfig) | None, flags]
    PlanFields = Annotated[partial(PlanConfig) | None, flags]


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
    resume: bool = False,
) -> None:
    """Train a LoRA adapter over a 4-bit base.

    Ctrl-C, SIGTERM and SIGHUP finish the step and write a checkpoint, from which --resume goes on; the exit status is
    130, 143 or 129. A second one ends the run at once.

    Args:
        config: YAML file of the same fields; flags win over it.
        resume: Go on from the newest whole checkpoint in the output folder.
    """
    merged = {**(read_yaml(config) if config else {}), **given(fields)}
    checked = make_config(TrainConfig, merged, config or "command line")
    try:
        console = make_console()
        from onecard.export.calibrated.base import base_of_run
        from onecard.train.session import run_training
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, "nothing was begun", "start again", checked.output) from None

    finish(run_training(checked, resume, console, make_base=base_of_run), console)


@app.command
def plan(
    model: str,
    *,
    fields: PlanFields = None,
    method: Literal["full", "lora", "qlora", "generate"] = "qlora",
    device_memory: str | None = None,
    json: bool = False,
    plot: str | None = None,
) -> None:
    """Say what memory training takes, term by term with its formula, before anything is loaded.

    Args:
        model: Checkpoint folder, hub id, or the name of a public model, such as llama-2-7b.
        method: qlora; generate (its KV cache for max_seq_length tokens); lora (16-bit base) and full, to compare.
        device_memory: What there is, such as 24GiB: plans for what train would keep, recompute, offload and page in it.
        json: Print JSON.
        plot: PNG file for the terms as bars.
    """
    from dataclasses import asdict
    from json import dumps

    from onecard.memory.plan import plan as run

    quiet_libraries()
    limit = None if device_memory is None else parse_bytes(device_memory)
    found = run(model, method, limit, **given(fields))
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
def preview(model: str, data: str, *, fields: DataFields = None, num_examples: int = 3) -> None:
    """Show what will be learned: tokens coloured by trained and masked, counts, bad rows.

    Args:
        model: Checkpoint folder or hub id; only its tokenizer is read.
        data: JSONL, JSON, CSV or Parquet file.
        num_examples: Examples shown.
    """
    config = make_config(DataConfig, given(fields), "command line")
    console = make_console()
    from onecard.data.chat.template import set_template
    from onecard.data.dataset import load_dataset
    from onecard.data.preview import render_preview
    from onecard.hf.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    set_template(tokenizer, config.chat_template, config.template_variables)
    dataset = load_dataset(data, tokenizer, config)
    colour = console.color_system is not None
    console.print(render_preview(dataset, tokenizer, config.packing, num_examples, colour))


@app.command
def generate(
    model: str,
    prompt: str,
    adapter: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    *,
    quant: QuantFields = None,
    device: str = "auto",
    raw: bool | None = None,
) -> None:
    """Answer one prompt, streaming.

    Args:
        model: Checkpoint folder or hub id.
        prompt: The user's message, written as the adapter's training rows were; without an adapter, with the chat
            template, or as it is where the tokenizer has none.
        adapter: Folder of a trained adapter.
        temperature: 0 takes the likeliest token each time.
        raw: Go on from the prompt as it is; --no-raw: with the chat template. Default: as the adapter was trained.
    """
    from onecard.adapter.form import ask
    from onecard.adapter.origin import form_beside
    from onecard.infer.generate import generate as run

    shown = printable if sys.stdout.isatty() else str  # a file gets the text unchanged
    loaded, tokenizer = load(model, adapter, quant, device)
    form = form_beside(adapter)
    ids, goes_on, note = ask(prompt, tokenizer, form, raw)
    if note:
        print(f"note: {note}", file=sys.stderr)
    how = (max_new_tokens, temperature, lambda text: print(shown(text), end="", flush=True), goes_on)
    run(loaded, tokenizer, ids, *how, form.end_tokens if form else ())
    print()


@app.command
def chat(
    model: str,
    adapter: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    *,
    quant: QuantFields = None,
    device: str = "auto",
) -> None:
    """Talk with a model in the terminal.

    Args:
        model: Checkpoint folder or hub id.
        adapter: Folder of a trained adapter.
    """
    from onecard.adapter.origin import form_beside
    from onecard.infer.chat import chat as run

    loaded, tokenizer = load(model, adapter, quant, device)
    run(loaded, tokenizer, make_console(), max_new_tokens, temperature, form_beside(adapter))


@app.command
def serve(
    model: str,
    adapter: list[str] | None = None,
    *,
    fields: ServeFields = None,
    quant: QuantFields = None,
    device: str = "auto",
) -> None:
    """Answer OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, with streaming.

    Args:
        model: Checkpoint folder or hub id.
        adapter: Folder of a trained adapter, or NAME=FOLDER; NAME is the model that requests ask for. May be repeated.
    """
    given_fields = {"api_key": os.environ.get("ONECARD_API_KEY"), **given(fields)}
    config = make_config(ServeConfig, given_fields, "serve")
    try:
        from onecard.infer.server import name_models
        from onecard.infer.server import serve as run
    except ImportError as error:
        raise UserError("serving needs fastapi and uvicorn", str(error), "pip install 'onecard[serve]'") from None

    folders = name_models(model, adapter or [])
    first = next(filter(None, folders.values()), None)
    run(load_base(model, first, quant, device), model, folders, config)


@app.command(name="eval")
def evaluate(
    model: str,
    data: str,
    adapter: str | None = None,
    *,
    fields: DataFields = None,
    quant: QuantFields = None,
    device: str = "auto",
) -> None:
    """Loss and perplexity of a data file's supervised tokens.

    Args:
        model: Checkpoint folder or hub id.
        data: JSONL, JSON, CSV or Parquet file.
        adapter: Folder of a trained adapter.
    """
    from math import exp

    from onecard.train.evaluate import evaluate as run

    dataset = read_data(data, model, adapter, make_config(DataConfig, given(fields), "command line"))
    loaded, _ = load(model, adapter, quant, device)
    loss = run(loaded, dataset)
    print(f"loss {loss:.4f}  perplexity {exp(min(loss, 50)):.4f}  over {dataset.num_supervised_tokens:,} tokens")


@app.command
def merge(
    model: str,
    adapter: str,
    output: str,
    *,
    base: Literal["dequantized", "original"] | None = None,
    verify: str | None = None,
    requantize: Literal["nf4", "fp4"] | None = None,
    quant: StoredFields = None,
    device: str = "cpu",
) -> None:
    """Merge an adapter into a 16-bit checkpoint, streaming: memory for about one tensor.

    Args:
        model: Checkpoint that the adapter was trained on.
        adapter: Folder of the trained adapter.
        output: New folder for the merged checkpoint.
        base: dequantized (default): what training saw, the nearest to the live adapter; original: the checkpoint's own
            weights. With --verify and no --base, both are tried and the better one is kept.
        verify: Data file on whose first rows, 32 and some 8,000 tokens at most, the result is compared with the live
            adapter.
        requantize: Store the result in 4 bits again, which loses part of the update. The share that remains is printed.
        device: Where --verify computes.
    """
    from onecard.adapter.origin import read_origin, stored_as

    quiet_libraries()
    config = stored_as(adapter, given(quant))
    if read_origin(adapter) is None:
        stored = f"{config.quant_type}, {config.blocksize} a block"
        print(f"the adapter has no onecard.json: training is assumed to have quantized a 16-bit base as {stored}")
    small = None if requantize is None else config.model_copy(update={"quant_type": requantize})
    left, kept = None, base or "dequantized"
    if verify is not None:
        from onecard.export.merge.verify import bases_of, merge_verified, rows_line

        dataset = read_data(verify, model, adapter, make_config(DataConfig, {}, "merge"))
        bases: list[Any] = [base] if base is not None else bases_of(model, small)
        print(rows_line(dataset), flush=True)
        found = merge_verified(model, adapter, output, dataset, bases, config, small, device)
        print("\n".join(found.table()))
        kept, left = found.kept, found.in_weights
    elif small is not None:
        from onecard.export.merge.quantized import requantize as run

        _, left = run(model, adapter, output, small, kept, config)
    else:
        from onecard.export.merge.merged import merge as run

        run(model, adapter, output, kept, config)
    print(f"merged   {output}  ({requantize or '16-bit'}, {kept} base)")
    if left is not None and left.share is not None:
        print(f"left     {left.share:.1%} of the update in the weights, with rounding errors of {left.noise:.1%} of it")
    print("next\n  AutoModelForCausalLM.from_pretrained(...) with transformers, or: vllm serve " + quote(output))


@app.command
def quantize(model: str, output: str, *, fields: QuantizeFields = None) -> None:
    """Write a checkpoint with its linears in 4 bits, in bitsandbytes' format, streaming.

    With --calibrate and --data, the codes are chosen for the layers' outputs on the data. Else they are the nearest.

    Experts go into 4 bits, too; such a checkpoint is for onecard, as transformers with bitsandbytes reads no 4-bit
    experts.

    Args:
        model: Checkpoint folder or hub id, in 16 or 32 bits.
        output: New folder.
    """
    quiet_libraries()
    config = make_config(QuantizeConfig, given(fields), "command line")
    if config.calibrate:
        from onecard.export.calibrated.base import quantize_calibrated

        fields_of_data = config.model_dump(include=set(DataConfig.model_fields))
        reading = make_config(DataConfig, fields_of_data, "quantize")
        dataset = read_data(str(config.data), model, None, reading)
        lines = quantize_calibrated(model, output, config, dataset, make_console()).lines()
    else:
        from onecard.export.merge.quantized import quantize_checkpoint

        quantize_checkpoint(model, output, config)
        lines = []
    print("\n".join([f"quantized {output}  ({config.quant_type})", *lines, "next"]))
    print(f"  onecard train --model {quote(output)} --weights-budget 4GiB ...")


@app.command
def export(*, fields: ExportFields = None) -> None:
    """Write a model, merged with an adapter if there is one, in another tool's format, streaming."""
    config = make_config(ExportConfig, given(fields), "command line")
    from onecard.api import export as run

    print("\n".join(run(config, quiet=False).lines))


def main() -> None:
    """Run the command line. A user's mistake prints its three parts and exits with 2."""
    try:
        run_app(app)
    except (UserError, CycloptsError) as error:
        with suppress(OSError):  # the terminal may be closed
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
