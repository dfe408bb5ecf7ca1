"""The commands that compute with a model: answers, a chat, a server, a loss."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

from onecard.cli.app import DataFields, DataWords, QuantFields, SamplingFields, ServeFields, app
from onecard.cli.launch import launch
from onecard.config import DataConfig, SamplingConfig, ServeConfig, make_config
from onecard.errors import UserError, one_line, printable
from onecard.terminal import given, load, load_base, load_headed, make_console, quiet_libraries, read_data
from onecard.torchrun import is_started


@app.command
def generate(
    model: str,
    prompt: str | None = None,
    adapter: str | None = None,
    max_new_tokens: int = 256,
    *,
    prompts: str | None = None,
    output: str | None = None,
    batch_size: int = 8,
    sampling: SamplingFields = None,
    system: str | None = None,
    quant: QuantFields = None,
    device: str = "auto",
    raw: bool | None = None,
) -> None:
    """Answer one prompt, streaming, or each prompt of a file.

    Args:
        model: Checkpoint folder or hub id.
        prompt: The user's message, written as the adapter's training rows were; without an adapter, with the chat
            template, or as it is where the tokenizer has none.
        adapter: Folder of a trained adapter.
        prompts: In place of prompt: a .jsonl file of objects with "prompt" or "messages", or a .txt file of lines. The
            answers are lines of JSON in the same order: the object with "answer" and "finish_reason".
        output: New file for these lines; default: they are printed. After an end before the last answer, the same
            command goes on from OUTPUT.part.
        batch_size: Answers to prompts of a file at a time; one forward pass gives a token to each.
        system: A system message before the prompt, for a chat template that takes one.
        raw: Go on from the prompt as it is; --no-raw: with the chat template. Default: as the adapter was trained.
    """
    from onecard.adapter.origin import form_beside

    config, form = make_config(SamplingConfig, given(sampling), "command line"), form_beside(adapter)
    if (prompt is None) == (prompts is None):
        found = "neither" if prompt is None else "both"
        raise UserError("either --prompt or --prompts must be given", found, "give one of them", "prompt")
    if prompts is not None:
        settings = {"max_new_tokens": max_new_tokens, "sampling": config.model_dump(mode="json"), "system": system}
        settings |= {"raw": raw, "stored": given(quant), "batch_size": batch_size}
        return generate_all(prompts, output, model, adapter, form, config, settings, quant, device)
    if output is not None:
        raise UserError("--output is for the answers to --prompts", "--prompt", "leave it out", "output")
    assert prompt is not None, "checked above"
    from onecard.adapter.form import ask
    from onecard.infer.generate import generate as run

    shown = printable if sys.stdout.isatty() else str  # a file gets the text unchanged
    loaded, tokenizer = load(model, adapter, quant, device)
    ids, goes_on, note = ask(prompt, tokenizer, form, raw, system)
    if note:
        print(f"note: {note}", file=sys.stderr)
    how = (max_new_tokens, config, lambda text: print(shown(text), end="", flush=True), goes_on)
    run(loaded, tokenizer, ids, *how, form.end_tokens if form else ())
    print()


def generate_all(
    prompts: str,
    output: str | None,
    model: str,
    adapter: str | None,
    form: Any,
    config: SamplingConfig,
    settings: dict[str, Any],
    quant: Any,
    device: str,
) -> None:
    """Answer the prompts of a file. The prompts are read and encoded before the weights load."""
    if settings["batch_size"] < 1:
        raise UserError("batch_size must be 1 or more", str(settings["batch_size"]), "correct it", "batch_size")
    from contextlib import closing, nullcontext

    from onecard.hf.load import load_tokenizer
    from onecard.infer import prompts as files

    rows = files.read_prompts(prompts)
    made = nullcontext()
    if output is not None:
        made = closing(files.Output(output, files.settings_of(prompts, model, adapter, **settings), len(rows)))
    with made as out:
        first = out.done if out else 0
        quiet_libraries()
        tokenizer = load_tokenizer(model, adapter)
        encoded, notes = files.encode(rows, tokenizer, form, settings["raw"], settings["system"])
        for note in sorted(notes):
            print(f"note: {one_line(note)}", file=sys.stderr)
        if first < len(rows):
            loaded, _ = load(model, adapter, quant, device)
            files.check_room(loaded, rows, encoded, settings["max_new_tokens"])
            ends, size = form.end_tokens if form else (), settings["batch_size"]
            found = files.answers(loaded, tokenizer, encoded, settings["max_new_tokens"], config, ends, size, first)
            for row, answer in zip(rows[first:], found):
                if out:
                    out.write(files.line_of(row, answer))
                else:
                    print(files.line_of(row, answer, ascii_only=sys.stdout.isatty()), flush=True)
        if out:
            out.finish()
            print(f"answers  {one_line(str(output))}  ({len(rows) - first:,} of {len(rows):,} made now)")


@app.command
def chat(
    model: str,
    adapter: str | None = None,
    max_new_tokens: int = 512,
    *,
    sampling: SamplingFields = None,
    quant: QuantFields = None,
    device: str = "auto",
) -> None:
    """Talk with a model in the terminal. The temperature is 0.7 unless given.

    Args:
        model: Checkpoint folder or hub id.
        adapter: Folder of a trained adapter.
    """
    from onecard.adapter.origin import form_beside
    from onecard.infer.chat import chat as run

    config = make_config(SamplingConfig, {"temperature": 0.7, **given(sampling)}, "command line")
    loaded, tokenizer = load(model, adapter, quant, device)
    run(loaded, tokenizer, make_console(), max_new_tokens, config, form_beside(adapter))


@app.command
def classify(
    model: str,
    text: str,
    adapter: str | None = None,
    *,
    quant: QuantFields = None,
    device: str = "auto",
) -> None:
    """Print the class of a text with the share of each class, or its reward, by a trained classification head.

    Args:
        model: Checkpoint folder or hub id; without an adapter, one with a classification head.
        text: It is written as the adapter's training rows were: as it is, or as a user's message of a chat.
        adapter: Folder of an adapter that was trained with --task classification or reward.
    """
    from onecard.adapter.head import labels_in
    from onecard.adapter.origin import form_beside
    from onecard.hf.load import load_tokenizer
    from onecard.train.head import classify as run

    labels = labels_in(model, adapter)
    if not labels:
        do = "pass an adapter that was trained with --task classification or reward"
        raise UserError("classify needs a classification head", "none", do, adapter or model)
    loaded = load_headed(model, adapter, quant, device, labels)
    found = run(loaded, load_tokenizer(model, adapter), text, form_beside(adapter))
    if len(labels) == 1:
        return print(f"{labels[0]} {found[0]:.4f}")
    shares = found.softmax(0).tolist()
    first = sorted(range(len(labels)), key=lambda i: -shares[i])
    print("  ".join(f"{printable(labels[i])} {shares[i]:.1%}" for i in first))


@app.command
def serve(
    model: str,
    adapter: list[str] | None = None,
    *,
    fields: ServeFields = None,
    quant: QuantFields = None,
    device: str = "auto",
) -> None:
    """Answer OpenAI's API: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, with streaming.

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
        raise UserError(
            "serving needs fastapi, uvicorn and prometheus-client", str(error), "pip install 'onecard[serve]'"
        ) from None

    folders = name_models(model, adapter or [])
    first = next(filter(None, folders.values()), None)
    quiet_libraries()
    lines = plan_lines(model, config, {**given(quant), "device": device})
    run(load_base(model, first, quant, device), model, folders, config, lines)


def plan_lines(model: str, config: ServeConfig, fields: dict[str, Any]) -> list[str]:
    """Return lines about what the server's answers take at most; none for a model that has no plan."""
    from onecard.hf.load import pick_device
    from onecard.memory.measure import available_bytes, format_bytes
    from onecard.memory.plan import plan_server

    try:
        found, free = plan_server(model, config, **fields), available_bytes(pick_device(fields["device"]))
    except UserError:
        return []
    most = f"{config.max_num_seqs} full answers and a full prefix cache ({config.prefix_cache})"
    lines = [f"memory   {format_bytes(found.total_bytes)} with {most}; {format_bytes(free)} was free"]
    if found.total_bytes > free:
        do = "pass a smaller --max-model-len, --max-num-seqs or --prefix-cache"
        lines.append(f"note     full answers need more memory than was free: {do}")
    return lines


@app.command(name="eval")
def evaluate(
    model: str,
    data: DataWords,
    *,
    adapter: str | None = None,
    fields: DataFields = None,
    quant: QuantFields = None,
    device: str = "auto",
    num_processes: int | None = None,
    parallel: Literal["ddp", "fsdp"] = "ddp",
) -> None:
    """Loss and perplexity of the data's supervised tokens; with a classification head, its loss and metrics.

    Args:
        model: Checkpoint folder or hub id.
        data: Files, folders, patterns or hub ids; PATH:0.3 is a weight in a mixture.
        adapter: Folder of a trained adapter.
        num_processes: Start so many processes with torchrun, which share out the rows, same as in train.
        parallel: With several processes: each has the whole base (ddp), or a part (fsdp), same as in train.
    """
    if num_processes is not None and not is_started():
        return launch(num_processes, sys.argv[1:])
    from math import exp

    from onecard.adapter.head import labels_in
    from onecard.train.evaluate import evaluate as run
    from onecard.train.prepare import check_shardable_checkpoint
    from onecard.train.ranks import join, leave

    config = make_config(DataConfig, given(fields), "command line")
    ranks = join(device)
    is_sharded = parallel == "fsdp" and ranks.count > 1
    if labels := labels_in(model, adapter):
        if ranks.count > 1:
            must, do = "a classification head is evaluated by one process", "leave num_processes out"
            raise UserError(must, f"{ranks.count} processes", do, "num_processes")
        from onecard.train.head import check_classes, evaluate_head, task_of

        dataset = read_data(data, model, adapter, config, task_of(labels))
        check_classes(dataset, labels)
        found = evaluate_head(load_headed(model, adapter, quant, device, labels), dataset, labels)
        scores = "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in found.items())
        return print(f"{scores}  over {len(dataset.examples):,} rows")
    with ranks.together(whole_run=True):
        if is_sharded:
            check_shardable_checkpoint(model)
        with ranks.first_alone():
            dataset = read_data(data, model, adapter, config)
        loaded, _ = load(model, adapter, quant, device, is_sharded)
        loss = run(loaded, dataset, ranks=ranks)
    leave(ranks)
    if ranks.is_first:
        print(f"loss {loss:.4f}  perplexity {exp(min(loss, 50)):.4f}  over {dataset.num_supervised_tokens:,} tokens")
