"""Choice of a memory strategy: the fastest that fits, by a count of operations and bytes.

A training token costs 4 P_m + 4 V d + 6 P_l + 7 S a L operations (forward, gradients of inputs and of LoRA; P_m
quantized weights that a token uses, S tokens of context, a heads x head size). Each recomputed layer adds a forward,
and MLPs in chunks one more of theirs; each chunk dequantizes their weights anew.
Each part of a micro-batch dequantizes every weight twice, and a recomputed layer's weights a third time unless they
are kept for the backward. Each part reads the pages of a paged base beyond the budget twice, and moves each offloaded
input out and back. On a GPU these transfers overlap with computing, and count only if they take longer. On a CPU they
use the cores that compute. Offloaded optimizer states transfer once per update, without overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from onecard.config import MLP_CHUNK_TOKENS
from onecard.hf.skeleton import Model
from onecard.memory.activations import heads_of
from onecard.memory.inputs import MemoryStrategy, PlanInputs
from onecard.memory.terms import base_terms, computing_terms, plan_terms


@dataclass(frozen=True)
class Rates:
    """A device's rates per second: operations, dequantized weights, bytes in from the tier below, bytes out."""

    operations: float
    dequantized: float
    bytes_in: float
    bytes_out: float


# The order of magnitude of measured rates (two AVX-512 cores and an SSD; a 24 GB card on PCIe 4 x16). They show which
# of two choices is faster, not how long a step takes.
RATES = {"cpu": Rates(4e11, 2.5e10, 1.5e9, 0.5e9), "cuda": Rates(1e14, 2e11, 2.5e10, 2.5e10)}

MARGIN = 0.05  # of the memory: about the difference of plan and measurement (benchmarks/plan.py)


@dataclass(frozen=True)
class Price:
    """The cost of an update: seconds at RATES, and bytes moved."""

    seconds: float
    moved_bytes: int


def price(inputs: PlanInputs, strategy: MemoryStrategy) -> Price:
    """Count an update's seconds and moved bytes with a strategy."""
    rates, model, text = RATES[inputs.device], inputs.model, inputs.model.text
    layers, again = model.num_layers, strategy.num_recomputed / model.num_layers
    P_q, (P_m, P_l), S = inputs.num_quantized, inputs.num_met, inputs.length
    heads, _, head = heads_of(text)
    a = heads * head
    forward = 2 * P_m + 2 * P_l + 2 * S * a * layers
    token = 4 * P_m + 4 * text.vocab_size * text.hidden_size + 6 * P_l + 7 * S * a * layers + again * forward
    batches = inputs.config.gradient_accumulation_steps
    parts = batches * -(-inputs.batch_tokens // inputs.tokens(strategy))
    dequantized = (2 + (0 if strategy.keep_dequantized_weights else again)) * P_q
    if strategy.mlp_chunk is not None:
        token += again * 2 * inputs.num_mlp_weights
        chunks = -(-inputs.tokens(strategy) // strategy.mlp_chunk)
        dequantized += ((3 + again) * chunks - 2 - again) * inputs.num_mlp_weights
    computing = batches * inputs.batch_tokens * token / rates.operations + parts * dequantized / rates.dequantized
    outside = 0 if strategy.weights_budget is None else max(0, inputs.paged_bytes - strategy.weights_budget)
    input_values = batches * inputs.batch_tokens * strategy.num_offloaded * inputs.layer.hidden
    bytes_in = 2 * parts * outside + input_values
    states = inputs.states_bytes(False) if strategy.offload_optimizer_states else 0
    moving = bytes_in / rates.bytes_in + input_values / rates.bytes_out
    waiting = states / rates.bytes_in + states / rates.bytes_out
    both = computing + moving if inputs.device == "cpu" else max(computing, moving)
    return Price(both + waiting, bytes_in + input_values + 2 * states)


def total_bytes(inputs: PlanInputs, strategy: MemoryStrategy) -> int:
    """Return the bytes of the plan. A search asks for hundreds of them: the terms that neither the budget nor the
    place of the optimizer's states changes are summed once for each step."""
    offloaded = strategy.offload_optimizer_states and bool(computing_terms(inputs))  # then the larger of two moments
    step = replace(strategy, weights_budget=None, offload_optimizer_states=offloaded)
    if step not in inputs.counted:
        terms = sum(term.num_bytes for term in plan_terms(inputs, "qlora", step))
        inputs.counted[step] = terms - base_bytes(inputs, None) - inputs.states_bytes(offloaded)
    base = base_bytes(inputs, strategy.weights_budget)
    return inputs.counted[step] + base + inputs.states_bytes(strategy.offload_optimizer_states)


def base_bytes(inputs: PlanInputs, budget: int | None) -> int:
    """Return the bytes of the base's terms, which grow with the budget up to all pages."""
    kind = budget is not None
    if kind not in inputs.counted:
        terms = base_terms(inputs, MemoryStrategy(weights_budget=0 if kind else None))
        inputs.counted[kind] = sum(term.num_bytes for term in terms)
    return inputs.counted[kind] + (0 if budget is None or inputs.is_sharded else min(budget, inputs.paged_bytes))


def choose_strategy(inputs: PlanInputs, limit: int, whole: bool = False) -> MemoryStrategy:
    """Return the fastest strategy within `limit` bytes, or the smallest if none fits.

    A choice that the settings fix stays fixed. Inputs are offloaded only if nothing else fits. Of two equally fast
    strategies, the earlier candidate is chosen.

    Args:
        whole: whether micro-batches must stay unsplit.
    """
    found = [strategy for strategy in candidates(inputs, limit, whole) if total_bytes(inputs, strategy) <= limit]
    if found:
        return min(found, key=lambda strategy: price(inputs, strategy).seconds)  # min keeps the first of equals
    return most_offloaded(inputs, limit, whole)


def strategy_within(inputs: PlanInputs, memory_bytes: int) -> MemoryStrategy:
    """Same as `choose_strategy`, with `MARGIN` of the memory left for errors of the plan, or less if nothing fits."""
    strategy = choose_strategy(inputs, int((1 - MARGIN) * memory_bytes))
    return strategy if total_bytes(inputs, strategy) <= memory_bytes else choose_strategy(inputs, memory_bytes)


def candidates(inputs: PlanInputs, limit: int, whole: bool) -> Iterator[MemoryStrategy]:
    """Yield strategies without offloaded inputs. For a resident base, recompute as few layers as fit. For a paged base,
    try every number of recomputed layers, with the remaining memory as its budget."""
    for max_forward_tokens in part_sizes(inputs, whole):
        for offload_states in offload_choices(inputs):
            fits = [
                MemoryStrategy(number, None, offload_states, 0, max_forward_tokens)
                for number in recompute_counts(inputs)
            ]
            fits += with_chunks(inputs, fits[-1])
            resident = first_that_fits(inputs, fits, limit) if inputs.config.weights_budget is None else None
            if resident is not None:
                yield from with_kept_weights(inputs, resident)
            if (resident is None or resident.num_recomputed) and may_page(inputs):
                yield from (
                    with_budget(inputs, kept, limit)
                    for strategy in fits
                    for kept in with_kept_weights(inputs, strategy)
                )


def with_chunks(inputs: PlanInputs, strategy: MemoryStrategy) -> list[MemoryStrategy]:
    """Return the strategy with MLPs in chunks, if all layers are recomputed and have MLPs longer than a chunk."""
    chunk = MLP_CHUNK_TOKENS[inputs.device]
    useful = strategy.num_recomputed == inputs.model.num_layers and inputs.layer.mlp
    return [replace(strategy, mlp_chunk=chunk)] if useful and inputs.tokens(strategy) > chunk else []


def with_kept_weights(inputs: PlanInputs, strategy: MemoryStrategy) -> list[MemoryStrategy]:
    """Return the strategy, and if useful, also with recomputed layers' dequantized weights kept for the backward."""
    useful = strategy.num_recomputed and not inputs.on_tiles and strategy.mlp_chunk is None
    return [strategy, replace(strategy, keep_dequantized_weights=True)] if useful else [strategy]


def most_offloaded(inputs: PlanInputs, limit: int, whole: bool) -> MemoryStrategy:
    """Use every other saving and offload as few inputs as fit, with MLPs whole or in chunks, whichever is faster.
    Offload all of them if nothing fits."""
    number, tokens = recompute_counts(inputs)[-1], part_sizes(inputs, whole)[-1]
    offload_states = offload_choices(inputs)[-1]
    fits = [MemoryStrategy(number, None, offload_states, offloaded, tokens) for offloaded in range(number + 1)]
    smallest, found = fits[-1], list[MemoryStrategy]()
    for kind in (fits, [chunked for strategy in fits for chunked in with_chunks(inputs, strategy)]):
        paged = [with_budget(inputs, strategy, limit) for strategy in kind] if may_page(inputs) else kind[-1:]
        resident = first_that_fits(inputs, kind, limit) if inputs.config.weights_budget is None else None
        fitting = resident or first_that_fits(inputs, paged, limit)
        found += [fitting] if fitting else []
        smallest = (paged or [smallest])[-1]
    return min(found, key=lambda strategy: price(inputs, strategy).seconds) if found else smallest


def may_page(inputs: PlanInputs) -> bool:
    """Whether the base may be paged: not if modules of it are trained in full, or it is sharded over processes."""
    return not inputs.config.modules_to_save and not inputs.is_sharded


def first_that_fits(inputs: PlanInputs, fits: list[MemoryStrategy], limit: int) -> MemoryStrategy | None:
    return next((strategy for strategy in fits if total_bytes(inputs, strategy) <= limit), None)


def with_budget(inputs: PlanInputs, strategy: MemoryStrategy, limit: int) -> MemoryStrategy:
    """Return the strategy with a paged base, within the budget that is set, or else the remaining memory."""
    if inputs.budget is not None:
        return replace(strategy, weights_budget=inputs.budget)
    left = limit - total_bytes(inputs, replace(strategy, weights_budget=0))
    return replace(strategy, weights_budget=min(max(left, inputs.smallest_budget), inputs.paged_bytes))


def recompute_counts(inputs: PlanInputs) -> list[int]:
    """Return the permitted numbers of recomputed layers."""
    layers, asked = inputs.model.num_layers, inputs.config.gradient_checkpointing
    return list(range(layers + 1)) if asked is None else [layers] if asked else [0]


def part_sizes(inputs: PlanInputs, whole: bool) -> list[int | None]:
    """Return the permitted part sizes of a micro-batch in tokens: None (whole), then fewer and fewer rows."""
    sizes: list[int | None] = [None]
    rows = inputs.config.per_device_train_batch_size
    while rows > 1 and not whole:
        rows = -(-rows // 2)
        sizes.append(rows * inputs.row_tokens)
    return sizes


def offload_choices(inputs: PlanInputs) -> list[bool]:
    return [False, True] if inputs.config.optim.startswith("paged") else [False]


def describe(strategy: MemoryStrategy, model: Model) -> str:
    """Describe a strategy in words."""
    parts = [f"{strategy.num_recomputed or 'none'} of {model.num_layers} layers recomputed"]
    if strategy.keep_dequantized_weights:
        parts.append("their weights dequantized once for both")
    if strategy.mlp_chunk is not None:
        parts.append(f"their MLPs in chunks of {strategy.mlp_chunk:,} tokens")
    if strategy.num_offloaded:
        parts.append(f"the inputs of {strategy.num_offloaded} of them outside")
    if strategy.max_forward_tokens is not None:
        parts.append(f"micro-batches in parts of at most {strategy.max_forward_tokens:,} tokens")
    if strategy.weights_budget is not None:
        parts.append(f"the base paged within {strategy.weights_budget / 2**20:,.0f} MiB")
    if strategy.offload_optimizer_states:
        parts.append("the optimizer's states outside between updates")
    return ", ".join(parts)
