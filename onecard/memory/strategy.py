"""What to give up for memory: of all that fits, what takes the least time, by a count of operations and bytes.

A training token costs 4 P_m + 4 V d + 6 P_l + 7 S a L operations (forward, gradients of inputs and of LoRA; S tokens
of context, a heads x head size); each layer that recomputes adds a forward. Each part of a micro-batch dequantizes
every weight twice, a recomputing layer's a third time unless the recompute's stay for the backward. Each part reads
what the budget does not hold of a paged base twice, and moves an offloaded input out and back: on a GPU beside the
computing, so that it counts only where it takes longer, on a CPU with the cores that compute. States that wait outside
come and go once an update, beside nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from onecard.memory.activations import heads_of
from onecard.memory.inputs import Case, Fit
from onecard.memory.model import Model
from onecard.memory.terms import plan_terms


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: operations, weights dequantized, bytes in from the tier below, bytes out."""

    operations: float
    dequantized: float
    bytes_in: float
    bytes_out: float


# Of the order of measured ones (two AVX-512 cores and an SSD; a 24 GB card on PCIe 4 x16): they say which of two
# choices is quicker, not how long a step takes.
RATES = {"cpu": Rates(4e11, 2.5e10, 1.5e9, 0.5e9), "cuda": Rates(1e14, 2e11, 2.5e10, 2.5e10)}

MARGIN = 0.05  # of the memory: about as far as plan and measurement lie apart (benchmarks/plan.py)


@dataclass(frozen=True)
class Price:
    """Of an update: seconds at RATES, and the bytes that come and go."""

    seconds: float
    moved_bytes: int


def price(case: Case, fit: Fit) -> Price:
    """What a fit costs in time."""
    rates, model, text = RATES[case.device], case.model, case.model.text
    layers, again = model.num_layers, fit.num_recomputed / model.num_layers
    P_q, (P_m, P_l), S = sum(case.sizes), case.num_met, case.length
    heads, _, head = heads_of(text)
    a = heads * head
    forward = 2 * P_m + 2 * P_l + 2 * S * a * layers
    token = 4 * P_m + 4 * text.vocab_size * text.hidden_size + 6 * P_l + 7 * S * a * layers + again * forward
    batches = case.config.gradient_accumulation_steps
    parts = batches * -(-case.batch_tokens // case.tokens(fit))
    times = 2 + (0 if fit.keeps_weights else again)
    computing = batches * case.batch_tokens * token / rates.operations + parts * times * P_q / rates.dequantized
    outside = 0 if fit.weights_budget is None else max(0, sum(case.pages) - fit.weights_budget)
    inputs = batches * case.batch_tokens * fit.num_offloaded * case.layer.hidden
    bytes_in = 2 * parts * outside + inputs
    states = sum(case.state_sizes) if fit.states_away else 0
    moving = bytes_in / rates.bytes_in + inputs / rates.bytes_out
    waiting = states / rates.bytes_in + states / rates.bytes_out
    both = computing + moving if case.device == "cpu" else max(computing, moving)
    return Price(both + waiting, bytes_in + inputs + 2 * states)


def total_bytes(case: Case, fit: Fit) -> int:
    return sum(term.num_bytes for term in plan_terms(case, "qlora", fit))


def choose_fit(case: Case, limit: int, whole: bool = False) -> Fit:
    """The quickest way to train within `limit` bytes, or the smallest there is if none fits.

    What the settings fix stays fixed; inputs are offloaded only where nothing else fits; of two that take as long, the
    one that gives up less is taken.

    Args:
        whole: a micro-batch is not to be split.
    """
    found = [fit for fit in candidates(case, limit, whole) if total_bytes(case, fit) <= limit]
    if found:
        return min(found, key=lambda fit: price(case, fit).seconds)  # min keeps the first of equals
    return most_offloaded(case, limit, whole)


def fit_within(case: Case, memory_bytes: int) -> Fit:
    """choose_fit with `MARGIN` of the memory left for what the plan may miss, or with less where only that fits."""
    fit = choose_fit(case, int((1 - MARGIN) * memory_bytes))
    return fit if total_bytes(case, fit) <= memory_bytes else choose_fit(case, memory_bytes)


def candidates(case: Case, limit: int, whole: bool) -> Iterator[Fit]:
    """Without offloading, what gives up less first: beside a resident base as few layers recomputed as fit; beside a
    paged one every number of them, with the memory that is left as its budget."""
    for part_tokens in part_sizes(case, whole):
        for away in away_choices(case):
            fits = [Fit(number, None, away, 0, part_tokens) for number in recompute_counts(case)]
            resident = first_that_fits(case, fits, limit) if case.config.weights_budget is None else None
            if resident is not None:
                yield from with_kept_weights(case, resident)
            if (resident is None or resident.num_recomputed) and may_page(case):
                yield from (with_budget(case, kept, limit) for fit in fits for kept in with_kept_weights(case, fit))


def with_kept_weights(case: Case, fit: Fit) -> list[Fit]:
    """A fit, and where that saves something, the one whose recomputed layers keep their weights for the backward."""
    useful = fit.num_recomputed and not case.on_tiles
    return [fit, replace(fit, keeps_weights=True)] if useful else [fit]


def most_offloaded(case: Case, limit: int, whole: bool) -> Fit:
    """As few inputs offloaded as fit, with everything else given up; or all of them if nothing fits."""
    number, parts, away = recompute_counts(case)[-1], part_sizes(case, whole)[-1], away_choices(case)[-1]
    fits = [Fit(number, None, away, offloaded, parts) for offloaded in range(number + 1)]
    paged = [with_budget(case, fit, limit) for fit in fits] if may_page(case) else fits[-1:]
    resident = first_that_fits(case, fits, limit) if case.config.weights_budget is None else None
    return resident or first_that_fits(case, paged, limit) or paged[-1]


def may_page(case: Case) -> bool:
    """Whether the base may be paged: not where modules of it are trained in full."""
    return not case.config.modules_to_save


def first_that_fits(case: Case, fits: list[Fit], limit: int) -> Fit | None:
    return next((fit for fit in fits if total_bytes(case, fit) <= limit), None)


def with_budget(case: Case, fit: Fit, limit: int) -> Fit:
    """A fit with a paged base, in the budget that is given or left."""
    if case.budget is not None:
        return replace(fit, weights_budget=case.budget)
    left = limit - total_bytes(case, replace(fit, weights_budget=0))
    return replace(fit, weights_budget=min(max(left, case.smallest_budget), sum(case.pages)))


def recompute_counts(case: Case) -> list[int]:
    """Layers that may be recomputed."""
    layers, asked = case.model.num_layers, case.config.gradient_checkpointing
    return list(range(layers + 1)) if asked is None else [layers] if asked else [0]


def part_sizes(case: Case, whole: bool) -> list[int | None]:
    """Tokens of the parts that a micro-batch may go in: whole, or ever fewer of its rows."""
    sizes: list[int | None] = [None]
    rows = case.config.per_device_train_batch_size
    while rows > 1 and not whole:
        rows = -(-rows // 2)
        sizes.append(rows * case.length)
    return sizes


def away_choices(case: Case) -> list[bool]:
    return [False, True] if case.config.optim.startswith("paged") else [False]


def describe(fit: Fit, model: Model) -> str:
    """A fit in words."""
    parts = [f"{fit.num_recomputed or 'none'} of {model.num_layers} layers recomputed"]
    if fit.keeps_weights:
        parts.append("their weights dequantized once for both")
    if fit.num_offloaded:
        parts.append(f"the inputs of {fit.num_offloaded} of them outside")
    if fit.part_tokens is not None:
        parts.append(f"micro-batches in parts of at most {fit.part_tokens:,} tokens")
    if fit.weights_budget is not None:
        parts.append(f"the base paged within {fit.weights_budget / 2**20:,.0f} MiB")
    if fit.states_away:
        parts.append("the optimizer's states outside between updates")
    return ", ".join(parts)
