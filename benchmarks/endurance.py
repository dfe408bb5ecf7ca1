"""A long run of a tiny model, observed from outside: its memory and open files must not grow with its steps.

    python -m benchmarks.endurance [--steps 5000] [--every 16]

It runs `onecard train` with a checkpoint and a validation loss every 16 steps, and reads its anonymous memory, its
resident memory and its open descriptors from /proc. After a tenth of the steps (warm-up), growth is the least-squares
slope over the remaining steps, times their number. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.shapes import TOKENIZER
from onecard.hf.load import load_tokenizer

DATA = TOKENIZER.parent / "data" / "train.jsonl"
MOST_GROWTH_BYTES = 4 << 20  # the report keeps a row of metrics: some 500 bytes a step, 2.5 MB in 5,000


def make_model(folder: Path) -> Path:
    """Write a Llama of one layer with the demo's tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(TOKENIZER))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def watch(process: subprocess.Popen[bytes], metrics: Path, seconds: float = 0.25) -> list[dict[str, Any]]:
    """Return readings of step, memory and descriptors until the process ends."""
    rows, proc = [], Path(f"/proc/{process.pid}")
    while process.poll() is None:
        time.sleep(seconds)
        try:
            status = (proc / "status").read_text()
            found = {field: int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) << 10 for field in ("VmRSS", "RssAnon")}
            descriptors = len(list((proc / "fd").iterdir()))
            with metrics.open("rb") as file:
                file.seek(max(0, metrics.stat().st_size - 4096))
                step = json.loads(file.read().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError):  # the process has just ended or not begun, or a line is incomplete
            continue
        rows.append({"step": step, **found, "descriptors": descriptors})
    return rows


def growth(rows: list[dict[str, Any]], field: str) -> float:
    """Return how much a number grows over these rows, by its slope."""
    steps = numpy.array([row["step"] for row in rows], dtype=float)
    slope = numpy.polyfit(steps, [row[field] for row in rows], 1)[0]
    return float(slope * (steps[-1] - steps[0]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=16, help="steps between checkpoints and validation losses")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "run"
        flags = {
            "model": make_model(Path(name) / "model"), "data": DATA, "output": output, "device": "cpu",
            "max-steps": args.steps, "save-steps": args.every, "eval-steps": args.every, "validation-split": 0.01,
            "max-seq-length": 64, "gradient-accumulation-steps": 1, "r": 4, "compute-dtype": "float32",
        }  # fmt: skip
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "onecard.cli", "train", *words], stdout=subprocess.DEVNULL)
        rows = watch(process, output / "metrics.jsonl")
        assert process.returncode == 0, process.returncode
        evaluations = sum("eval_loss" in line for line in (output / "metrics.jsonl").read_text().splitlines())
    print(f"{args.steps:,} steps, {-(-args.steps // args.every)} checkpoints, {evaluations} evaluations")
    print(f"{time.perf_counter() - start:.0f} s\n")
    print("| step | resident MB | of it anonymous | descriptors |\n|---:|---:|---:|---:|")
    for mark in range(args.steps // 10, args.steps + 1, args.steps // 10):
        row = min(rows, key=lambda row: abs(row["step"] - mark))
        print(f"| {row['step']} | {row['VmRSS'] / 1e6:.1f} | {row['RssAnon'] / 1e6:.1f} | {row['descriptors']} |")
    warm = [row for row in rows if args.steps // 10 <= row["step"] < args.steps]  # after them the report is drawn
    grown, most = growth(warm, "RssAnon"), {row["descriptors"] for row in warm}
    print(f"\ngrowth {grown / 1e6:+.2f} MB over {len(warm)} readings; descriptors {min(most)} to {max(most)}")
    if grown > MOST_GROWTH_BYTES or growth(warm, "descriptors") >= 1:
        sys.exit("it grows")


if __name__ == "__main__":
    main()
