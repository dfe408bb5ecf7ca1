"""Loading a 16-bit checkpoint into 4 bits: time and peak memory, onecard and bitsandbytes in turn.

    python -m benchmarks.load [--shape 1.1b] [--rounds 3]

Every load is a process of its own. Peak counts anonymous memory above the process's start: it must be in RAM. The
system can drop pages of the memory-mapped checkpoint at any time; the last column is the peak with them. The bound is
the loaded model (4-bit codes, scales, 16-bit embeddings, norms and head) plus twice the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from benchmarks.measure import MB, anonymous_peak, run_child, spread, status_bytes, table, write_result
from benchmarks.shapes import SHAPES, make_checkpoint

CONTENDERS = {"onecard": "onecard", "bnb": "bitsandbytes + transformers"}


def load(name: str, folder: str) -> Any:
    if name == "onecard":
        import onecard

        return onecard.load_model(folder, compute_dtype=torch.bfloat16, device="cpu")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def child(name: str, shape: str) -> None:
    import bitsandbytes  # noqa: F401  both contenders do the same imports before the clock starts

    import onecard.hf.load  # noqa: F401

    folder = str(make_checkpoint(shape))
    base = status_bytes("RssAnon")
    with anonymous_peak() as peak:
        start = time.perf_counter()
        model = load(name, folder)
        seconds = time.perf_counter() - start
    found = {"seconds": seconds, "peak": peak[0] - base, "all": status_bytes("VmHWM")}
    if name == "onecard":
        found["model"] = onecard_bytes(model)
        found["largest"] = max(p.numel() for p in model.parameters()) * 2
    print(json.dumps(found))


def onecard_bytes(model: Any) -> int:
    """Return the bytes of the model's parameters and scales."""
    scales = sum(m.loaded_state.nbytes for m in model.modules() if hasattr(m, "quant_state"))
    return sum(p.nbytes for p in model.parameters()) + scales


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=CONTENDERS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.shape)
    make_checkpoint(args.shape)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name in CONTENDERS:
            runs[name].append(run_child("benchmarks.load", "--child", name, "--shape", args.shape))
            found = runs[name][-1]
            print(f"{name:8s} {found['seconds']:6.2f} s  {found['peak'] / MB:7.0f} MB", flush=True)
    seconds = {name: [r["seconds"] for r in found] for name, found in runs.items()}
    lines = []
    for name, found in runs.items():
        ratio = statistics.median(seconds["bnb"]) / statistics.median(seconds[name])
        peaks = [f"{statistics.median(r[key] for r in found) / MB:,.0f}" for key in ("peak", "all")]
        lines.append([CONTENDERS[name], spread(seconds[name]), f"{ratio:.1f}x", *peaks])
    ours = runs["onecard"][0]
    bound = ours["model"] + 2 * ours["largest"]
    note = (
        f"{args.shape} Llama shape, {args.rounds} processes each. The model is {ours['model'] / MB:,.0f} MB, "
        f"its largest tensor {ours['largest'] / MB:,.0f} MB in 16 bits: the bound is {bound / MB:,.0f} MB."
    )
    header = ["", "seconds", "faster than bitsandbytes", "anonymous peak, MB", "peak with file pages, MB"]
    print(write_result(f"load_{args.shape}", "Loading to 4 bits, side by side", f"{note}\n\n{table(header, lines)}"))


if __name__ == "__main__":
    main()
