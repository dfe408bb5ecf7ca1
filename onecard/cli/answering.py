"""The commands that compute with a model: answers, a chat, a server, a loss."""

from __future__ import annotations

import os
import sys
from typing import Literal

from onecard.cli.app import DataFields, DataWords, QuantFields, SamplingFields, ServeFields, app
from onecard.cli.launch import is_started, launch
from onecard.config import DataConfig, SamplingConfig, ServeConfig, make_config
from onecard.errors import UserError, printable
from onecard.terminal import given, load, load_base, load_headed, make_console, read_data


@app.command
def generate(
    model: str,
    prompt: str,
    adapter: str | None = None,
    max_new_tokens: int = 256,
    *,
    sampling: SamplingFields = None,
    system: str | None = None,
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
        system: A system message before the prompt, for a chat template that takes one.
        raw: Go on from the prompt as it is; --no-raw: with the chat template. Default: as the adapter was trained.
    """
    from onecard.adapter.form import ask
    from onecard.adapter.origin import form_beside
    from onecard.infer.generate import generate as run

    config = make_config(SamplingConfig, given(sampling), "command line")
    shown = printable if sys.stdout.isatty() else str  # a file gets the text unchanged
    loaded, tokenizer = load(model, adapter, quant, device)
    form = form_beside(adapter)
    ids, goes_on, note = ask(prompt, tokenizer, form, raw, system)
    if note:
        print(f"note: {note}", file=sys.stderr)
    how = (max_new_tokens, config, lambda text: print(shown(text), end="", flush=True), goes_on)
    run(loaded, tokenizer, ids, *how, form.end_tokens if form else ())
    print()


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
    run(load_base(model, first, quant, device), model, folders, config)


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
