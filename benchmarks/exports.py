"""A tuned model in each format that is a folder, read by other projects' loaders: task accuracy and perplexity.

    python -m benchmarks.exports [--model demo|135m] [--adapter DIR] [--formats gptq ...]

The demo's answers are compared with the references in every character. 135m is SmolLM2-135M-Instruct, trained on GSM8K
for 60 steps (benchmarks/served.py); it has a perplexity only. For comparison: the live adapter, and the merged model in
16 bits and with its linears rounded to nearest, in the same groups. The readers, all of them computing in bfloat16:

    gptq, awq           transformers with GPTQModel (pip install gptqmodel optimum)
    w4a16, fp8, nvfp4   transformers with compressed-tensors
    nf4                 transformers with bitsandbytes
    mlx                 mlx-lm (pip install mlx-lm mlx[cpu])

A format whose reader is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default fails on two cores

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

from benchmarks.measure import table, write_result
from benchmarks.served import loss_of, mean_loss, settings
from onecard.adapter.load import with_adapter
from onecard.api import export, train
from onecard.config import DataConfig, ExportConfig, QuantConfig, TrainConfig, make_config
from onecard.data.dataset import Dataset
from onecard.data.load import load_dataset
from onecard.demo.run import ANSWER_TOKENS, exact_match, ordered_prompts, read_rows, run_demo
from onecard.export.merge.merged import merge
from onecard.export.merge.quantized import requantize
from onecard.hf.load import load_model, load_tokenizer
from onecard.quant.grouped import round_to_nearest

STEPS = 60
GROUP = 64  # the demo's intermediate size is 704 = 11 x 64
FORMATS = ("gptq", "awq", "w4a16", "fp8", "nvfp4", "nf4", "mlx")
CALIBRATED = ("gptq", "awq", "w4a16")
QUANTIZATIONS: dict[str, Callable[[], Any]] = {
    "gptq": lambda: GPTQConfig(bits=4, backend="gptq_torch"),
    "awq": lambda: AwqConfig(bits=4, group_size=GROUP, backend="torch_awq"),  # type: ignore
}


class Task:
    """A model, its adapter, and what a written model of it is asked."""

    def __init__(self, name: str, adapter: str | None, folder: Path):
        self.folder = folder
        fields = settings(name, folder, STEPS)
        self.base, self.train, self.heldout = (str(fields[key]) for key in ("model", "data", "eval_data"))
        if adapter is None and name == "demo":
            adapter = str(run_demo(str(folder / "run"), Console()).adapter)
        if adapter is None:
            adapter = str(
                train(make_config(TrainConfig, {**fields, "output": str(folder / "run")}, "benchmark")).adapter
            )
        self.adapter, self.tokenizer = adapter, load_tokenizer(self.base)
        self.rows = read_rows(Path(self.heldout)) if name == "demo" else []
        self.dataset: Dataset = load_dataset(self.heldout, self.tokenizer, DataConfig(max_seq_length=512))

    def ask(self, model: Any) -> list[str]:
        """Return the scores of a model of transformers: exact matches and perplexity."""
        model.eval()
        match = f"{exact_match(model, self.tokenizer, self.rows):.1%}" if self.rows else ""
        return [match, f"{exp(loss_of(model, self.dataset.examples)):.5f}"]

    def ask_mlx(self, path: Path) -> list[str]:
        """Return the scores of a folder in mlx-lm."""
        import mlx.core as mx  # type: ignore
        from mlx_lm.generate import generate_step  # type: ignore
        from mlx_lm.utils import load_model as load_mlx  # type: ignore

        model, _ = load_mlx(path)
        end, right = self.tokenizer.eos_token_id, 0
        for ids, expected in ordered_prompts(self.rows, self.tokenizer):
            made = [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=ANSWER_TOKENS)]
            made = made[: made.index(end)] if end in made else made
            right += self.tokenizer.decode(made, skip_special_tokens=True) == expected

        def scores(ids: Tensor, kept: Tensor) -> Tensor:
            return torch.tensor(model(mx.array(ids.tolist()))[0].astype(mx.float32).tolist())[kept]

        match = f"{right / len(self.rows):.1%}" if self.rows else ""
        return [match, f"{exp(mean_loss(scores, self.dataset.examples)):.5f}"]

    def written(self, format: str) -> Path:
        """Export the tuned model and return the folder."""
        folder = self.folder / format
        if format == "nf4":
            return requantize(self.base, self.adapter, str(folder), QuantConfig())[0]
        fields = {"format": format, "model": self.base, "adapter": self.adapter, "output": str(folder), "device": "cpu"}
        if format in CALIBRATED:
            fields |= {"data": self.train, "max_seq_length": 512, "group_size": GROUP}
        return export(make_config(ExportConfig, fields, "benchmark")).path

    def rounded(self, sym: bool, merged: Path) -> Any:
        """Load the merged model and round every linear of its layers to the nearest level."""
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.copy_(round_to_nearest(module.weight.data.float(), GROUP, sym).dequantize())
        return model

    def read(self, format: str) -> list[str]:
        """Export to a format, load the result by its reader, and return the scores."""
        folder = self.written(format)
        if format == "mlx":
            return self.ask_mlx(folder)
        how = {"quantization_config": QUANTIZATIONS[format]()} if format in QUANTIZATIONS else {}
        return self.ask(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **how))

    def contenders(self, formats: list[str]) -> Iterator[tuple[str, Callable[[], list[str]]]]:
        """Yield the name of each model, and what computes its scores."""
        yield "live adapter", lambda: self.ask(with_adapter(load_model(self.base, device="cpu"), self.adapter))
        merged = merge(self.base, self.adapter, str(self.folder / "merged"))
        yield (
            "merged, 16 bits",
            lambda: self.ask(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)),
        )
        yield "rounded to nearest, symmetric", lambda: self.ask(self.rounded(True, merged))
        yield "rounded to nearest, asymmetric", lambda: self.ask(self.rounded(False, merged))
        for format in formats:
            yield format, partial(self.read, format)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("demo", "135m"), default="demo")
    parser.add_argument("--adapter", help="of the model; without it one is trained")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    args = parser.parse_args()
    lines, missing = [], []
    with tempfile.TemporaryDirectory() as name:
        task = Task(args.model, args.adapter, Path(name))
        for what, scores in task.contenders(args.formats):
            try:
                lines.append([what, *scores()])
            except ImportError as error:
                missing.append(f"{what}: {error}".splitlines()[0])
                continue
            print("  ".join(lines[-1]), flush=True)
    count = (
        f"{len(task.rows)} held-out messages" if task.rows else f"{len(task.dataset.examples)} held-out rows of GSM8K"
    )
    note = f"Model and adapter: {args.model}. Integers of 4 bits have groups of {GROUP} (mlx: its own 64); {count}."
    left_out = "".join(f"\n\nNot read here: {each}." for each in missing)
    content = table(["model", "exact match", "perplexity"], lines)
    print(write_result(f"exports_{args.model}", "Exports, read by others", f"{note}\n\n{content}{left_out}"))


if __name__ == "__main__":
    main()
