"""The demo's tuned model in each export format, read by other projects' loaders: task accuracy and perplexity.

    python -m benchmarks.exports [--adapter DIR]

transformers with GPTQModel (pip install gptqmodel optimum) reads GPTQ and AWQ and computes in bfloat16. For comparison:
the live adapter, and the merged model in 16 bits and with its linears rounded to nearest, in the same groups.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from math import exp
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default fails on two cores

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

from benchmarks.measure import table, write_result
from onecard.adapter.load import with_adapter
from onecard.config import CalibrationConfig, DataConfig
from onecard.data.dataset import Dataset
from onecard.data.load import load_dataset
from onecard.demo.run import SETTINGS, exact_match, read_rows, run_demo
from onecard.export.calibrated.writer import export_folder
from onecard.export.merge.merged import merge
from onecard.export.readers import logits
from onecard.hf.load import load_model, load_tokenizer
from onecard.quant.grouped import round_to_nearest
from onecard.train.loss import supervised

BASE, TRAIN, HELDOUT = (str(SETTINGS[key]) for key in ("model", "data", "eval_data"))
CONFIG = CalibrationConfig(max_seq_length=512, group_size=64)  # the demo's intermediate size is 704 = 11 x 64
READERS: dict[str, Any] = {
    "gptq": lambda: GPTQConfig(bits=4, backend="gptq_torch"),
    "awq": lambda: AwqConfig(bits=4, group_size=CONFIG.group_size, backend="torch_awq"),  # type: ignore
}


def calibrated(format: Any, adapter: str, folder: Path) -> Any:
    """Export the tuned model, and load the result with GPTQModel."""
    export_folder(format, BASE, adapter, TRAIN, str(folder / format), CONFIG)
    quantization = READERS[format]()
    return AutoModelForCausalLM.from_pretrained(
        folder / format, dtype=torch.bfloat16, device_map="cpu", quantization_config=quantization
    )


def rounded(sym: bool, merged: Path) -> Any:
    """Load the merged model and round every linear of its layers to the nearest level."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.copy_(round_to_nearest(module.weight.data.float(), CONFIG.group_size, sym).dequantize())
    return model


def models(adapter: str, folder: Path) -> Iterator[tuple[str, Any]]:
    yield "live adapter", with_adapter(load_model(BASE, device="cpu"), adapter)
    merged = merge(BASE, adapter, str(folder / "merged"))
    yield "merged, 16 bits", AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    yield "rounded to nearest, symmetric", rounded(True, merged)
    yield "GPTQ", calibrated("gptq", adapter, folder)
    yield "rounded to nearest, asymmetric", rounded(False, merged)
    yield "AWQ", calibrated("awq", adapter, folder)


@torch.no_grad()
def perplexity(model: Any, dataset: Dataset) -> float:
    """Return the perplexity of the supervised tokens."""
    total, count = 0.0, 0
    for example in dataset.examples:
        positions, target = supervised(torch.tensor([example.labels]))
        z = logits(model, torch.tensor([example.input_ids]), positions, False)
        total += torch.nn.functional.cross_entropy(z, target, reduction="sum").item()
        count += len(target)
    return exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", help="of the demo; without it the demo is run")
    args = parser.parse_args()
    tokenizer, rows, lines = load_tokenizer(BASE), read_rows(Path(HELDOUT)), []
    dataset = load_dataset(HELDOUT, tokenizer, DataConfig(max_seq_length=512))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = args.adapter or str(run_demo(str(folder / "demo"), Console()).adapter)
        for what, model in models(adapter, folder):
            model.eval()
            lines.append([what, f"{exact_match(model, tokenizer, rows):.1%}", f"{perplexity(model, dataset):.5f}"])
            print("  ".join(lines[-1]), flush=True)
    note = f"The demo's model and adapter, 4 bits in groups of {CONFIG.group_size}; {len(rows)} held-out messages."
    content = table(["model", "exact match", "perplexity"], lines)
    print(write_result("exports", "Exports, read by others", f"{note}\n\n{content}"))


if __name__ == "__main__":
    main()
