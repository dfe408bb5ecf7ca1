"""The memory that a calibration needs, and whether it is there."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from onecard.errors import UserError
from onecard.export.calibrated.calibration import GROUP_TOKENS, count_tokens
from onecard.export.calibrated.feedback import PIECE_ROWS
from onecard.export.calibrated.layers import LayeredModel
from onecard.export.calibrated.rows import Rows
from onecard.memory.measure import available_bytes, format_bytes

LIBRARY_BYTES = 80 << 20  # code of libraries that a calibration touches first


def check_memory(layered: LayeredModel, rows: Rows, num_forms: int, rank: int) -> None:
    """Raise UserError unless a calibration fits in memory.

    Args:
        num_forms: forms of the base that are measured.
        rank: of LoRA's start; 0: none.
    """
    needed, free = needed_bytes(layered, rows, num_forms, rank), available_bytes(layered.device)
    if needed > free:
        found = f"{format_bytes(needed)} for its largest layer and {count_tokens(rows.calibration):,} tokens"
        do = "free some memory, lower calibration_tokens, or leave calibrate out"
        must = "a calibration must fit in memory"
        raise UserError(must, f"{found}; {format_bytes(free)} free", do, "calibrate")


def needed_bytes(layered: LayeredModel, rows: Rows, num_forms: int, rank: int) -> int:
    """Estimate the memory of a calibration: the check in float32, or the rows' hidden states with the largest layer, or
    with embedding and head."""
    layers, c = layered.layers.items(), layered.dtype.itemsize
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in layers]
    rest = sum(p.numel() for p in layered.model.parameters()) - sum(sizes)
    tokens = count_tokens(rows.calibration) + num_forms * count_tokens([*rows.data, *rows.general])
    hidden = tokens * layered.merged.model.text.hidden_size * c
    largest = max(layer_bytes(layered, name, module, rank) for name, module in layers)
    return LIBRARY_BYTES + max(4 * (rest + max(sizes)), hidden + max(largest, c * rest))


def layer_bytes(layered: LayeredModel, name: str, module: nn.Module, rank: int) -> int:
    """Return the bytes of a layer: its weights, and the most that one of its two steps holds. They collect the H of its
    inputs; they factor them, and quantize."""
    merged, c, workers = layered.merged, layered.dtype.itemsize, layered.workers.count
    own = {n: w for n, w in merged.model.quantized.items() if n.startswith(f"{name}.")}
    linears = {n: w for n, w in own.items() if n not in merged.experts.stacks}
    counts = Counter((n.split(".")[:-2][-1], width(w)) for n, w in linears.items())
    widths = sorted((K for (_, K), count in counts.items() for _ in range(min(count, 2))), reverse=True)
    H = sum(4 * K * K for K in widths)
    collected = H + GROUP_TOKENS * sum(widths) * (c + 4)
    largest = max((w.weight.numel() // getattr(w, "num_experts", 1) for w in own.values()), default=0)
    widest = max(map(width, own.values()), default=0)
    experts = 0 if len(own) == len(linears) else 3 * 4 * widest**2  # each worker collects and factors its own H
    codes = experts + 32 * PIECE_ROWS * widest + (20 if rank else 4) * largest
    quantized = 2 * H + workers * max(2 * 4 * widths[0] ** 2 if widths else 0, codes)
    return c * sum(p.numel() for p in module.parameters()) + max(collected, quantized)


def width(weight: Any) -> int:
    """Return the number of inputs of a linear, or of each matrix of a stack."""
    return weight.in_features // getattr(weight, "num_experts", 1)
