"""What a file in few bits keeps of an adapter: trained as usual and rounded at the end, or trained for the file.

    python -m benchmarks.served [--model demo|135m] [--steps 60] [--formats q4_0 ...] [--tokens 1500]

The share that is kept is (loss of the base - loss of the file) / (loss of the base - loss of the live adapter that was
trained as usual), on held-out rows: the base is in NF4, as in training, and the file is read by its own reader
(onecard/export/verify.py). Both trainings have the same rows, seed and learning rate. The demo is the embedded model,
135m is SmolLM2-135M-Instruct on GSM8K (benchmarks/real.py).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import table, write_result
from benchmarks.real import DATA, make_model
from onecard.adapter.load import with_adapter
from onecard.api import export, train
from onecard.config import DataConfig, ExportConfig, QuantConfig, TrainConfig, make_config
from onecard.data.load import load_dataset
from onecard.demo.run import SETTINGS
from onecard.export.merge.quantized import requantize
from onecard.export.readers import load_written, logits
from onecard.hf.load import load_model, load_tokenizer
from onecard.train.loss import supervised

FORMATS = ("q4_0", "gptq", "nvfp4", "nf4")
HEADER = ["format", "rounded at the end", "kept", "trained for it", "kept", "its live adapter", "seconds a step"]


def as_chats(source: Path, target: Path) -> Path:
    """Write GSM8K's rows as chats."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    chats = [[("user", row["question"]), ("assistant", row["answer"])] for row in rows]
    messages = ([{"role": role, "content": content} for role, content in turns] for turns in chats)
    target.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages), encoding="utf-8")
    return target


def settings(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Return the fields of a run, without its output."""
    if name == "demo":
        fields = {**SETTINGS, "num_train_epochs": 1.0, "max_steps": steps}
    else:
        data = {key: str(as_chats(DATA / f"{key}.jsonl", folder / f"{key}.jsonl")) for key in ("train_300", "eval_100")}
        fields = {"model": str(make_model()), "data": data["train_300"], "eval_data": data["eval_100"], "r": 16,
                  "learning_rate": 5e-4, "max_seq_length": 512, "gradient_accumulation_steps": 1,
                  "max_steps": steps}  # fmt: skip
    return {**fields, "sample_prompts": [], "eval_strategy": "no", "save_strategy": "no", "device": "cpu"}


def loss_of(model: Any, rows: Iterable[Any]) -> float:
    """Return the mean loss per supervised token."""
    return mean_loss(lambda ids, positions: logits(model, ids, positions, False), rows)


@torch.no_grad()
def mean_loss(scores: Callable[[Tensor, Tensor], Tensor], rows: Iterable[Any]) -> float:
    """Return the mean loss per supervised token. `scores` returns logits (P, V) of ids (1, T) at P positions."""
    total = count = 0.0
    for row in rows:
        positions, targets = supervised(torch.tensor([row.labels]))
        z = scores(torch.tensor([row.input_ids]), positions)
        total += torch.nn.functional.cross_entropy(z, targets, reduction="sum").item()
        count += len(targets)
    return total / count


def loss_of_file(format: str, model: str, adapter: Path, folder: Path, rows: list[Any]) -> float:
    """Write the file, read it back, and return its loss."""
    if format == "nf4":
        return loss_of(load_written(requantize(model, str(adapter), str(folder), QuantConfig())[0], "cpu"), rows)
    kind = {"format": "gguf", "outtype": format} if format == "q4_0" else {"format": format}
    fields = {**kind, "model": model, "adapter": str(adapter), "output": str(folder)}
    return loss_of(load_written(export(make_config(ExportConfig, fields, "benchmark")).path, "cpu"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "135m"), default="demo")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tokens", type=int, default=1500, help="held-out tokens at least")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fields = settings(given.model, folder, given.steps)
        model = fields["model"]
        data = load_dataset(fields["eval_data"], load_tokenizer(model), make_config(DataConfig, {}, "benchmark"))
        rows: list[Any] = []
        while sum(len(row.input_ids) for row in rows) < given.tokens and len(rows) < len(data.examples):
            rows.append(data.examples[len(rows)])

        def trained(name: str, **more: Any) -> tuple[Path, Any, float]:
            start = time.perf_counter()
            config = make_config(TrainConfig, {**fields, "output": str(folder / name), **more}, "benchmark")
            result = train(config)
            return result.adapter, result.model, (time.perf_counter() - start) / given.steps

        adapter, _, seconds = trained("plain")
        base = load_model(model, compute_dtype=torch.float32, device="cpu")
        before = loss_of(base, rows)
        live = loss_of(with_adapter(base, str(adapter)), rows)
        print(f"base {before:.4f}, live adapter {live:.4f}, {seconds:.2f} s a step", flush=True)
        cells = []
        for format in given.formats:
            rounded = loss_of_file(format, model, adapter, folder / f"{format}-plain", rows)
            own, tuned, each = trained(format, train_for=format)
            own_live = loss_of(tuned.get_base_model(), rows)  # its layers round in the forward, as in training
            served = loss_of_file(format, model, own, folder / f"{format}-own", rows)
            kept = [f"{(before - loss) / (before - live):.1%}" for loss in (rounded, served)]
            cells.append(
                [format, f"{rounded:.4f}", kept[0], f"{served:.4f}", kept[1], f"{own_live:.4f}", f"{each:.2f}"]
            )
            print(*cells[-1], flush=True)
    body = f"""\
Held-out loss of {sum(len(row.input_ids) for row in rows):,} tokens after {given.steps} steps; a step is one update.
Base in NF4: {before:.4f}. Live adapter, trained as usual: {live:.4f}, {seconds:.2f} s a step.

{table(HEADER, cells)}

    python -m benchmarks.served --model {given.model} --steps {given.steps}"""
    print(write_result(f"served_{given.model}", "What a file in few bits keeps of an adapter", body))


if __name__ == "__main__":
    main()
