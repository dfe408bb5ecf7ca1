"""Merging an adapter: time, peak memory and distance to the live adapter, onecard and peft's merge_and_unload in turn.

    python -m benchmarks.merge [--shape 1.1b] [--rounds 3] [--strength 0.1]

Every merge is a process of its own. Peak counts anonymous memory above the process's start. peft merges into the 16-bit
model and saves it. onecard streams, with the dequantized base or the original weights. The adapter is random, of rank
16 on all linears; its updates' norms are `strength` times the weights' norms. The distance is between float32 logits on
random tokens (onecard/export/verify.py), as a share of the adapter's effect. "requantized" rounds to NF4 again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import MB, anonymous_peak, run_child, spread, status_bytes, table, write_result
from benchmarks.shapes import SHAPES, make_checkpoint

CONTENDERS = {
    "dequantized": "onecard, dequantized base",
    "original": "onecard, original weights",
    "peft": "peft merge_and_unload + save_pretrained",
    "requantized": "onecard, NF4 again",
}
RANK = 16


def make_adapter(base: Path, folder: Path, strength: float) -> None:
    """Write a peft folder with random LoRA on all linears: the norm of B A is `strength` times its weight's norm."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from onecard.adapter.layers import lora_config
    from onecard.config import LoraSettings

    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tuned: Any = get_peft_model(plain, lora_config(LoraSettings(r=RANK, lora_alpha=RANK)))
    for module in tuned.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A, B = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            B.normal_()
            B.mul_(strength * module.get_base_layer().weight.float().norm() / (B.float() @ A.float()).norm())
    tuned.save_pretrained(folder)


def merge(name: str, base: str, adapter: str, output: str) -> dict[str, Any]:
    if name == "peft":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(plain, adapter).merge_and_unload().save_pretrained(output)  # type: ignore[operator]
        return {}
    if name == "requantized":
        from onecard.config import QuantConfig
        from onecard.export.merge.quantized import requantize

        left = requantize(base, adapter, output, QuantConfig())[1]
        return {"share": left.share, "noise": left.noise}
    from onecard.export.merge import merged

    merged.merge(base, adapter, output, name)  # type: ignore[arg-type]
    return {}


def child(name: str, base: str, adapter: str, output: str) -> None:
    import peft  # noqa: F401  both contenders do the same imports before the clock starts

    import onecard.export.merge.quantized  # noqa: F401

    before = status_bytes("RssAnon")
    with anonymous_peak() as peak:
        start = time.perf_counter()
        found = merge(name, base, adapter, output)
        found["seconds"] = time.perf_counter() - start
    print(json.dumps({**found, "peak": peak[0] - before}))


def measure(base: str, adapter: str, folders: dict[str, str], num_tokens: int) -> None:
    """Print each merge's distance to the live adapter on one row of random tokens."""
    from onecard.config import QuantConfig
    from onecard.data.chat.mask import Example
    from onecard.data.dataset import Dataset
    from onecard.export.verify import compare, run_live
    from onecard.hf.checkpoint import inspect_checkpoint
    from onecard.hf.skeleton import read_model

    vocab_size = read_model(inspect_checkpoint(Path(base))).text.vocab_size
    ids = torch.randint(5, vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = Dataset([Example(ids, [-100, *ids[1:]], "random")], "text", num_tokens)
    with tempfile.TemporaryFile() as file:
        live = run_live(base, adapter, QuantConfig(), dataset, dataset.examples, "cpu", file)
        found = {name: compare(live, name, Path(folder), "cpu") for name, folder in folders.items()}
    print(json.dumps({name: {"off": one.off, "kept": one.kept, "argmax": one.argmax} for name, one in found.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strength", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--child", nargs=4)
    parser.add_argument("--measure", nargs=3)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    if args.measure:
        return measure(args.measure[0], args.measure[1], json.loads(args.measure[2]), args.tokens)
    base = make_checkpoint(args.shape)
    with tempfile.TemporaryDirectory(dir=base.parent) as name:
        folder = Path(name)
        make_adapter(base, folder / "adapter", args.strength)
        report(args, str(base), folder)


def report(args: argparse.Namespace, base: str, folder: Path) -> None:
    adapter, outputs = str(folder / "adapter"), {name: str(folder / name) for name in CONTENDERS}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name, output in outputs.items():
            shutil.rmtree(output, ignore_errors=True)
            runs[name].append(run_child("benchmarks.merge", "--child", name, base, adapter, output))
            found = runs[name][-1]
            print(f"{name:12s} {found['seconds']:6.2f} s  {found['peak'] / MB:7.0f} MB", flush=True)
    near = run_child("benchmarks.merge", "--tokens", str(args.tokens), "--measure", base, adapter, json.dumps(outputs))
    lines = []
    for name, found in runs.items():
        seconds, peaks = [r["seconds"] for r in found], [r["peak"] / MB for r in found]
        shares = [f"{near[name][key]:.2%}" for key in ("off", "kept", "argmax")]
        lines.append([CONTENDERS[name], spread(seconds), f"{statistics.median(peaks):,.0f}", *shares])
    left = runs["requantized"][0]
    note = (
        f"{args.shape} Llama shape, bfloat16, {args.rounds} processes each; updates of {args.strength:.1%} of the "
        f"weights' norms, {args.tokens} random tokens. In the weights, NF4 again leaves {left['share']:.1%} of the "
        f"update, beside rounding of {left['noise']:.1%} of it."
    )
    header = ["", "seconds", "anonymous peak, MB", "off by", "effect kept", "same likeliest token"]
    print(write_result(f"merge_{args.shape}", "Merging, side by side", f"{note}\n\n{table(header, lines)}"))


if __name__ == "__main__":
    main()
