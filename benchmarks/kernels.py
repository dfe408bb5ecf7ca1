"""The CPU kernels compared with bitsandbytes' and torch's: python -m benchmarks.kernels [--rounds N]

It measures quantize, dequantize (into a new tensor, as both interfaces do, and ours also into a reused buffer) and the
product of one row. The contenders run in turn in one process. Results are medians of many calls and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn.modules import Linear4bit as PeerLinear
from bitsandbytes.nn.modules import Params4bit

from benchmarks.measure import table, write_result
from onecard.kernels import ops
from onecard.kernels.cpu import native
from onecard.kernels.cpu.library import library
from onecard.quant.state import PackedWeight

SHAPES = [(5632, 2048), (14336, 4096)]


def in_turn(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each contender, called in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(N: int, K: int, rounds: int) -> list[list[str]]:
    """Return the table's rows for one shape; bfloat16, NF4 with double quantization."""
    W = torch.randn(N, K).bfloat16()
    packed, state = ops.quantize_4bit(W)
    weight = PackedWeight.of(packed, state)
    buffer = torch.empty_like(W)
    peer_packed, peer_state = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    layer = PeerLinear(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit(W.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)  # type: ignore
    layer = layer.to("cpu").eval()
    x = torch.randn(1, K).bfloat16()
    found = []

    def add(what: str, contenders: dict[str, Callable[[], object]], count: int) -> None:
        seconds = in_turn(contenders, count)
        ours = seconds["ours"]
        cells = [f"{what} {N}x{K}", f"{ours * 1e3:.3f}"]
        peer = seconds.get("bitsandbytes")
        cells += [f"{peer * 1e3:.3f}", f"{peer / ours:.1f}x"] if peer else ["", ""]
        other = seconds.get("torch")
        cells.append(f"{other * 1e3:.3f}" if other else "")
        found.append(cells)
        print("  ".join(cells), flush=True)

    with torch.no_grad():
        add(
            "quantize",
            {
                "ours": lambda: ops.quantize_4bit(W),
                "bitsandbytes": lambda: bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=True),
            },
            max(3, rounds // 4),
        )
        add(
            "dequantize, fresh",
            {
                "ours": lambda: ops.dequantize_4bit(packed, state),
                "bitsandbytes": lambda: bnb.dequantize_4bit(peer_packed, peer_state),
            },
            rounds,
        )
        add(
            "dequantize, reused buffer",
            {
                "ours": lambda: native.dequantize_into(weight, buffer),
                "bitsandbytes": lambda: bnb.dequantize_4bit(peer_packed, peer_state),
            },
            rounds,
        )
        add(
            "one row times",
            {
                "ours": lambda: ops.qlora_linear(x, packed, state),
                "bitsandbytes": lambda: layer(x),
                "torch": lambda: x @ W.T,
            },
            4 * rounds,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    rows = [row for N, K in SHAPES for row in measure(N, K, args.rounds)]
    header = ["", "ours, ms", "bitsandbytes, ms", "ratio", "torch on 16 bits, ms"]
    native_library = library()
    isa = native_library.onecard_isa().decode() if native_library else "reference"
    note = f"Medians, the contenders called in turn in one process; our path: {isa}, {torch.get_num_threads()} threads."
    print(write_result("kernels_cpu", "CPU kernels, side by side", f"{note}\n\n{table(header, rows)}"))


if __name__ == "__main__":
    main()
