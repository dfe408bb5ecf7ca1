"""Mixture of experts, onecard and bitsandbytes + peft in turn: bytes of the base, peak of loading, speed of a step.

    python -m benchmarks.experts [--shape moe-1.4b] [--length 512] [--steps 4] [--rounds 3]

bitsandbytes quantizes linears and leaves experts in 16 bits. Every run is a process of its own on the same checkpoint
and tokens, with LoRA on attention's linears, or also on experts (peft's target_parameters). Peaks count anonymous
memory above the process's start. The loading bound is the loaded model plus twice the largest tensor, a layer's stacked
experts in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.load import load
from benchmarks.measure import MB, anonymous_peak, run_child, spread, status_bytes, table, write_result
from benchmarks.shapes import EXPERT_SHAPES, make_checkpoint
from benchmarks.train import RANK, RATE, start_adapter

CONTENDERS = {"onecard": "onecard", "bnb": "bitsandbytes + peft"}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SETTINGS: dict[str, list[str] | None] = {"attention": None, "experts": ["gate_up_proj", "down_proj"]}


def rows(args: argparse.Namespace) -> torch.Tensor:
    """Return random tokens, int64 (steps, length), the same in every process."""
    vocabulary = EXPERT_SHAPES[args.shape]["vocab_size"]
    return torch.randint(4, vocabulary, (args.steps, args.length), generator=torch.Generator().manual_seed(1))


def train_onecard(base: Any, args: argparse.Namespace) -> list[float]:
    """Return the seconds of each step of onecard's own loop."""
    from peft import get_peft_model

    from onecard.adapter.layers import lora_config
    from onecard.config import TrainConfig, make_config
    from onecard.data.chat.mask import Example
    from onecard.data.loader import Loader
    from onecard.hf.attention import use_packed_attention
    from onecard.train.run import Run
    from onecard.train.step import optimizer_step

    fields = {
        "model": "-", "data": "-", "output": "-", "r": RANK, "lora_alpha": 2 * RANK, "learning_rate": RATE,
        "target_modules": LINEARS, "target_parameters": SETTINGS[args.setting], "gradient_accumulation_steps": 1,
        "max_seq_length": args.length, "packing": False, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
    }  # fmt: skip
    config = make_config(TrainConfig, fields, "benchmark")
    model = get_peft_model(base, lora_config(config, base))
    start_adapter(model)
    data = [Example(row, row, "random") for row in rows(args).tolist()]
    run = Run(config, model, Loader(data, args.length, False, 1, 0), args.steps, {})
    model.train()
    with use_packed_attention(run.base):
        return [optimizer_step(run)["seconds"] for _ in range(args.steps)]


def train_peer(base: Any, args: argparse.Namespace) -> list[float]:
    """Same as `train_onecard`, with plain peft and torch's AdamW."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, target_parameters=SETTINGS[args.setting])
    model: Any = get_peft_model(base, settings)
    start_adapter(model)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, times = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0), []
    for row in rows(args):
        begin = time.perf_counter()
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    return times


def child(args: argparse.Namespace) -> None:
    import bitsandbytes  # noqa: F401  both contenders do the same imports before the clock starts

    import onecard.train.loop  # noqa: F401
    from onecard.memory.measure import return_large_blocks
    from onecard.nn.experts import weights_of

    if args.child == "onecard":
        return_large_blocks()
    start = status_bytes("RssAnon")
    with anonymous_peak() as peak:
        begin = time.perf_counter()
        base = load(args.child, str(make_checkpoint(args.shape)))
        seconds = time.perf_counter() - begin
    scales = sum(weight.loaded_state.nbytes for module in base.modules() for _, weight in weights_of(module))
    if args.child == "bnb":
        states = [p.quant_state for p in base.parameters() if hasattr(p, "quant_state")]
        scales = sum(s.absmax.nbytes + (s.state2.absmax.nbytes if s.nested else 0) for s in states)
    found = {"load": seconds, "load_peak": peak[0] - start, "model": sum(p.nbytes for p in base.parameters()) + scales}
    with anonymous_peak() as peak:
        times = (train_onecard if args.child == "onecard" else train_peer)(base, args)
    print(json.dumps({**found, "seconds": times[1:], "peak": peak[0] - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=EXPERT_SHAPES, default="moe-1.4b")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=CONTENDERS)
    parser.add_argument("--setting", choices=SETTINGS, default="attention")
    args = parser.parse_args()
    if args.child:
        return child(args)
    make_checkpoint(args.shape)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    common = ["--shape", args.shape, "--length", str(args.length), "--steps", str(args.steps)]
    for _ in range(args.rounds):
        for setting in SETTINGS:
            for name in CONTENDERS:
                found = run_child("benchmarks.experts", "--child", name, "--setting", setting, *common)
                runs.setdefault((setting, name), []).append(found)
                speed = args.length / statistics.median(found["seconds"])
                print(f"{name:8s} {setting:10s} model {found['model'] / MB:6,.0f} MB  load {found['load']:5.1f} s "
                      f"{found['load_peak'] / MB:6,.0f} MB  {speed:6.1f} tok/s {found['peak'] / MB:6,.0f} MB",
                      flush=True)  # fmt: skip
    print(report(args, runs))


def report(args: argparse.Namespace, runs: dict[tuple[str, str], list[dict[str, Any]]]) -> Path:
    """Write the table to results/."""
    lines = []
    for (setting, name), found in runs.items():
        speeds = [args.length / seconds for run in found for seconds in run["seconds"]]
        others = [args.length / seconds for run in runs[setting, "bnb"] for seconds in run["seconds"]]
        middle = {key: statistics.median(run[key] for run in found) for key in ("model", "load", "load_peak", "peak")}
        cells = [CONTENDERS[name], setting, f"{middle['model'] / MB:,.0f}", f"{middle['load']:.1f}"]
        cells += [f"{middle['load_peak'] / MB:,.0f}", spread(speeds)]
        cells += [f"{statistics.median(speeds) / statistics.median(others):.2f}x", f"{middle['peak'] / MB:,.0f}"]
        lines.append(cells)
    shape = EXPERT_SHAPES[args.shape]
    largest = shape["num_experts"] * 2 * shape["moe_intermediate_size"] * shape["hidden_size"] * 2
    bound = runs["attention", "onecard"][0]["model"] + 2 * largest
    header = ["", "LoRA on", "model, MB", "load, s", "load peak, MB", "tok/s", "speed / bnb", "peak, MB"]
    note = (
        f"{args.shape} Qwen3-MoE shape ({shape['num_experts']} experts, {shape['num_experts_per_tok']} a token), "
        f"{args.length} tokens a step, rank {RANK}, bfloat16, activations kept; {args.rounds} processes of "
        f"{args.steps} steps each, the first left out. Loading may peak at {bound / MB:,.0f} MB by the bound."
    )
    return write_result(f"experts_{args.shape}", "A mixture of experts", f"{note}\n\n{table(header, lines)}")


if __name__ == "__main__":
    main()
