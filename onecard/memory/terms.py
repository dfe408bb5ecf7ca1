"""Bytes a term, its formula beside it, from headers or a known shape and the settings alone. docs/plan.md tells why.

P_q weights that 4 bits take, P_e of them in experts, P_o the others, P = P_q + P_o, P_l LoRA weights, P_s those of
modules_to_save; T tokens that go through the model at a time, L layers, d hidden, k key heads x head size, f
intermediate, V vocabulary; c bytes of the compute dtype. What a layer keeps for its backward is told in activations.py.
The terms of a step are those at its fullest moment, one of

    the loss                           all that is kept, the inputs of the layers that recompute, the logits' chunk
    a recomputing layer's backward     the inputs, that layer whole and what its backward works on, gradients so far
    the first layer's backward         that layer, what its backward works on, all gradients
    the update of modules in 16 bits   all gradients, one of them in float32

A paged base takes its budget and nothing more: the head is a page of it, embeddings are read row by row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from onecard.config import NESTED_BLOCKSIZE, ROW_MULTIPLE, TrainConfig, logits_chunk_bytes
from onecard.hf.load import pick_device
from onecard.kernels.cpu import native
from onecard.memory.activations import Activations, head_dim, layer_activations
from onecard.memory.model import Model
from onecard.optim.adamw import SMALL
from onecard.paging.activations import AHEAD
from onecard.paging.files import ALIGNMENT
from onecard.paging.weights import layer_of
from onecard.quant.dynamic import STATE_BLOCKSIZE

Method = Literal["full", "lora", "qlora", "generate"]
END_TENSORS = 4  # of a token's hidden size, that live around the loss
CUDA_RESERVE = 0.04  # of what a step allocates and frees: blocks rounded up, pieces that nothing fits into


@dataclass(frozen=True)
class Term:
    """One line of the bill."""

    name: str
    num_bytes: int
    formula: str


CPU_BUFFERS = Term("libraries' buffers", 36 << 20, "measured")
CUDA_CONTEXT = Term("CUDA context, libraries", 500 << 20, "an allowance")


@dataclass(frozen=True)
class Fit:
    """What can be traded for memory.

    Attributes:
        num_recomputed: decoder layers, the first ones, whose activations are made again in the backward.
        weights_budget: bytes of a paged base; None for a resident one.
        states_away: whether the optimizer's states leave the device between updates.
        num_offloaded: of the recomputed layers, the first ones, whose inputs leave the device too.
        part_tokens: most tokens that go through the model at a time; None for the whole micro-batch.
    """

    num_recomputed: int = 0
    weights_budget: int | None = None
    states_away: bool = False
    num_offloaded: int = 0
    part_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """A model under settings: what the terms of every Fit are made from, worked out once."""

    model: Model
    config: TrainConfig
    dtype: torch.dtype

    @property
    def c(self) -> int:
        return self.dtype.itemsize

    @cached_property
    def device(self) -> str:
        """ "cuda" or "cpu"; a device that is not here can be planned for."""
        named = self.config.device
        return pick_device("auto").type if named == "auto" else named.partition(":")[0]

    @property
    def length(self) -> int:
        return min(self.config.max_seq_length, self.model.longest_context)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a micro-batch, filled up as the loader does."""
        return filled(self.length * self.config.per_device_train_batch_size)

    def tokens(self, fit: Fit) -> int:
        """Tokens that go through the model at a time."""
        return min(self.batch_tokens, filled(fit.part_tokens or self.batch_tokens))

    @cached_property
    def adapted(self) -> dict[str, Any]:
        """The linears and stacks that get an adapter, by their weight's name."""
        names, linears = self.config.target_modules, self.model.linears
        ends = tuple(self.config.target_parameters or ())
        stacks = {path: stack for path, stack in self.model.stacks.items() if path.endswith(ends)}
        if names == "all-linear":
            return {**linears, **stacks}
        if isinstance(names, str):  # a pattern of whole names, as peft matches it
            found = {path: m for path, m in linears.items() if re.fullmatch(names, path.removesuffix(".weight"))}
        else:
            named = tuple(f".{name}.weight" for name in names)
            found = {path: m for path, m in linears.items() if f".{path}".endswith(named)}
        return found | stacks

    @cached_property
    def lora_sizes(self) -> list[int]:
        """Weights of each LoRA matrix."""
        return [self.config.r * n for m in self.adapted.values() for n in (m.in_features, m.out_features)]

    @cached_property
    def num_lora(self) -> int:
        return sum(self.lora_sizes)

    @cached_property
    def saved_sizes(self) -> list[int]:
        """Weights of each parameter of modules_to_save."""
        names = tuple(f".{name}." for name in self.config.modules_to_save or ())
        found = [p for path, p in self.model.modules.named_parameters() if any(name in f".{path}" for name in names)]
        return [p.numel() for p in found]

    @cached_property
    def num_saved(self) -> int:
        return sum(self.saved_sizes)

    @cached_property
    def expert_factors(self) -> int:
        """Bytes of a layer's LoRA on experts while its backward runs: in the compute dtype, and gradients in it."""
        stacked = sum(m.in_features + m.out_features for name, m in self.adapted.items() if name in self.model.stacks)
        return 2 * self.c * self.config.r * stacked // self.model.num_layers

    @cached_property
    def sizes(self) -> list[int]:
        """Weights of each linear, and of each stack, that 4 bits take."""
        return [linear.weight.numel() for linear in self.model.quantized.values()]

    @cached_property
    def num_met(self) -> tuple[float, float]:
        """Weights that a token meets in 4 bits, and of LoRA: of experts, those that it is sent to."""
        per_token = getattr(self.model.text, "num_experts_per_tok", None) or 1
        share = {name: per_token / stack.num_experts for name, stack in self.model.stacks.items()}
        frozen = sum(m.weight.numel() * share.get(name, 1) for name, m in self.model.quantized.items())
        lora = sum((m.in_features + m.out_features) * share.get(name, 1) for name, m in self.adapted.items())
        return frozen, self.config.r * lora

    @cached_property
    def pages(self) -> list[int]:
        """Bytes of each page that the base would be in: a decoder layer's codes and scales, the head's weight."""
        pages: dict[str, int] = {}
        for name, linear in self.model.quantized.items():
            numel, layer = linear.weight.numel(), layer_of(name)
            blocks = -(-numel // self.config.blocksize)
            parts = ((numel + 1) // 2, blocks * (1 if self.config.double_quant else 4))
            pages[layer] = pages.get(layer, 0) + sum(-(-part // ALIGNMENT) * ALIGNMENT for part in parts)
        head = self.model.modules.get_output_embeddings()
        if head is not None:
            pages["head"] = head.weight.numel() * self.model.head_itemsize
        return list(pages.values())

    @cached_property
    def smallest_budget(self) -> int:
        """Bytes of the two largest pages: the least that a pager takes."""
        return sum(sorted(self.pages)[-2:])

    @cached_property
    def state_sizes(self) -> list[int]:
        """Bytes of AdamW's two states of each LoRA matrix, and of a module trained in full with its float32 master."""
        saved = [(8 if self.c == 4 else 12) * n for n in self.saved_sizes]
        if not self.config.optim.endswith("8bit"):
            return [8 * n for n in self.lora_sizes] + saved
        return [8 * n if n < SMALL else 2 * n + 8 * -(-n // STATE_BLOCKSIZE) for n in self.lora_sizes] + saved

    @cached_property
    def layer(self) -> Activations:
        config = self.config
        return layer_activations(
            self.model.modules,
            self.adapted,
            config.r,
            config.lora_dropout > 0,
            config.use_dora,
            self.dtype,
            self.device,
        )

    @cached_property
    def resident(self) -> list[Term]:
        """The base when all of it is on the device."""
        model, config = self.model, self.config
        others = [
            p.numel() * min(self.c, model.itemsize.get(name, 2))
            for name, p in model.modules.named_parameters()
            if name not in model.quantized
        ]
        experts = sum(stack.weight.numel() for stack in model.stacks.values())
        beside = f"P_e / 2; {2 * experts / 2**30:,.1f} GiB in 16 bits, as bitsandbytes leaves them"
        return [
            Term("base, 4-bit codes", (sum(self.sizes) - experts) // 2, "(P_q - P_e) / 2" if experts else "P_q / 2"),
            *([Term("experts, 4-bit codes", experts // 2, beside)] if experts else []),
            Term("base, scales", scale_bytes(self.sizes, config), scale_formula(config)),
            Term("embeddings, norms, head", sum(others), "P_o x bytes of its dtype, at most c"),
            self.scratch,
        ]

    @cached_property
    def scratch(self) -> Term:
        """What products work in: a dequantized weight, or on tiles (AMX) the rows that meet it; experts the former."""
        if self.config.use_dora:  # the weight, B A and their sum, for its norm
            largest = max((m.weight.numel() for m in self.model.linears.values()), default=0)
            return Term("scratch", (self.c + 8) * largest, "(c + 8) x the largest matrix")
        tiled = self.device == "cpu" and self.dtype == torch.bfloat16 and native.has_tiles()
        matrices = [
            m.weight.numel() // getattr(m, "num_experts", 1)
            for m in (self.model.stacks if tiled else self.model.quantized).values()
        ]
        buffers = 2 if self.device == "cuda" else 1  # autograd's thread there has one of its own
        weight = buffers * self.c * max(matrices, default=0)
        if not tiled:
            return Term("scratch", weight, "c x the largest matrix")
        widest = max((n for m in self.model.linears.values() for n in m.weight.shape), default=0)
        rows = self.c * min(self.batch_tokens, native.TILED_ROWS) * widest
        return Term("scratch", rows + weight, f"c min(T, {native.TILED_ROWS}) x the widest matrix")

    @cached_property
    def unpaged_bytes(self) -> int:
        """Of a paged base, what stays: norms, biases, routers, and double quantization's own scales."""
        ends = (self.model.modules.get_input_embeddings(), self.model.modules.get_output_embeddings())
        paged = {id(module.weight) for module in ends if module is not None}
        named = self.model.modules.named_parameters()
        others = sum(p.numel() for name, p in named if name not in self.model.quantized and id(p) not in paged)
        return self.c * others + nested_bytes(self.sizes, self.config)


def plan_terms(case: Case, method: Method = "qlora", fit: Fit | None = None) -> list[Term]:
    """The terms of a method; without a fit, as gradient_checkpointing says and with a resident base."""
    fit = fit or Fit(case.model.num_layers if case.config.gradient_checkpointing else 0)
    P, P_l = case.model.num_weights, case.num_lora
    base = base_terms(case, fit) if method in ("qlora", "generate") else [Term("weights, 16-bit", 2 * P, "2 P")]
    lora = Term("LoRA weights", 4 * P_l, "4 P_l")
    if method == "full":
        masters = Term("float32 masters", 4 * P, "4 P")
        own, step = (
            [masters, Term("AdamW states", 8 * P, "8 P")],
            step_terms(case, fit, Term("gradients", 2 * P, "2 P")),
        )
    elif method == "generate":
        own, step = [lora], generate_terms(case)
    else:
        saved, gradients = (
            Term("modules saved", case.c * case.num_saved, "c P_s"),
            Term("LoRA gradients", 4 * P_l, "4 P_l"),
        )
        if case.num_saved:
            gradients = Term("gradients", gradients.num_bytes + saved.num_bytes, "4 P_l + c P_s")
        own = [lora, *([saved] if case.num_saved else []), state_term(case, fit)]
        step = step_terms(case, fit, gradients)
    return [*base, *own, *step, *device_terms(case, step)]


def device_terms(case: Case, step: list[Term]) -> list[Term]:
    """What the libraries hold beside the tensors."""
    if case.device != "cuda":
        return [CPU_BUFFERS]
    moving = sum(term.num_bytes for term in (*step, case.scratch))
    return [Term("allocator", int(CUDA_RESERVE * moving), f"{CUDA_RESERVE} of a step's tensors, an allowance"),
            CUDA_CONTEXT]  # fmt: skip


def step_terms(case: Case, fit: Fit, gradients: Term) -> list[Term]:
    """Activations, gradients and logits at the fullest of a step's moments."""
    layers, tokens, length, layer = case.model.num_layers, case.tokens(fit), case.length, case.layer
    kept = tokens * (layer.kept + length * layer.pair)
    whole = kept + tokens * (layer.working + length * layer.pair_working) + case.expert_factors
    ends = END_TENSORS * tokens * layer.hidden  # the last norm's, the loss's gradient
    again, stay = fit.num_recomputed, layers - fit.num_recomputed
    waiting = again - max(0, fit.num_offloaded - AHEAD)  # inputs here: the others are outside
    inputs = f"{waiting} d" if waiting else ""

    def activations(num_bytes: float, *parts: str) -> Term:
        return Term("activations", int(num_bytes), f"c T ({' + '.join(part for part in parts if part)})")

    def so_far(share: float) -> Term:
        if case.config.gradient_accumulation_steps > 1 or tokens < case.batch_tokens or share == 1:
            return gradients
        return Term(gradients.name, int(share * gradients.num_bytes), f"those so far of {gradients.formula}")

    first = activations(whole + ends, f"{layer.formula} + 2 f + {2 + END_TENSORS} d")
    moments = [[so_far(1), first]]
    loss = activations(
        stay * kept + tokens * waiting * layer.hidden + ends,
        inputs,
        f"{stay} x ({layer.formula})" if stay else "",
        f"{END_TENSORS} d",
    )
    moments.append([so_far(0), loss, logits_term(case, tokens)])
    if again:
        num_bytes = tokens * waiting * layer.hidden + whole + ends
        last = activations(num_bytes, inputs, f"{layer.formula} + 2 f + {2 + END_TENSORS} d")
        moments.append([so_far(stay / layers), last])
    if case.num_saved and case.c < 4:
        moments.append([gradients, Term("a gradient in float32", 4 * max(case.saved_sizes), "4 x the largest of P_s")])
    return [term for term in max(moments, key=lambda moment: sum(t.num_bytes for t in moment)) if term.num_bytes]


def generate_terms(case: Case) -> list[Term]:
    """The cache of every layer's keys and values, and a prompt of T tokens going through one layer."""
    text, T = case.model.text, case.batch_tokens
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    rows, window = case.config.per_device_train_batch_size, getattr(text, "sliding_window", None) or case.length
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * case.model.num_layers
    lengths = [min(case.length, window) if "sliding" in kind else case.length for kind in kinds]
    cached = 2 * case.c * heads * head_dim(text) * rows
    working = case.c * T * (3 * text.intermediate_size + 2 * text.hidden_size)
    return [
        Term("KV cache", cached * (sum(lengths) + max(lengths)), "2 c k T (L + 1), T at most the window's"),
        Term("prompt's activations", working, "c T (3 f + 2 d)"),
        Term("last logits", (4 + case.c) * rows * text.vocab_size, "(4 + c) V a row"),
    ]


def logits_term(case: Case, tokens: int) -> Term:
    """A chunk of the head's output: float32 copies of it where the family caps the logits, a cast head's parts."""
    c, vocabulary = case.c, case.model.text.vocab_size
    capped = getattr(case.model.text, "final_logit_softcapping", None) is not None
    size = 4 if capped else c
    most = logits_chunk_bytes(case.device)
    rows = max(most // (size * vocabulary), ROW_MULTIPLE)
    chunk = size * vocabulary * min(rows, tokens)
    if capped:
        return Term("logits chunk", 4 * chunk, f"4 x min({most >> 20} MiB, 4 T V)")
    if case.model.head_itemsize < c:
        return Term("logits chunk", 2 * chunk, f"2 x min({most >> 20} MiB, c T V)")
    return Term("logits chunk", chunk, f"min({most >> 20} MiB, c T V)")


def state_term(case: Case, fit: Fit) -> Term:
    """AdamW's two states of each LoRA weight."""
    if fit.states_away:
        return Term("AdamW states", max(case.state_sizes, default=0), "one tensor's at a time")
    eight = f"(2 + 8 / {STATE_BLOCKSIZE}) P_l, small tensors 8 P_l"
    formula = eight if case.config.optim.endswith("8bit") else "8 P_l"
    saved = f" + {8 if case.c == 4 else 12} P_s" if case.num_saved else ""
    return Term("AdamW states", sum(case.state_sizes), formula + saved)


def base_terms(case: Case, fit: Fit) -> list[Term]:
    """The frozen base in 4 bits."""
    if fit.weights_budget is None:
        return case.resident
    pages, is_cast = case.pages, case.model.head_itemsize > case.c
    head = case.model.modules.get_output_embeddings()
    return [
        Term("base, pages", min(fit.weights_budget, sum(pages)), f"the budget; in all {len(pages)} pages"),
        Term("norms, routers, scales of scales", case.unpaged_bytes, "not paged"),
        *([Term("head, cast", case.c * head.weight.numel(), "c V d")] if is_cast else []),
        case.scratch,
    ]


def disk_terms(case: Case, fit: Fit, paged_from_file: bool) -> list[Term]:
    """What a run writes; `paged_from_file`: a paged base is read from the checkpoint's own 4-bit files."""
    adapter = 4 * case.num_lora + case.c * case.num_saved
    one = adapter + sum(case.state_sizes)
    count = case.config.save_total_limit + 1  # the next one is whole before the oldest goes
    learned = "4 P_l + c P_s" if case.num_saved else "4 P_l"
    terms = [Term("checkpoints", count * one, f"{count} x ({learned} + AdamW states)"),
             Term("adapter", adapter, learned)]  # fmt: skip
    if fit.weights_budget is not None and not paged_from_file:
        terms.append(Term("base's pages", sum(case.pages), "P_q / 2 + scales"))
    if case.device == "cpu" and case.config.optim.startswith("paged"):
        terms.append(Term("states paged out", sum(case.state_sizes), "AdamW states"))
    if case.device == "cpu" and fit.num_offloaded:
        terms.append(
            Term("inputs paged out", fit.num_offloaded * case.tokens(fit) * case.layer.hidden, "c T d a layer")
        )
    return terms


def filled(tokens: int) -> int:
    """Up to a multiple of ROW_MULTIPLE."""
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


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
