"""Tokens a second of greedy generation: onecard, bitsandbytes+transformers and the 16-bit model, in turn.

    python -m benchmarks.generate [--shape 1.1b] [--tokens 24] [--rounds 3]

One prompt of 32 tokens. The time of the prompt and the first token is subtracted. Each contender is a process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from benchmarks.load import load
from benchmarks.measure import MB, run_child, spread, status_bytes, table, write_result
from benchmarks.shapes import SHAPES, make_checkpoint

CONTENDERS = {"onecard": "onecard", "bnb": "bitsandbytes + transformers", "plain": "16-bit model (transformers)"}


def child(args: argparse.Namespace) -> None:
    folder = str(make_checkpoint(args.shape))
    if args.child == "plain":
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        model = load(args.child, folder)
    model.eval()
    prompt = torch.arange(100, 132)[None]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    seconds(2)
    first = seconds(1)
    rate = (args.tokens - 1) / (seconds(args.tokens) - first)
    print(json.dumps({"rate": rate, "first": first, "peak": status_bytes("VmHWM")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=CONTENDERS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    make_checkpoint(args.shape)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name in CONTENDERS:
            command = ["--child", name, "--shape", args.shape, "--tokens", str(args.tokens)]
            runs[name].append(run_child("benchmarks.generate", *command))
            print(f"{name:8s} {runs[name][-1]['rate']:6.2f} tok/s", flush=True)
    rates = {name: [r["rate"] for r in found] for name, found in runs.items()}
    lines = []
    for name, found in runs.items():
        ratio = statistics.median(rates[name]) / statistics.median(rates["bnb"])
        first = statistics.median(r["first"] for r in found)
        peak = statistics.median(r["peak"] for r in found)
        lines.append([CONTENDERS[name], spread(rates[name]), f"{ratio:.2f}x", f"{first:.2f}", f"{peak / MB:,.0f}"])
    header = ["", "tok/s", "speed / bnb", "32-token prompt, s", "peak MB"]
    note = f"{args.shape} Llama shape, bfloat16, greedy, {args.tokens} tokens after a prompt of 32."
    print(write_result(f"generate_{args.shape}", "Generation, side by side", f"{note}\n\n{table(header, lines)}"))


if __name__ == "__main__":
    main()
