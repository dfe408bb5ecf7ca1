"""The memory plan: a run's memory before anything loads, what fits, and what to change if nothing fits.

The terms and their formulas are in terms.py, the choice of a strategy in strategy.py. docs/plan.md explains both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from onecard.adapter.served import check_served
from onecard.adapter.targets import check_names
from onecard.config import ServeConfig, TrainConfig, make_config, parse_bytes
from onecard.errors import UserError
from onecard.hf.load import pick_compute_dtype
from onecard.hf.skeleton import Model
from onecard.hf.tokens import read_tokens
from onecard.memory.inputs import MemoryStrategy, PlanInputs, Term
from onecard.memory.model import find_model
from onecard.memory.shapes import KNOWN
from onecard.memory.strategy import choose_strategy, describe, most_offloaded, price, strategy_within, total_bytes
from onecard.memory.terms import CUDA_CONTEXT, Method, disk_terms, exchange_terms, plan_terms

METHODS: tuple[Method, ...] = ("full", "lora", "qlora", "generate")
LENGTH_STEP = 64  # step of the search for the largest context that fits
MOST_ROWS = 4096
OF_MODEL = (
    "device",
    "adapted",
    "ranks",
    "lora_shapes",
    "lora_sizes",
    "num_shapes",
    "num_adapted_widths",
    "num_expert_shapes",
    "intermediate",
    "num_lora",
    "row_shapes",
    "num_row_weights",
    "saved_sizes",
    "num_saved",
    "expert_factors",
    "sizes",
    "num_quantized",
    "num_mlp_weights",
    "num_linear_weights",
    "num_met",
    "pages",
    "paged_bytes",
    "smallest_budget",
    "state_sizes",
    "whole_states_bytes",
    "layer",
    "unpaged_bytes",
)  # properties of PlanInputs that no setting of rows changes
ASSUMED_LABELS = {"classification": ("0", "1"), "reward": ("reward",)}  # the data tells the true ones


@dataclass(frozen=True)
class Change:
    """A setting that makes the run fit.

    Attributes:
        time: estimated time per token, as a multiple of that with everything resident and kept.
    """

    setting: str
    time: float


@dataclass(frozen=True)
class Plan:
    """The memory of a run. What the process itself uses before the weights load is not included.

    Attributes:
        disk: what the run writes.
        exchanged: what a process of several receives from the others in an update.
        choice: in words, what `onecard train` would keep, recompute, page and offload in device_memory_bytes.
        time: estimated time per token with that choice, as a multiple of that with everything resident and kept.
        moved_bytes: bytes that are moved per update with that choice.
        largest_length, largest_batch: the most tokens of context at this batch size, and the most rows of an unsplit
            micro-batch at this length, that fit; None without device_memory_bytes, 0 if nothing fits.
        changes: settings that would make it fit, if it does not.
    """

    terms: list[Term]
    device_memory_bytes: int | None = None
    disk: list[Term] = field(default_factory=list)
    choice: str | None = None
    time: float | None = None
    moved_bytes: int | None = None
    largest_length: int | None = None
    largest_batch: int | None = None
    changes: list[Change] = field(default_factory=list)
    exchanged: list[Term] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(term.num_bytes for term in self.terms)

    @property
    def measured_bytes(self) -> int:
        """The part of the total that memory/measure.py measures: a GPU's allocator does not count the context."""
        return self.total_bytes - sum(term.num_bytes for term in self.terms if term == CUDA_CONTEXT)

    @property
    def fits(self) -> bool | None:
        """Whether the total is within device_memory_bytes; None without such a limit."""
        return None if self.device_memory_bytes is None else self.total_bytes <= self.device_memory_bytes


def plan(
    model: str,
    method: Method = "qlora",
    device_memory_bytes: int | None = None,
    num_processes: int = 1,
    prefix_cache_bytes: int | None = None,
    **fields: Any,
) -> Plan:
    """Count the memory that training a model takes, without its weights.

    Args:
        model: checkpoint folder, hub id (its config and headers are fetched), or the name of a public model, such as
            "llama-2-7b".
        method: "qlora"; "generate" with its KV cache; or, to compare, "lora" on a 16-bit base and "full" in 16 bits
            with float32 masters.
        device_memory_bytes: the memory of the device, in bytes. QLoRA's plan is then for what `onecard train` would
            choose, and has the largest context and batch that fit. None plans for everything resident and kept.
        num_processes: of a QLoRA run. The plan is of one of them.
        prefix_cache_bytes: of `onecard serve`, for "generate": per_device_train_batch_size is its max_num_seqs.
        fields: any field of TrainConfig, such as r, max_seq_length or per_device_train_batch_size.

    Returns:
        A Plan: `terms` (name, bytes and formula of each), `total_bytes`, `fits`, `choice` in words, `time` as a
        multiple, `largest_length` in tokens, `largest_batch` in rows.

    Raises:
        UserError: unknown model, method or field; a context beyond the model's; no memory at all.
    """
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}", repr(method), "correct it", "method")
    if device_memory_bytes is not None and device_memory_bytes <= 0:
        raise UserError("there must be some memory", f"{device_memory_bytes} bytes", "correct it", "device_memory")
    if num_processes < 1:
        do = "pass 2 or more"
        raise UserError("a run must have a process", str(num_processes), do, "num_processes")
    if prefix_cache_bytes is not None and method != "generate":
        found, do = f"method {method}", "pass --method generate, or leave it out"
        raise UserError("a prefix cache is a server's", found, do, "prefix_cache")
    config = make_config(TrainConfig, {"data": "-", "output": "-", **fields, "model": model}, "plan")
    known = find_model(model, ASSUMED_LABELS.get(config.task, ()), config.text_only)
    if config.max_seq_length > known.longest_context and "max_seq_length" in fields:
        raise UserError(
            "the context must be within the model's",
            f"{config.max_seq_length:,} tokens; it has {known.longest_context:,}",
            f"give at most --max-seq-length {known.longest_context}",
            "max_seq_length",
        )
    return plan_model(
        known, config, method, device_memory_bytes, num_processes=num_processes, prefix_cache_bytes=prefix_cache_bytes
    )


def plan_server(model: str, config: ServeConfig, **fields: Any) -> Plan:
    """Count the memory of `onecard serve`: the base, a full KV cache of each answer, and a full prefix cache.

    Args:
        fields: of LoadConfig, and the device.

    Raises:
        UserError: same as `plan`.
    """
    length = find_model(model).longest_context
    fields |= {"max_seq_length": min(config.max_model_len or length, length)}
    prefix = parse_bytes(config.prefix_cache)
    return plan(model, "generate", prefix_cache_bytes=prefix, per_device_train_batch_size=config.max_num_seqs, **fields)


def plan_model(
    known: Model,
    config: TrainConfig,
    method: Method = "qlora",
    limit: int | None = None,
    searches: bool = True,
    num_processes: int = 1,
    prefix_cache_bytes: int | None = None,
) -> Plan:
    """Same as `plan`, for a model that is already found.

    Args:
        limit: the memory of the device, in bytes.
        searches: whether to search for the largest context and batch, and for changes that make the run fit. The
            searches take most of the time.
    """
    check_names(known, config)
    check_served(known, config)
    num_new = sum(len(read_tokens(named)) for named in (config.add_tokens, config.add_special_tokens))
    inputs = PlanInputs(
        known, config, torch.bfloat16, num_new_tokens=num_new, num_processes=num_processes,
        prefix_cache_bytes=prefix_cache_bytes,
    )  # fmt: skip
    if method != "full" and not inputs.adapted:
        raise UserError(
            "target_modules must name linears of the model",
            f"{config.target_modules} names none",
            f"name some of {', '.join(sorted({name.split('.')[-2] for name in known.linears}))}",
            "target_modules",
        )
    if config.model.lower() not in KNOWN or config.compute_dtype != "auto":
        inputs = replace(inputs, dtype=pick_compute_dtype(config.compute_dtype, torch.device(inputs.device)))
    if limit is None:
        return Plan(plan_terms(inputs, method), exchanged=exchange_terms(inputs))
    if method != "qlora":
        found = Plan(plan_terms(inputs, method), limit)
        return with_largest(found, inputs, fits_as(method, limit)) if searches else found
    found = fitted(inputs, strategy_within(inputs, limit), limit)
    if not searches:
        return found
    found = with_largest(found, inputs, fits_as(method, limit))
    return found if found.fits else replace(found, changes=changes(inputs, limit, found))


def fitted(inputs: PlanInputs, strategy: MemoryStrategy, limit: int, paged_from_file: bool = True) -> Plan:
    """Make the plan of a strategy."""
    cost, disk = price(inputs, strategy), disk_terms(inputs, strategy, paged_from_file)
    choice = describe(strategy, inputs.model)
    choice += f", the base sharded over {inputs.num_processes} processes" * inputs.is_sharded
    return Plan(plan_terms(inputs, "qlora", strategy), limit, disk, choice,
                time_a_token(inputs, strategy), cost.moved_bytes, exchanged=exchange_terms(inputs))  # fmt: skip


def time_a_token(inputs: PlanInputs, strategy: MemoryStrategy) -> float:
    """Estimate the time per token, as a multiple of that with everything resident and kept."""
    return price(inputs, strategy).seconds / price(inputs, MemoryStrategy()).seconds


Fits = Callable[[PlanInputs], bool]


def fits_as(method: Method, limit: int) -> Fits:
    """Return a predicate: whether inputs fit with every permitted saving, but unsplit micro-batches."""

    def fits(inputs: PlanInputs) -> bool:
        if method != "qlora":
            return sum(term.num_bytes for term in plan_terms(inputs, method)) <= limit
        return total_bytes(inputs, most_offloaded(inputs, limit, whole=True)) <= limit

    return fits


def changed(inputs: PlanInputs, **fields: Any) -> PlanInputs:
    """Return the inputs with other settings. What follows from the model and the adapter alone is not computed again if
    the settings are only those of rows."""
    made = replace(inputs, config=inputs.config.model_copy(update=fields))
    if fields.keys() <= {"max_seq_length", "per_device_train_batch_size"}:
        vars(made).update({name: value for name, value in vars(inputs).items() if name in OF_MODEL})
    return made


def with_largest(found: Plan, inputs: PlanInputs, fits: Fits) -> Plan:
    """Add the largest context and batch that fit to a plan."""
    length = largest_length(inputs, fits)
    batch = largest(lambda n: fits(changed(inputs, per_device_train_batch_size=n)), MOST_ROWS)
    return replace(found, largest_length=length, largest_batch=batch)


def largest_length(inputs: PlanInputs, fits: Fits) -> int:
    """Return the largest context that fits, a multiple of LENGTH_STEP; 0 if there is none."""
    steps = inputs.model.longest_context // LENGTH_STEP
    return LENGTH_STEP * largest(lambda n: fits(changed(inputs, max_seq_length=LENGTH_STEP * n)), steps)


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """Return the largest n in 1 ... limit with holds(n), which is true up to some n; 0 if there is none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def changes(inputs: PlanInputs, limit: int, found: Plan) -> list[Change]:
    """List the changes that each make a run fit that does not."""
    tried: dict[str, dict[str, Any]] = {}
    free = {"gradient_checkpointing": None, "weights_budget": None}
    if any(getattr(inputs.config, name) != value for name, value in free.items()):
        tried["gradient_checkpointing and weights_budget left to the plan"] = free
    for r in (n for n in (32, 16, 8, 4) if n < inputs.config.r):
        tried[f"--r {r}"] = {"r": r}
    if inputs.config.optim != "paged_adamw_8bit":
        tried["--optim paged_adamw_8bit"] = {"optim": "paged_adamw_8bit"}
    length = largest_length(inputs, lambda shorter: fits_as("qlora", limit)(changed(shorter, **free)))
    if length:
        tried[f"--max-seq-length {length}"] = {"max_seq_length": length, **free}
    listed = []
    for setting, fields in tried.items():
        other = changed(inputs, **fields)
        strategy = choose_strategy(other, limit)
        if total_bytes(other, strategy) <= limit:
            listed.append(Change(setting, time_a_token(other, strategy)))
    least = -(-found.total_bytes // 2**20)
    return [*listed, Change(f"--device-memory {least}MiB", time_a_token(inputs, choose_strategy(inputs, least << 20)))]
