"""Training speed and memory: onecard, bitsandbytes+peft, and LoRA on a 16-bit base (peft), in turn.

    python -m benchmarks.train [--shape 135m|1.1b] [--length 512] [--steps 6] [--rounds 3]

Every run is a process of its own on the same checkpoint, tokens, rank, targets and dtype. Every token is supervised.
"onecard's step on 16-bit weights" is ours with all weights dequantized beforehand: it shows the cost of 4 bits. Each
contender runs with and without recomputation of activations. Rows with the same setting are comparable; a contender's
fastest row is its best. The final losses come from the same initial adapter and the same batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import (
    MB,
    RESULTS,
    matmul_flops,
    run_child,
    spread,
    status_bytes,
    table,
    write_result,
)
from benchmarks.shapes import SHAPES, make_checkpoint

CONTENDERS = {
    "onecard": "onecard",
    "onecard16": "onecard's step on 16-bit weights",
    "bnb": "bitsandbytes + peft",
    "lora": "16-bit LoRA (peft)",
}
RANK, RATE = 16, 2e-4


def rows(shape: str, length: int, count: int) -> torch.Tensor:
    """Return random tokens, int64 (count, length), the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, SHAPES[shape]["vocab_size"], (count, length), generator=generator)


def start_adapter(model: Any, seed: int = 2) -> None:
    """Set the same A and B in every contender. B is not zero, so that A has gradients from the first step."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            size = 0.02 if "lora_A" in name else 0.002
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))


def load_onecard(args: argparse.Namespace, folder: Path) -> Any:
    import onecard
    from onecard.memory.measure import return_large_blocks

    return_large_blocks()  # as train does
    return onecard.load_model(str(folder), compute_dtype=torch.bfloat16, device="cpu")


def random_loader(args: argparse.Namespace) -> Any:
    """Return onecard's loader of the random rows, in the peers' order."""
    from onecard.data.chat.mask import Example
    from onecard.data.loader import Loader

    data = [Example(row, row, "random") for row in rows(args.shape, args.length, args.steps).tolist()]
    loader = Loader(data, args.length, False, 1, 0)
    loader.batches = lambda epoch: [[i] for i in range(len(data))]  # type: ignore
    return loader


def onecard_steps(
    args: argparse.Namespace, folder: Path, base: Any, loader: Any, start: Callable[[Any], None] = start_adapter
) -> Iterator[tuple[float, float]]:
    """Run steps of onecard's own loop. Yield the seconds and loss of each. `start` sets the adapter's weights."""
    from peft import get_peft_model

    from onecard.adapter.layers import lora_config
    from onecard.config import TrainConfig, make_config
    from onecard.hf.attention import use_packed_attention
    from onecard.kernels.cpu.contention import sharing_cores
    from onecard.memory.inputs import MemoryStrategy
    from onecard.train.loop import frozen_objects
    from onecard.train.recompute import recompute_layers
    from onecard.train.run import Run
    from onecard.train.step import optimizer_step

    fields = {
        "model": str(folder), "data": "-", "output": "-", "r": RANK, "lora_alpha": 2 * RANK, "learning_rate": RATE,
        "gradient_checkpointing": args.recompute, "max_seq_length": args.length, "max_steps": args.steps,
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "gradient_accumulation_steps": 1, "packing": False,
        "weight_decay": 0.0,
    }  # fmt: skip
    config = make_config(TrainConfig, fields, "benchmark")
    model = get_peft_model(base, lora_config(config))
    start(model)
    if args.child == "onecard16":
        keep_16_bits(model)
    strategy = MemoryStrategy(base.config.num_hidden_layers if args.recompute else 0)
    run = Run(config, model, loader, args.steps, {}, strategy=strategy)
    model.train()
    recompute_layers(run.base, strategy)
    with use_packed_attention(run.base), frozen_objects(), sharing_cores():
        for _ in range(args.steps):
            step = optimizer_step(run)
            yield step["seconds"], step["loss"]


def keep_16_bits(
    model: Any, weight: Callable[[str, Any], torch.Tensor] = lambda name, module: module.dequantize()
) -> None:
    """Multiply by 16-bit weights, so that the step is LoRA on a 16-bit base, with the fastest product there: torch's,
    or (on AMX) our own.

    Args:
        weight: returns the weight of a 4-bit linear, whose name it gets. The default dequantizes it once.
    """
    from onecard.kernels import dequantize
    from onecard.kernels.cpu import native
    from onecard.nn.linear import Linear4bit

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    kept = {module.weight.data_ptr(): weight(name, module) for name, module in linears}
    dequantize.dequantize_to_scratch = lambda weight, dtype: nullcontext(kept[weight.codes.data_ptr()])
    for name in ("linear", "linear_backward"):
        on_dense(native, name, kept)


def on_dense(native: Any, name: str, kept: dict[int, torch.Tensor]) -> None:
    compute = getattr(native, name)

    def call(x, weight, *rest):
        return compute(x, weight if isinstance(weight, torch.Tensor) else kept[weight.codes.data_ptr()], *rest)

    setattr(native, name, call)


def load_peer(args: argparse.Namespace, folder: Path) -> Any:
    """Load the base with transformers and (for bnb) bitsandbytes, as their documentation shows."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization if args.child == "bnb" else None
    )


def random_batches(args: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    for row in rows(args.shape, args.length, args.steps):
        yield {"input_ids": row[None], "labels": row[None]}


def peer_steps(
    args: argparse.Namespace,
    base: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    start: Callable[[Any], None] = start_adapter,
) -> Iterator[tuple[float, float]]:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, settings)
    start(model)
    if args.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    for batch in batches:
        begin = time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found = loss.item()
        yield time.perf_counter() - begin, found


def steps(args: argparse.Namespace, folder: Path, base: Any) -> Iterator[tuple[float, float]]:
    """Yield the steps of the contender args.child over random rows."""
    if args.child.startswith("onecard"):
        return onecard_steps(args, folder, base, random_loader(args))
    return peer_steps(args, base, random_batches(args))


def child(args: argparse.Namespace) -> None:
    folder = make_checkpoint(args.shape)
    ours = args.child.startswith("onecard")
    if ours:
        import onecard.hf.load
        import onecard.train.loop  # noqa: F401
    resident, begin = status_bytes("VmRSS"), time.perf_counter()
    base = (load_onecard if ours else load_peer)(args, folder)
    seconds = time.perf_counter() - begin
    times, losses = zip(*steps(args, folder, base))
    found = {"seconds": times[1:], "losses": losses, "load": seconds, "base": resident}
    print(json.dumps({**found, "peak": status_bytes("VmHWM")}))


def useful_flops(shape: str, length: int, recompute: bool) -> float:
    """Return floating-point operations per token: forward, input gradients and LoRA, attention; no weight gradients.

    4 N + 4 V d + 6 P + 3.5 (2 S d L); with full recompute 6 N + 4 V d + 8 P + 4.5 (2 S d L).
    """
    s = SHAPES[shape]
    d, f, L = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    kv = d * s["num_key_value_heads"] // s["num_attention_heads"]
    linears = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    N = L * sum(a * b for a, b in linears)
    P = L * sum(RANK * (a + b) for a, b in linears)
    again = recompute
    return (
        (6 if again else 4) * N
        + 4 * s["vocab_size"] * d
        + (8 if again else 6) * P
        + (4.5 if again else 3.5) * 2 * length * d * L
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--settings", nargs="*", choices=("keep", "recompute"), default=["keep", "recompute"])
    parser.add_argument("--child", choices=CONTENDERS)
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    if args.child:
        return child(args)
    make_checkpoint(args.shape)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    common = ["--shape", args.shape, "--length", str(args.length), "--steps", str(args.steps)]
    for number in range(args.rounds):
        for setting in args.settings:
            for name in args.only:
                extra = ["--recompute"] if setting == "recompute" else []
                found = run_child("benchmarks.train", "--child", name, *common, *extra)
                runs.setdefault((name, setting), []).append(found)
                speed = args.length / statistics.median(found["seconds"])
                print(f"round {number + 1}  {name:8s} {setting:10s} {speed:7.1f} tok/s  {found['peak'] / MB:7.0f} MB",
                      flush=True)  # fmt: skip
    print(report(args, runs))


def report(args: argparse.Namespace, runs: dict[tuple[str, str], list[dict[str, Any]]]) -> Path:
    """Write the table and the chart to results/."""
    limit = matmul_flops()
    speed = {key: [args.length / s for r in found for s in r["seconds"]] for key, found in runs.items()}
    peak = {key: statistics.median(r["peak"] for r in found) for key, found in runs.items()}
    lines = []
    for (name, setting), found in runs.items():
        middle = statistics.median(speed[name, setting])
        share = middle * useful_flops(args.shape, args.length, setting == "recompute") / limit
        cells = [CONTENDERS[name], setting, spread(speed[name, setting]), f"{share:.0%}"]
        cells += [f"{peak[name, setting] / MB:,.0f}", f"{statistics.median(r['load'] for r in found):.1f}"]
        other = ("bnb", setting)
        if other in runs:
            cells += [f"{middle / statistics.median(speed[other]):.2f}x", f"{peak[name, setting] / peak[other]:.2f}x"]
        else:
            cells += ["", ""]
        cells.append(f"{found[0]['losses'][-1]:.4f}")
        lines.append(cells)
    header = [
        "",
        "activations",
        "tok/s",
        "of GEMM limit",
        "peak MB",
        "load s",
        "speed / bnb",
        "memory / bnb",
        "last loss",
    ]
    gaps = loss_gaps(runs)
    body = (
        f"{args.shape} Llama shape, {args.length} tokens a step, rank {RANK} on all linears, bfloat16, AdamW; "
        f"median (least to most) of {args.rounds} processes of {args.steps} steps each, the first step left out. "
        f"Peak is the process's whole resident memory. GEMM limit measured: {limit / 1e9:.0f} GFLOP/s.\n\n"
        f"{table(header, lines)}\n\n{gaps}\n"
    )
    chart = draw(args, speed, peak)
    return write_result(f"train_{args.shape}_{args.length}", "Training, side by side", f"{body}\n![]({chart.name})")


def loss_gaps(runs: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Return the largest difference between ours and bitsandbytes+peft at any step, and bfloat16's rounding step."""
    found = []
    for setting in ("keep", "recompute"):
        if ("onecard", setting) in runs and ("bnb", setting) in runs:
            pairs = list(zip(runs["onecard", setting][0]["losses"], runs["bnb", setting][0]["losses"]))
            gap = max(abs(a - b) for a, b in pairs)
            grain = max(abs(b) for _, b in pairs) * 2**-8
            found.append(
                f"Losses over {len(pairs)} steps ({setting}): ours and bitsandbytes+peft differ by at most "
                f"{gap:.4f}; one rounding of a loss of that size to bfloat16 is {grain:.4f}."
            )
    return "\n".join(found)


def draw(args: argparse.Namespace, speed: dict[tuple[str, str], list[float]], peak: dict[tuple[str, str], float]):
    """Draw two bar charts: tokens a second and peak memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.55 * len(speed) + 1.4), layout="constrained")
    names = [f"{CONTENDERS[name]}, {setting}" for name, setting in speed]
    colours = ["#1f6f8b" if name.startswith("onecard") else "#b9c4c9" for name, _ in speed]
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axis, values, label in (
        (panels[0], [statistics.median(v) for v in speed.values()], "tokens / s (more is better)"),
        (panels[1], [v / MB for v in peak.values()], "peak memory, MB (less is better)"),
    ):
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    panels[0].invert_yaxis()
    path = RESULTS / f"train_{args.shape}_{args.length}_{time.strftime('%Y-%m-%d')}.png"
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    main()
