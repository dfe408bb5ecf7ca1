"""Estimates for 2 to 64 cards, from one card's measured speed and from the bytes that the plan counts.

    python -m benchmarks.scaling

An update has M micro-batches of T tokens on N cards, M / N on each:

    ddp     M/N (f + b) + r
    fsdp    M/N (max(f, g) + max(b, g) + 2 g / L) + r

f and b are a micro-batch's forward and backward on one card, equal for a base without gradients. g is the time to
gather all L layers once. A layer is gathered while another is computed; the first one of a forward and of a backward is
not. r is the sum of the gradients, once an update, after the last backward:

    g = bytes of the layers (N - 1)/N / B + L (N - 1) a        r = 8 P_l (N - 1)/N / B + 2 (N - 1) a

The exchanges are rings: each byte goes over each link once, so the slowest link sets B bytes a second, and each of the
ring's steps waits a seconds.

Assumptions: an exchange reaches `SHARE` of a link's nominal speed; exchanges and computing do not slow each other; all
cards take the same time; 70B takes as much longer than 8B as the plan's operations and dequantized weights; a
micro-batch of more rows takes the time of as many micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from benchmarks.measure import RESULTS, table
from onecard.config import TrainConfig, make_config
from onecard.memory.inputs import MemoryStrategy, PlanInputs
from onecard.memory.model import find_model
from onecard.memory.strategy import price
from onecard.memory.terms import exchange_terms

MEASURED = ("llama-3-8b", 2048, 15_002)  # model, tokens, tokens a second: results/gpu_nvidia-h200_2026-11-26.md
MICRO_BATCHES = 64  # of an update, over all cards
COUNTS = (2, 4, 8, 16, 32, 64)
CARDS_OF_A_NODE = 8
SHARE = 0.8


@dataclass(frozen=True)
class Link:
    """`rate`: nominal bytes a second in each direction. `wait`: seconds of a message without bytes."""

    name: str
    rate: float
    wait: float


PCIE = Link("PCIe 4 x16", 31.5e9, 10e-6)
NVLINK = Link("NVLink 4", 450e9, 5e-6)
NETWORK = Link("100 Gb/s", 12.5e9, 20e-6)
SYSTEMS = {"nodes of 8 by PCIe 4 x16": PCIE, "nodes of 8 by NVLink 4": NVLINK, "nodes of 1": NETWORK}


@cache
def inputs_of(model: str, parallel: str, length: int) -> PlanInputs:
    fields = {"model": model, "data": "-", "output": "-", "device": "cuda", "max_seq_length": length}
    fields |= {"parallel": parallel, "gradient_accumulation_steps": MICRO_BATCHES}
    return PlanInputs(find_model(model), make_config(TrainConfig, fields), torch.bfloat16)


def micro_batch_seconds(inputs: PlanInputs) -> float:
    """Return the seconds of a micro-batch on one card, all activations kept."""
    model, length, speed = MEASURED
    one = price(inputs_of(model, "ddp", length), MemoryStrategy()).seconds
    return length / speed * price(inputs, MemoryStrategy()).seconds / one


def update_seconds(inputs: PlanInputs, count: int, link: Link, micro_batch: float) -> float:
    """Return the seconds of an update on `count` cards, all of whose exchanges go over `link`.

    Args:
        micro_batch: seconds of one, half of them in the forward: the base has no gradients.
    """
    N, layers, forward = count, inputs.model.num_layers, micro_batch / 2
    inputs = replace(inputs, num_processes=N)
    exchanged = {term.name: term.num_bytes for term in exchange_terms(inputs)}
    rate = SHARE * link.rate
    summing = exchanged.get("gradients", 0) / rate + 2 * (N - 1) * link.wait
    own = -(-MICRO_BATCHES // N)
    if not inputs.is_sharded:
        return own * micro_batch + summing
    gather = exchanged["layers"] / (2 * own) / rate + layers * (N - 1) * link.wait
    return own * 2 * (max(forward, gather) + gather / layers) + summing


def slowest(inside: Link, count: int) -> Link:
    """Return the link that sets a ring's speed."""
    return inside if count <= CARDS_OF_A_NODE else min(inside, NETWORK, key=lambda link: link.rate)


def main() -> None:
    rows = []
    for model in ("llama-3-8b", "llama-3-70b"):
        micro_batch = micro_batch_seconds(inputs_of(model, "ddp", MEASURED[1]))
        speed = MEASURED[1] / micro_batch
        for parallel, rows_at_once in (("ddp", 1), ("fsdp", 1), ("fsdp", 8)):
            inputs, busy = inputs_of(model, parallel, MEASURED[1]), rows_at_once * micro_batch
            for name, inside in SYSTEMS.items():
                cells = []
                for count in COUNTS:
                    seconds = update_seconds(inputs, count, slowest(inside, count), busy)
                    cells.append(f"{MICRO_BATCHES * busy / seconds:.1f}")
                tokens = f"{rows_at_once * MEASURED[1]:,}"
                rows.append([f"{model}, {speed:,.0f} tok/s", parallel, tokens, name, *cells])
                print(" | ".join(rows[-1]), flush=True)
    header = ["model, one card", "parallel", "tokens", "cards", *map(str, COUNTS)]
    text = f"{MICRO_BATCHES} micro-batches an update, r = 16, nothing recomputed (`python -m benchmarks.scaling`)."
    path = RESULTS / "ranks_scaling.md"
    path.write_text(f"# Speed of several cards over that of one, estimated\n\n{text}\n\n{table(header, rows)}\n")
    print(path)


if __name__ == "__main__":
    main()
