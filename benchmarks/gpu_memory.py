"""What fits on a card: python -m benchmarks.gpu_memory --case 123b (gpu.py runs all of them)

    123b         a 123B-shaped base paged from pinned host memory under a cap of 24 GB, micro-batches of 2,048 tokens;
                 its time per layer compared with that of 16 resident layers under the same cap
    7b           a 7B-shaped run of 512 tokens, recomputed: the allocator's peak, which must be at most 6 GB
    8b-context   the longest row, doubled from 8,192 tokens, that an 8B-shaped run can train under 24 GB

All pages of the paged base share one host buffer, so that a machine with less memory than the base can measure it: the
bytes copied to the card are the same. A cap on torch's allocator simulates the memory of other cards.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import SHAPES, random_model, wait

GB = 10**9
SHAPES |= {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "123b": {"hidden_size": 12288, "intermediate_size": 28672, "num_hidden_layers": 88, "num_attention_heads": 96,
             "num_key_value_heads": 8, "vocab_size": 32768},
}  # fmt: skip
RESIDENT_LAYERS = 16  # of the 123B shape: 11 GB, without head, embedding and a row's activations
WINDOW = 3  # micro-batches per update


def cap(num_bytes: int, device: torch.device) -> None:
    """Limit the memory of torch's allocator."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(num_bytes / total, 1.0), device)


def peak_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else 0.0


def seconds_a_row(model: Any, length: int, window: int, device: torch.device) -> float:
    """Return seconds per micro-batch of `length` tokens in an update of `window`; warmed up, all layers recomputed."""
    from onecard.hf.attention import use_packed_attention
    from onecard.memory.inputs import MemoryStrategy
    from onecard.optim.adamw import AdamW
    from onecard.train.loss import packed_loss
    from onecard.train.recompute import recompute_layers

    base, pager = model.get_base_model(), getattr(model.get_base_model(), "pager", None)
    recompute_layers(base, MemoryStrategy(base.config.num_hidden_layers))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, base.config.vocab_size, (1, length), device=device)
    at = torch.arange(length, device=device)
    batch = {"input_ids": ids, "position_ids": at[None], "supervised": (at[:-1], ids[0, 1:]), "cu_seqlens": [0, length]}
    with use_packed_attention(base):
        for count in (1, window):
            wait(device)
            start = time.perf_counter()
            for _ in range(count):
                if pager is None:
                    loss = packed_loss(base, batch, window * length)
                else:
                    with pager.saved_as_pages():
                        loss = packed_loss(base, batch, window * length)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            wait(device)
    return (time.perf_counter() - start) / window


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
    layers = SHAPES[shape]["num_hidden_layers"]
    cap(limit, device)
    resident = random_model(shape, "onecard", device, num_hidden_layers=min(RESIDENT_LAYERS, layers)).train()
    alone = seconds_a_row(resident, length, WINDOW, device) / min(RESIDENT_LAYERS, layers)
    del resident
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    paged = random_model(shape, "onecard", device, share=True).train()
    page_layers(paged, int(0.3 * limit), device)
    seconds = seconds_a_row(paged, length, WINDOW, device)
    statistics = paged.get_base_model().pager.take_statistics()
    return (
        f"{length / seconds:,.0f} tok/s, peak {peak_gb(device):.1f} GB; a layer {seconds / layers * 1e3:.1f} ms, "
        f"resident {alone * 1e3:.1f} ms: {alone * layers / seconds:.0%} of its speed; "
        f"{statistics.bytes_in / GB:,.0f} GB brought, {statistics.stall_seconds:.1f} s waited"
    )


def peak(shape: str, length: int, device: torch.device) -> str:
    """Measure a step's peak memory."""
    seconds = seconds_a_row(random_model(shape, "onecard", device).train(), length, 1, device)
    return f"peak {peak_gb(device):.2f} GB at {length} tokens, {length / seconds:,.0f} tok/s"


def context(shape: str, first: int, most: int, limit: int, device: torch.device) -> str:
    """Find the longest row of first, 2 first, ... most tokens that does not run out of memory."""
    cap(limit, device)
    model, length, reached = random_model(shape, "onecard", device).train(), first, "none"
    while length <= most:
        try:
            seconds = seconds_a_row(model, length, 1, device)
        except torch.OutOfMemoryError:
            break
        reached = f"{length:,} tokens, {length / seconds:,.0f} tok/s, peak {peak_gb(device):.1f} GB"
        length *= 2
    return f"longest row {reached}"


CASES = {
    "123b": lambda dry, device: large(*(("tiny", 64, GB // 100) if dry else ("123b", 2048, 24 * GB)), device),
    "7b": lambda dry, device: peak(*(("tiny", 64) if dry else ("7b", 512)), device),
    "8b-context": lambda dry, device: context(
        *(("tiny", 64, 128) if dry else ("8b", 8192, 131072)), 24 * GB, device
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--dry-run", action="store_true", help="the CPU and a tiny shape")
    args = parser.parse_args()
    sys.stdin.readline()  # wait until the parent releases the GPU
    device = torch.device("cuda" if torch.cuda.is_available() and not args.dry_run else "cpu")
    print(json.dumps({"found": CASES[args.case](args.dry_run, device)}))


if __name__ == "__main__":
    main()
