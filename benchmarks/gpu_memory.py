"""What fits on a card: python -m benchmarks.gpu_memory --case 123b (gpu.py runs all of them)

    123b         a 123B-shaped base paged from pinned host memory under a cap of 24 GB, micro-batches of 2,048 tokens;
                 its time per layer compared with that of 16 resident layers under the same cap
    7b           updates of a 7B-shaped run on rows of 512 tokens, recomputed, under a cap of 6 GB
    8b-context   an update of an 8B-shaped run on a row of 100,032 tokens under a cap of 24 GB, MLPs in chunks and if
                 need be layers' inputs offloaded; then longer rows if it fits, else shorter ones

The caps are enforced: torch's allocator fails beyond them. What the CUDA context takes is a part of the cap. Updates
are the product's own. All pages of the paged base share one host buffer, so that a machine with less memory than the
base can measure it: the bytes copied to the card are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_steps import SHAPES, Row, clock, our_run, our_step, random_model
from onecard.errors import UserError
from onecard.memory.inputs import MemoryStrategy
from onecard.paging.mover import Statistics

GB = 10**9
SHAPES |= {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "123b": {"hidden_size": 12288, "intermediate_size": 28672, "num_hidden_layers": 88, "num_attention_heads": 96,
             "num_key_value_heads": 8, "vocab_size": 32768},
}  # fmt: skip
RESIDENT_LAYERS = 16  # of the 123B shape: 11 GB, without head, embedding and a row's activations
WINDOW = 3  # micro-batches per update
GOAL, OTHERS = (
    100_032,
    {True: (114_688, 131_072), False: (81_920, 65_536, 49_152)},
)  # tokens, after the goal fits or not


def cap(num_bytes: int, device: torch.device) -> None:
    """Limit what this process takes on the device, its CUDA context included."""
    if device.type == "cuda":
        torch.zeros(1, device=device)  # makes the context
        free, total = torch.cuda.mem_get_info(device)
        context = total - free - torch.cuda.memory_reserved(device)
        torch.cuda.set_per_process_memory_fraction(min(max(num_bytes - context, 1) / total, 1.0), device)


def reserved_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_reserved(device) / GB if device.type == "cuda" else 0.0


def seconds_a_row(
    model: Any, row: Row, strategy: MemoryStrategy, window: int, device: torch.device
) -> tuple[float, Statistics]:
    """Return the seconds per micro-batch of the product's update of `window`, without the first update, and what both
    updates have paged."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = our_run(model, row, device, strategy, gradient_accumulation_steps=window, output=folder)
        return clock(our_step(run, False, stack), device, 1, 1) / window, run.paged


def page_layers(model: Any, budget: int, device: torch.device) -> None:
    """Replace the decoder layers' weights by pages that share one pinned buffer with the first layer's weights."""
    from onecard.nn.linear import Linear4bit
    from onecard.paging.pager import Page, Pager
    from onecard.paging.weights import PagedWeight

    base = model.get_base_model()
    layers = [[m for m in layer.modules() if isinstance(m, Linear4bit)] for layer in base.model.layers]
    parts = [part for m in layers[0] for part in (m.weight, m.loaded_state.absmax)]
    sizes = [-(-part.nbytes // 256) * 256 for part in parts]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    places = [slice(start, start + part.nbytes) for start, part in zip(starts, parts)]
    for place, part in zip(places, parts):
        host[place].copy_(part.detach().reshape(-1).view(torch.uint8))
    pages = [Page(f"layer {i}", host.nbytes, lambda: host) for i in range(len(layers))]
    pager = Pager(device, budget, pages)
    for page, linears in zip(pages, layers):
        for i, linear in enumerate(linears):
            state = replace(linear.loaded_state, absmax=linear.loaded_state.absmax.new_empty(0))
            dtype = linear.loaded_state.absmax.dtype
            linear.fetch = PagedWeight(pager, page, places[2 * i], places[2 * i + 1], state, dtype)
            linear.weight, linear.quant_state = nn.Parameter(linear.weight.new_empty(0, 1), requires_grad=False), state
    base.get_input_embeddings().register_forward_pre_hook(lambda *_: pager.begin_pass())
    base.pager = pager


def large(shape: str, length: int, limit: int, device: torch.device) -> str:
    """Measure the paged base, and up to RESIDENT_LAYERS resident layers of it."""
    layers, row = SHAPES[shape]["num_hidden_layers"], Row(length, 1, True)
    cap(limit, device)
    some = min(RESIDENT_LAYERS, layers)
    resident = random_model(shape, "onecard", device, num_hidden_layers=some).train()
    alone = seconds_a_row(resident, row, MemoryStrategy(some), WINDOW, device)[0] / some
    del resident
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    paged = random_model(shape, "onecard", device, share=True).train()
    page_layers(paged, int(0.3 * limit), device)
    seconds, moved = seconds_a_row(paged, row, MemoryStrategy(layers), WINDOW, device)
    return (
        f"{length / seconds:,.0f} tok/s, {reserved_gb(device):.1f} GB reserved; a layer takes "
        f"{1e3 * seconds / layers:.1f} ms, resident {alone * 1e3:.1f} ms: {alone * layers / seconds:.0%} of its speed; "
        f"in 2 updates {moved.bytes_in / GB:,.0f} GB brought, {moved.stall_seconds:.1f} s waited"
    )


def within(shape: str, length: int, limit: int, device: torch.device) -> str:
    """Update under the cap with every layer recomputed."""
    cap(limit, device)
    model = random_model(shape, "onecard", device).train()
    strategy = MemoryStrategy(SHAPES[shape]["num_hidden_layers"])
    seconds, _ = seconds_a_row(model, Row(length, 1, True), strategy, 1, device)
    return f"{length} tokens in {limit / GB:g} GB: {reserved_gb(device):.2f} GB reserved, {length / seconds:,.0f} tok/s"


def context(shape: str, goal: int, others: dict[bool, tuple[int, ...]], limit: int, device: torch.device) -> str:
    """Tell which rows can be trained under the cap: the goal, then longer or shorter ones until the answer changes."""
    cap(limit, device)
    model = random_model(shape, "onecard", device).train()
    reached = longest(model, goal, device)
    found = [f"{goal:,} tokens: {reached or 'out of memory'}"]
    for length in others[bool(reached)]:
        result = longest(model, length, device)
        found.append(f"{length:,} tokens: {result or 'out of memory'}")
        if bool(result) != bool(reached):
            break
    return "; ".join(found)


def longest(model: Any, length: int, device: torch.device) -> str:
    """Update on a row with MLPs in chunks, and if that fails with all layers' inputs offloaded, too. Return its speed
    and memory, or "" if it does not fit."""
    layers = model.config.num_hidden_layers
    for offloaded in (0, layers):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            strategy = MemoryStrategy(layers, num_offloaded=offloaded, mlp_chunk=4096)
            seconds, _ = seconds_a_row(model, Row(length, 1, True), strategy, 1, device)
        except (torch.OutOfMemoryError, UserError, MemoryError):
            model.zero_grad(set_to_none=True)
            continue
        where = ", inputs offloaded" if offloaded else ""
        return f"{length / seconds:,.0f} tok/s, {reserved_gb(device):.1f} GB reserved{where}"
    return ""


CASES = {
    "7b": lambda dry, device: within(*(("tiny", 64, GB) if dry else ("7b", 512, 6 * GB)), device),
    "8b-context": lambda dry, device: context(
        *(("tiny", 128, {True: (192,), False: ()}) if dry else ("8b", GOAL, OTHERS)), 24 * GB, device
    ),
    "123b": lambda dry, device: large(*(("tiny", 64, GB // 100) if dry else ("123b", 2048, 24 * GB)), device),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--dry-run", action="store_true", help="the CPU and a tiny shape")
    args = parser.parse_args()
    if not sys.stdin.isatty():
        sys.stdin.readline()  # wait until the parent releases the GPU
    device = torch.device("cuda" if torch.cuda.is_available() and not args.dry_run else "cpu")
    print(json.dumps({"found": CASES[args.case](args.dry_run, device)}))


if __name__ == "__main__":
    main()
