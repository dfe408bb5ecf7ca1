"""The memory plan: bytes a term, its formula beside it, from headers or a known shape and the settings alone.

P_q weights in the linears that 4 bits take, P_e in experts, P_o the others, P all of them, P_l LoRA weights; T tokens a
micro-batch, L layers, d hidden, V vocabulary; c bytes of the compute dtype. What a layer keeps for its backward is told
in activations.py. The terms of a step are those at its fullest moment, one of

    the loss                           all that is kept, the inputs of the layers that recompute, the logits' chunk
    a recomputing layer's backward     the inputs, that layer whole and what its backward works on, gradients so far
    the first layer's backward         that layer, what its backward works on, all gradients

A paged base takes its budget and nothing more: the head is a page of it, embeddings are read row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from onecard.config import LOGITS_CHUNK_BYTES, NESTED_BLOCKSIZE, ROW_MULTIPLE, TrainConfig, make_config, parse_bytes
from onecard.errors import UserError, did_you_mean
from onecard.hf.checkpoint import DTYPE_BITS, Checkpoint, inspect_checkpoint
from onecard.hf.load import find_checkpoint, pick_compute_dtype, pick_device
from onecard.memory.activations import Activations, layer_activations
from onecard.memory.shapes import KNOWN
from onecard.memory.stacks import Stack, stacks_of
from onecard.optim.adamw import SMALL
from onecard.paging.files import ALIGNMENT
from onecard.paging.weights import layer_of
from onecard.quant.dynamic import STATE_BLOCKSIZE

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
END_TENSORS = 4  # of a token's hidden size, that live around the loss


@dataclass(frozen=True)
class Term:
    """One line of the bill."""

    name: str
    num_bytes: int
    formula: str


CPU_BUFFERS = Term("libraries' buffers", 36 << 20, "measured")
CUDA_CONTEXT = Term("CUDA context, libraries", 500 << 20, "an allowance")


@dataclass(frozen=True)
class Plan:
    """The bill of a run; the process itself (libraries, CUDA context) comes on top.

    Attributes:
        choice: in words, what `onecard train` would keep, recompute and page in device_memory_bytes.
        largest_length, largest_batch: tokens of context at this batch size, and rows of a micro-batch at this
            length, that fit then; None without such a limit, 0 if nothing fits.
    """

    terms: list[Term]
    device_memory_bytes: int | None = None
    choice: str | None = None
    largest_length: int | None = None
    largest_batch: int | None = None

    @property
    def total_bytes(self) -> int:
        return sum(term.num_bytes for term in self.terms)

    @property
    def fits(self) -> bool | None:
        """Whether the total is within device_memory_bytes; None without such a limit."""
        return None if self.device_memory_bytes is None else self.total_bytes <= self.device_memory_bytes


@dataclass(frozen=True)
class Fit:
    """What can be traded for memory.

    Attributes:
        num_recomputed: decoder layers, the first ones, whose activations are made again in the backward.
        weights_budget: bytes of a paged base; None for a resident one.
        states_away: whether the optimizer's states leave the device between updates.
    """

    num_recomputed: int
    weights_budget: int | None = None
    states_away: bool = False


@dataclass(frozen=True, eq=False)
class Model:
    """What a plan needs to know of a model: its modules without weights, and the bytes of each stored value."""

    modules: Any  # transformers' model on the meta device
    itemsize: dict[str, int]  # of a parameter as stored; 2 where it is not named

    @cached_property
    def linears(self) -> dict[str, torch.nn.Linear]:
        """The linears that 4 bits take, by their weight's name."""
        head = self.modules.get_output_embeddings()
        named = self.modules.named_modules()
        return {f"{n}.weight": m for n, m in named if isinstance(m, torch.nn.Linear) and m is not head}

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        return stacks_of(self.modules)

    @cached_property
    def quantized(self) -> dict[str, Any]:
        """Linears and experts' stacks."""
        return {**self.linears, **self.stacks}

    @cached_property
    def num_weights(self) -> int:
        return sum(p.numel() for p in self.modules.parameters())

    @cached_property
    def head_itemsize(self) -> int:
        head = self.modules.get_output_embeddings()
        name = next((n for n, p in self.modules.named_parameters() if head is not None and p is head.weight), "")
        return self.itemsize.get(name, 2)

    @property
    def text(self) -> Any:
        return self.modules.config.get_text_config()

    @property
    def num_layers(self) -> int:
        return self.text.num_hidden_layers

    def page_bytes(self, config: TrainConfig, c: int) -> list[int]:
        """Bytes of each page that the base would be in: a decoder layer's codes and scales, the head's weight."""
        pages: dict[str, int] = {}
        for name, linear in self.quantized.items():
            numel, layer = linear.weight.numel(), layer_of(name)
            blocks = -(-numel // config.blocksize)
            parts = ((numel + 1) // 2, blocks * (1 if config.double_quant else 4))
            pages[layer] = pages.get(layer, 0) + sum(-(-part // ALIGNMENT) * ALIGNMENT for part in parts)
        head = self.modules.get_output_embeddings()
        if head is not None:
            pages["head"] = head.weight.numel() * self.itemsize.get("lm_head.weight", min(c, 2))
        return list(pages.values())


def plan(model: str, method: Method = "qlora", device_memory_bytes: int | None = None, **fields: Any) -> Plan:
    """The memory that training a model takes, in seconds and without its weights.

    Args:
        model: checkpoint folder, hub id, or a name of memory/shapes.py such as "llama-2-7b".
        method: "qlora"; or, to compare, "lora" on a 16-bit base, "full" in 16 bits with float32 masters.
        device_memory_bytes: what there is; QLoRA's plan is then for what `onecard train` would choose, and says the
            largest context and batch that fit.
        fields: any field of TrainConfig: r, max_seq_length, per_device_train_batch_size, ...; without a limit
            activations are recomputed unless gradient_checkpointing=False.

    Raises:
        UserError: unknown model, method or field.
    """
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}", repr(method), "correct it", "method")
    default = {} if device_memory_bytes is not None and method == "qlora" else {"gradient_checkpointing": True}
    config = make_config(TrainConfig, {"data": "-", "output": "-", **default, **fields, "model": model}, "plan")
    if model.lower() in KNOWN:
        known, dtype = Model(meta_model(known_config(model.lower())), {}), torch.bfloat16
    else:
        known = read_model(inspect_checkpoint(find_known(model)))
        dtype = pick_compute_dtype(config.compute_dtype, torch.device(device_type(config)))
    if device_memory_bytes is None:
        return Plan(plan_terms(known, config, dtype, method))

    def chosen(**change: int) -> tuple[Fit | None, Plan]:
        changed = config.model_copy(update=change)
        if method == "qlora":
            return choose_fit(known, changed, dtype, device_memory_bytes)
        return None, Plan(plan_terms(known, changed, dtype, method), device_memory_bytes)

    step = 64
    fit, found = chosen()
    length = largest(lambda n: bool(chosen(max_seq_length=step * n)[1].fits), longest_context(known) // step)
    batch = largest(lambda n: bool(chosen(per_device_train_batch_size=n)[1].fits), 4096)
    choice = fit and describe(fit, known)
    return replace(found, choice=choice, largest_length=step * length, largest_batch=batch)


def describe(fit: Fit, model: Model) -> str:
    """A fit in words."""
    parts = [f"{fit.num_recomputed or 'none'} of {model.num_layers} layers recomputed"]
    if fit.weights_budget is not None:
        parts.append(f"the base paged within {fit.weights_budget / 2**20:,.0f} MiB")
    if fit.states_away:
        parts.append("the optimizer's states outside between updates")
    return ", ".join(parts)


def largest(holds: Any, limit: int) -> int:
    """The largest n in 1 ... limit for which holds(n), which is true up to some n; 0 if there is none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def find_known(model: str) -> Path:
    """find_checkpoint, its error with a did-you-mean of the known names."""
    try:
        return find_checkpoint(model)
    except UserError as error:
        raise UserError(error.must, f"{error.found}{did_you_mean(model.lower(), KNOWN)}", error.do, model) from None


def known_config(name: str) -> Any:
    fields = dict(KNOWN[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def read_model(checkpoint: Checkpoint) -> Model:
    """A checkpoint's model from its config and headers."""
    sizes = {name: DTYPE_BITS[info.dtype] // 8 for name, info in checkpoint.tensors.items()}
    return Model(meta_model(AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)), sizes)


def meta_model(config: Any) -> Any:
    """transformers' model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def choose_fit(model: Model, config: TrainConfig, dtype: torch.dtype, limit: int) -> tuple[Fit, Plan]:
    """The quickest way to train within `limit` bytes, or the smallest there is if none fits.

    What costs most time comes last: keep all activations; recompute those of as few layers as need be; page the base
    with all of them recomputed; let paged optimizers' states wait outside. What the settings fix stays fixed.
    """
    layers = model.num_layers
    budget = parse_bytes(config.weights_budget) if config.weights_budget else None
    asked = config.gradient_checkpointing

    def bill(fit: Fit) -> Plan:
        return Plan(plan_terms(model, config, dtype, "qlora", fit), limit)

    if asked is not False:
        fewest = layers - largest(lambda kept: bool(bill(Fit(layers - kept, budget)).fits), layers - 1)
    keep = asked is False or (asked is None and bill(Fit(0, budget)).fits)
    fit = Fit(0 if keep else layers if asked else fewest, budget)
    if bill(fit).fits:
        return fit, bill(fit)
    smallest = sum(sorted(model.page_bytes(config, dtype.itemsize))[-2:])
    for away in (False, True) if config.optim.startswith("paged") else (False,):
        left = limit - bill(Fit(fit.num_recomputed, 0, away)).total_bytes
        fit = Fit(fit.num_recomputed, budget or max(left, smallest), away)
        if bill(fit).fits:
            break
    return fit, bill(fit)


def plan_terms(
    model: Model, config: TrainConfig, dtype: torch.dtype, method: Method, fit: Fit | None = None
) -> list[Term]:
    """The terms of a method; without a fit, as gradient_checkpointing says and with a resident base."""
    fit = fit or Fit(model.num_layers if config.gradient_checkpointing else 0)
    c, device = dtype.itemsize, device_type(config)
    num_weights = model.num_weights
    if method == "full":
        terms = [
            Term("weights, 16-bit", 2 * num_weights, "2 P"),
            Term("float32 masters", 4 * num_weights, "4 P"),
            Term("AdamW states", 8 * num_weights, "8 P"),
        ]
        return [*terms, *step_terms(model, config, dtype, {}, Term("gradients", 2 * num_weights, "2 P"), fit)]
    adapted = targets(model, config)
    num_lora = sum(config.r * (m.in_features + m.out_features) for m in adapted.values())
    base = (
        base_terms(model, config, c, device, fit.weights_budget)
        if method == "qlora"
        else [Term("weights, 16-bit", 2 * num_weights, "2 P")]
    )
    return [
        *base,
        Term("LoRA weights", 4 * num_lora, "4 P_l"),
        state_term(list(adapted.values()), config, fit),
        *step_terms(model, config, dtype, adapted, Term("LoRA gradients", 4 * num_lora, "4 P_l"), fit),
        CUDA_CONTEXT if device == "cuda" else CPU_BUFFERS,
    ]


def step_terms(
    model: Model,
    config: TrainConfig,
    dtype: torch.dtype,
    adapted: dict[str, Any],
    gradients: Term,
    fit: Fit,
) -> list[Term]:
    """Activations, gradients and logits at the fullest of a step's moments."""
    layers, device = model.num_layers, device_type(config)
    length = min(config.max_seq_length, longest_context(model))
    tokens = length * config.per_device_train_batch_size
    layer = activations_of(model, frozenset(adapted), config.r, config.lora_dropout > 0, dtype, device)
    kept = tokens * (layer.kept + length * layer.pair)
    whole = kept + tokens * (layer.working + length * layer.pair_working)
    ends = END_TENSORS * tokens * layer.hidden  # the last norm's, the loss's gradient
    again, stay = fit.num_recomputed, layers - fit.num_recomputed
    inputs = f"{again} d" if again else ""

    def activations(num_bytes: float, *parts: str) -> Term:
        return Term("activations", int(num_bytes), f"c T ({' + '.join(part for part in parts if part)})")

    def so_far(share: float) -> Term:
        if config.gradient_accumulation_steps > 1 or share == 1:
            return gradients
        return Term(gradients.name, int(share * gradients.num_bytes), f"those so far of {gradients.formula}")

    first = activations(whole + ends, f"{layer.formula} + 3 f + {2 + END_TENSORS} d")
    moments = [[so_far(1), first]]
    loss = activations(
        stay * kept + tokens * again * layer.hidden + ends,
        inputs,
        f"{stay} x ({layer.formula})" if stay else "",
        f"{END_TENSORS} d",
    )
    moments.append([so_far(0), loss, logits_term(model, tokens, dtype)])
    if again:
        num_bytes = tokens * again * layer.hidden + whole + ends
        last = activations(num_bytes, inputs, f"{layer.formula} + 3 f + {2 + END_TENSORS} d")
        moments.append([so_far(stay / layers), last])
    return [term for term in max(moments, key=lambda moment: sum(t.num_bytes for t in moment)) if term.num_bytes]


@lru_cache(maxsize=16)
def activations_of(
    model: Model, adapted: frozenset[str], r: int, dropout: bool, dtype: torch.dtype, device: str
) -> Activations:
    return layer_activations(
        model.modules, {name: model.quantized[name] for name in adapted}, r, dropout, dtype, device
    )


def logits_term(model: Model, tokens: int, dtype: torch.dtype) -> Term:
    """A chunk of the head's output: float32 copies of it where the family caps the logits, a cast head's parts."""
    c, vocabulary, text = dtype.itemsize, model.text.vocab_size, model.text
    capped = getattr(text, "final_logit_softcapping", None) is not None
    size = 4 if capped else c
    rows = max(LOGITS_CHUNK_BYTES // (size * vocabulary), ROW_MULTIPLE)
    chunk = size * vocabulary * min(rows, tokens)
    if capped:
        return Term("logits chunk", 4 * chunk, "4 x min(32 MiB, 4 T V)")
    if model.head_itemsize < c:
        return Term("logits chunk", 2 * chunk, "2 x min(32 MiB, c T V)")
    return Term("logits chunk", chunk, "min(32 MiB, c T V)")


def device_type(config: TrainConfig) -> str:
    """ "cuda" or "cpu"; a device that is not here can be planned for."""
    if config.device == "auto":
        return pick_device("auto").type
    return config.device.partition(":")[0]


def state_term(linears: list[Any], config: TrainConfig, fit: Fit) -> Term:
    """AdamW's two states of each LoRA weight."""
    sizes = [config.r * n for m in linears for n in (m.in_features, m.out_features)]
    eight, formula = config.optim.endswith("8bit"), "8 P_l"
    if eight:
        formula = f"(2 + 8 / {STATE_BLOCKSIZE}) P_l, small tensors 8 P_l"
    each = [8 * n if not eight or n < SMALL else 2 * n + 8 * -(-n // STATE_BLOCKSIZE) for n in sizes]
    if fit.states_away:
        return Term("AdamW states", max(each, default=0), "one tensor's at a time")
    return Term("AdamW states", sum(each), formula)


def base_terms(model: Model, config: TrainConfig, c: int, device: str, budget: int | None) -> list[Term]:
    """The frozen base in 4 bits."""
    sizes = [linear.weight.numel() for linear in model.quantized.values()]
    matrices = [linear.weight.numel() // getattr(linear, "num_experts", 1) for linear in model.quantized.values()]
    buffers = 2 if device == "cuda" else 1  # autograd's thread there has one of its own
    scratch = Term("dequantized weight", buffers * c * max(matrices, default=0), "c x the largest matrix")
    if budget is not None:
        pages = model.page_bytes(config, c)
        norms = sum(p.numel() * c for p in model.modules.parameters() if p.ndim == 1)
        return [
            Term("base, pages", min(budget, sum(pages)), f"the budget; in all {len(pages)} pages"),
            Term("norms, scales of scales", norms + nested_bytes(sizes, config), "not paged"),
            scratch,
        ]
    others = [
        p.numel() * min(c, model.itemsize.get(name, 2))
        for name, p in model.modules.named_parameters()
        if name not in model.quantized
    ]
    experts = sum(stack.weight.numel() for stack in model.stacks.values())
    beside = f"P_e / 2; {2 * experts / 2**30:,.1f} GiB in 16 bits, as bitsandbytes leaves them"
    return [
        Term("base, 4-bit codes", (sum(sizes) - experts) // 2, "P_q / 2"),
        *([Term("experts, 4-bit codes", experts // 2, beside)] if experts else []),
        Term("base, scales", scale_bytes(sizes, config), scale_formula(config)),
        Term("embeddings, norms, head", sum(others), "P_o x bytes of its dtype, at most c"),
        scratch,
    ]


def targets(model: Model, config: TrainConfig) -> dict[str, Any]:
    """The linears, and experts' stacks, that get an adapter, by their weight's name."""
    ends = tuple(config.target_parameters or ())
    experts = {path: stack for path, stack in model.stacks.items() if path.endswith(ends)}
    if config.target_modules == "all-linear":
        return {**model.linears, **experts}
    names = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    named = model.linears.items()
    linears = {path: m for path, m in named if any(path.removesuffix(".weight").endswith(name) for name in names)}
    return {**linears, **experts}


def longest_context(model: Model) -> int:
    return getattr(model.text, "max_position_embeddings", None) or 1 << 30


def nested_bytes(sizes: list[int], config: TrainConfig) -> int:
    """Of double quantization's own scales and offsets."""
    blocks = [-(-size // config.blocksize) for size in sizes]
    return sum(4 * -(-b // NESTED_BLOCKSIZE) + 4 for b in blocks) if config.double_quant else 0


def scale_bytes(sizes: list[int], config: TrainConfig) -> int:
    blocks = [-(-size // config.blocksize) for size in sizes]
    if not config.double_quant:
        return 4 * sum(blocks)
    return sum(blocks) + nested_bytes(sizes, config)


def scale_formula(config: TrainConfig) -> str:
    if not config.double_quant:
        return f"4 P_q / {config.blocksize}"
    return f"P_q / {config.blocksize} + 4 P_q / ({config.blocksize} x {NESTED_BLOCKSIZE})"
