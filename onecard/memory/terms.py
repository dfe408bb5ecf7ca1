"""Bytes and formula of each term, from headers or a known shape and the settings only. docs/plan.md explains them.

P_q quantized weights, P_e those of experts, P_o the other weights, P = P_q + P_o, P_l LoRA weights, P_n those of new
tokens' rows, P_s those of modules_to_save; T tokens in one forward, L layers, d hidden, k key heads x head size,
f intermediate, V vocabulary; c bytes of the compute dtype. activations.py counts what a layer keeps for its backward.
The terms of a step are those at the moment of its peak, one of

    the loss                           all kept activations, the inputs of recomputed layers, the logits chunk
    a recomputed layer's backward      the inputs, that layer's activations and backward tensors, gradients so far
    the first layer's backward         that layer's activations and backward tensors, all gradients
    the update of modules in 16 bits   all gradients, one of them in float32
    an answer to a sample prompt       the KV cache, the prompt's activations in one layer; no gradients

or that of the computation of LoRA's start, before there are optimizer states, if it takes more.
Validation is never the peak: it keeps nothing, and its rows are not longer. The pages of a paged base, the head's
included, stay within the budget, and embeddings are read row by row. process.py counts the growth of a CPU process in
addition to its tensors.
"""

from __future__ import annotations

from typing import Literal

from onecard.config import ADAMW, PREFILL_TOKENS, ROW_MULTIPLE, logits_chunk_bytes
from onecard.hf.attention import supports_packing
from onecard.kernels.cpu import allocator
from onecard.memory.activations import heads_of
from onecard.memory.inputs import MemoryStrategy, PlanInputs, Term
from onecard.memory.process import process_terms
from onecard.optim.make import state_formula
from onecard.paging.activations import ACTIVATIONS_AHEAD

Method = Literal["full", "lora", "qlora", "generate"]
ROW_TENSORS = 2  # more of them with rows of new tokens: the loss's input, the embedding's output
LAYERS_GATHERED = 3  # of a sharded base: the one in use, the next one in FSDP2's buffer, and its copy out of it
END_TENSORS = 4  # tensors of a token's hidden size that exist around the loss
CUDA_RESERVE = 0.04  # of what a step allocates and frees: rounding of blocks, and fragmentation

CUDA_CONTEXT = Term("CUDA context, libraries", 500 << 20, "an allowance")


def plan_terms(inputs: PlanInputs, method: Method = "qlora", strategy: MemoryStrategy | None = None) -> list[Term]:
    """Return a method's terms. Without a strategy, gradient_checkpointing and weights_budget decide."""
    strategy = strategy or MemoryStrategy(
        inputs.model.num_layers if inputs.config.gradient_checkpointing else 0, inputs.budget
    )
    P, P_l = inputs.model.num_weights, inputs.num_lora
    base = base_terms(inputs, strategy) if method in ("qlora", "generate") else [Term("weights, 16-bit", 2 * P, "2 P")]
    base = [*base, *(inputs.merged if method == "qlora" else [])]  # not +=: the list of a resident base is kept
    lora = Term("LoRA weights", 4 * P_l, "4 P_l")
    if method == "full":
        masters = Term("float32 masters", 4 * P, "4 P")
        own, step = (
            [masters, Term("AdamW states", 8 * P, "8 P")],
            step_terms(inputs, strategy, Term("gradients", 2 * P, "2 P")),
        )
    elif method == "generate":
        rows, tokens = inputs.config.per_device_train_batch_size, inputs.length
        at_once = inputs.batch_tokens if inputs.prefix_cache_bytes is None else min(inputs.batch_tokens, PREFILL_TOKENS)
        own, step = [lora], generate_terms(inputs, rows, tokens, at_once)  # a server computes a piece of one prompt
        if inputs.prefix_cache_bytes:
            step.append(Term("prefix cache", inputs.prefix_cache_bytes, "the server's prefix_cache, when it is full"))
    else:
        saved, gradients = (
            Term("modules saved", inputs.c * inputs.num_saved, "c P_s"),
            Term("LoRA gradients", 4 * P_l, "4 P_l"),
        )
        rows = Term("new tokens' rows", 4 * inputs.num_row_weights, "4 P_n")
        if rows.num_bytes:
            gradients = Term("gradients", gradients.num_bytes + rows.num_bytes, "4 P_l + 4 P_n")
        if inputs.num_saved:
            gradients = Term("gradients", gradients.num_bytes + saved.num_bytes, f"{gradients.formula} + c P_s")
        own = [lora, *start_terms(inputs, strategy), *(term for term in (rows, saved) if term.num_bytes)]
        own.append(state_term(inputs, strategy))
        step = step_terms(inputs, strategy, gradients)
        computing = computing_terms(inputs)
        if sum(term.num_bytes for term in computing) > sum(term.num_bytes for term in (own[-1], *step)):
            own, step = own[:-1], computing  # before the first step, so without the optimizer's states
    return [*base, *own, *step, *device_terms(inputs, step, method != "generate")]


def start_terms(inputs: PlanInputs, strategy: MemoryStrategy) -> list[Term]:
    """Return the term of a frozen start: its matrices, and those of each kept layer joined with the adapter's."""
    if not inputs.config.has_frozen_start:
        return []
    P_l, layers = inputs.num_lora, inputs.model.num_layers
    kept = max(layers - strategy.num_recomputed, 1)
    return [Term("LoRA's start", 4 * P_l + 8 * P_l * kept // layers, f"4 P_l + 8 P_l x {kept} / L")]


def computing_terms(inputs: PlanInputs) -> list[Term]:
    """Return what the computation of a start takes that is made from weights, one at a time: of the largest one.

    N K weights and n = min(N, K), in float32. pissa and olora have the dequantized weight, the factors, and a copy that
    LAPACK overwrites or B A; then also the residual. loftq has the stored and the dequantized weight beside D; then D,
    D D^T, its eigenvectors, and twice their bytes as LAPACK's workspace (adapter/start.py).
    """
    start, sizes = inputs.config.init_lora_weights, []
    if not start.startswith(("pissa", "olora", "loftq")):
        return []
    for path, m in inputs.adapted.items():
        if path in inputs.model.linears:
            N, K = m.out_features, m.in_features
            sizes.append((N * K, min(N, K) ** 2))
    if start.startswith("pissa_niter"):
        found = [12 * whole for whole, _ in sizes], "12 N K"
    elif start == "pissa":
        found = [max(16 * whole + 4 * square, 12 * whole + 16 * square) for whole, square in sizes], "12 N K + 16 n^2"
    elif start == "olora":
        found = [12 * whole + 4 * square for whole, square in sizes], "12 N K + 4 n^2"
    elif start == "loftq" and not inputs.config.calibrate:
        found = [max((6 + inputs.c) * whole, 4 * whole + 16 * square) for whole, square in sizes], "4 N K + 16 n^2"
    else:
        return []
    return [Term("computing LoRA's start", max(found[0], default=0), f"{found[1]}, of the largest weight")]


def device_terms(inputs: PlanInputs, step: list[Term], learns: bool) -> list[Term]:
    """Return the terms of the libraries' memory."""
    if inputs.device != "cuda":
        return process_terms(inputs, learns)
    moving = sum(term.num_bytes for term in (*step, inputs.scratch))
    return [Term("allocator", int(CUDA_RESERVE * moving), f"{CUDA_RESERVE} of a step's tensors, an allowance"),
            CUDA_CONTEXT]  # fmt: skip


def step_terms(inputs: PlanInputs, strategy: MemoryStrategy, gradients: Term) -> list[Term]:
    """Return activations, gradients and logits at a step's peak."""
    layers, tokens, length, layer = inputs.model.num_layers, inputs.tokens(strategy), inputs.length, inputs.layer
    kept = tokens * (layer.kept + length * layer.pair)
    whole = kept + tokens * (layer.working + length * layer.pair_working) + inputs.expert_factors
    whole -= max(0, tokens - (strategy.mlp_chunk or tokens)) * layer.mlp
    chunked = f" - what MLPs keep beyond {strategy.mlp_chunk:,} tokens" if strategy.mlp_chunk else ""
    num_ends = END_TENSORS + (ROW_TENSORS if inputs.row_shapes else 0)
    ends = num_ends * tokens * layer.hidden  # the last norm's, the loss's gradient
    again, stay = strategy.num_recomputed, layers - strategy.num_recomputed
    waiting = again - max(0, strategy.num_offloaded - ACTIVATIONS_AHEAD)  # inputs on the device, not offloaded
    input_formula = f"{waiting} d" if waiting else ""

    def activations(num_bytes: float, *parts: str, end: str = "") -> Term:
        return Term("activations", int(num_bytes), f"c T ({' + '.join(part for part in parts if part)}){end}")

    def so_far(share: float) -> Term:
        if inputs.config.gradient_accumulation_steps > 1 or tokens < inputs.batch_tokens or share == 1:
            return gradients
        return Term(gradients.name, int(share * gradients.num_bytes), f"those so far of {gradients.formula}")

    first = activations(whole + ends, f"{layer.formula} + {layer.working_formula} + {2 + num_ends} d", end=chunked)
    moments = [[so_far(1), first]]
    loss = activations(
        stay * kept + tokens * waiting * layer.hidden + ends,
        input_formula,
        f"{stay} x ({layer.formula})" if stay else "",
        f"{num_ends} d",
    )
    moments.append([so_far(0), loss, logits_term(inputs, tokens)])
    if again:
        num_bytes = tokens * waiting * layer.hidden + whole + ends
        last = activations(
            num_bytes, input_formula, f"{layer.formula} + {layer.working_formula} + {2 + num_ends} d", end=chunked
        )
        weights = inputs.c * inputs.num_linear_weights // layers
        saved_weights = [Term("a layer's weights", weights, "c P_q / L")] if strategy.keep_dequantized_weights else []
        moments.append([so_far(stay / layers), last, *saved_weights])
    if inputs.num_saved and inputs.c < 4:
        moments.append(
            [gradients, Term("a gradient in float32", 4 * max(inputs.saved_sizes), "4 x the largest of P_s")]
        )
    if inputs.num_processes > 1:
        moments.append([gradients, Term("gradients to sum", gradients.num_bytes, "in one exchange")])
    load = inputs.workload
    if load.prompt_tokens:
        answers = generate_terms(inputs, *load.answered, load.prompt_tokens)
        moments.append([*answers, heap_term(inputs, tokens, max(moments[0][1].num_bytes, loss.num_bytes))])
    return [term for term in max(moments, key=lambda moment: sum(t.num_bytes for t in moment)) if term.num_bytes]


def heap_term(inputs: PlanInputs, tokens: int, activations: int) -> Term:
    """Return what malloc keeps after a step: all results, if they are too small for their own blocks."""
    widest = inputs.c * tokens * max(inputs.model.text.hidden_size, inputs.intermediate)
    kept = activations if inputs.device == "cpu" and widest < allocator.SMALLEST else 0
    return Term("malloc's heap", kept, "a step's activations, where each is under 1 MiB")


def generate_terms(inputs: PlanInputs, rows: int, length: int, prompt_tokens: int) -> list[Term]:
    """Return the KV cache of `rows` rows of `length` tokens, the prompts' activations in a layer, and last logits."""
    text = inputs.model.text
    _, heads, head = heads_of(text)
    window = getattr(text, "sliding_window", None) or length
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * inputs.model.num_layers
    lengths = [min(length, window) if "sliding" in kind else length for kind in kinds]
    cached = 2 * inputs.c * heads * head * rows
    working = prompt_tokens * max(inputs.c * (3 * inputs.intermediate + 2 * text.hidden_size), inputs.layer.together)
    return [
        Term("KV cache", cached * (sum(lengths) + max(lengths)), "2 c k T (L + 1), T at most the window's"),
        Term("prompt's activations", working, "c T (3 f + 2 d)"),
        Term("last logits", (4 + inputs.c) * rows * text.vocab_size, "(4 + c) V a row"),
    ]


def logits_term(inputs: PlanInputs, tokens: int) -> Term:
    """Return a chunk of logits: four float32 copies if the family caps them or the head is trained, two copies if the
    head is cast. Without the packed loss, return all logits of the model's own forward (train/loss.py).."""
    c, vocabulary = inputs.c, inputs.model.text.vocab_size
    if inputs.config.has_head:
        documents, outputs = max(inputs.workload.trained_heads), inputs.model.modules.config.num_labels
        return Term("outputs", documents * (8 * outputs + c * inputs.model.text.hidden_size), "8 C + c d a document")
    if not supports_packing(inputs.model.modules):
        return Term("logits", (c + 8) * tokens * vocabulary, "(c + 8) T V")
    learns = any(name.endswith("lm_head") for name in inputs.config.modules_to_save or ())
    capped = learns or getattr(inputs.model.text, "final_logit_softcapping", None) is not None
    size = 4 if capped else c
    most = logits_chunk_bytes(inputs.device)
    rows = max(most // (size * vocabulary), ROW_MULTIPLE)
    chunk = size * vocabulary * min(rows, tokens)
    copies = 4 if capped else 2 if inputs.model.head_itemsize < c else 1
    copies += 1 if inputs.row_shapes else 0  # with the new tokens' logits, beside those without
    bound = f"min({most >> 20} MiB, {'4' if capped else 'c'} T V)"
    return Term("logits chunk", copies * chunk, f"{copies} x {bound}" if copies > 1 else bound)


def state_term(inputs: PlanInputs, strategy: MemoryStrategy) -> Term:
    """Return the optimizer's states of all trainable weights."""
    name = "AdamW states" if inputs.config.optim in ADAMW else f"{inputs.config.optim} states"
    if strategy.offload_optimizer_states:
        return Term(name, inputs.states_bytes(True), "one tensor's at a time")
    saved = f" + {8 if inputs.c == 4 else 12} P_s" if inputs.num_saved else ""
    saved = (" and of P_n" if inputs.row_shapes else "") + saved
    formula = state_formula(inputs.config.optim) + saved
    if inputs.config.shard_optimizer and inputs.num_processes > 1:
        formula = f"({formula}) / {inputs.num_processes}"
    return Term(name, inputs.states_bytes(False), formula)


def base_terms(inputs: PlanInputs, strategy: MemoryStrategy) -> list[Term]:
    """Return the terms of the frozen base in 4 bits."""
    if inputs.is_sharded:
        return sharded_terms(inputs)
    if strategy.weights_budget is None:
        return inputs.resident
    pages, is_cast = inputs.pages, inputs.model.head_itemsize > inputs.c
    head = inputs.model.modules.get_output_embeddings()
    return [
        Term("base, pages", min(strategy.weights_budget, sum(pages)), f"the budget; in all {len(pages)} pages"),
        Term("norms, routers, scales of scales", inputs.unpaged_bytes, "not paged"),
        *([Term("head, cast", inputs.c * head.weight.numel(), "c V d")] if is_cast else []),
        inputs.scratch,
    ]


def sharded_terms(inputs: PlanInputs) -> list[Term]:
    """Return the terms of a base that is sharded over processes. Embeddings are read row by row."""
    layers, head, N = inputs.layer_pages, inputs.model.modules.get_output_embeddings(), inputs.num_processes
    head_bytes = 0 if head is None else head.weight.numel() * min(inputs.c, inputs.model.head_itemsize)
    return [
        Term("base, own shard", -(-sum(layers) // N), f"(P_q / 2 + scales) / {N}"),
        Term("gathered layers", LAYERS_GATHERED * max(layers), f"{LAYERS_GATHERED} x the largest layer in 4 bits"),
        Term("head, norms, scales of scales", inputs.unpaged_bytes + head_bytes, "whole in each process"),
        inputs.scratch,
    ]


def exchange_terms(inputs: PlanInputs) -> list[Term]:
    """Return what a process receives from the others in an update. It sends as much.

    An all-reduce in a ring brings each value twice, less the process's own part. A sharded layer is gathered before the
    forward and before the backward of a micro-batch, and for the forward of a reference that is computed in the update.
    """
    N, config = inputs.num_processes, inputs.config
    if N == 1:
        return []
    num_masters = inputs.num_lora + inputs.num_row_weights
    num_gradients = num_masters + inputs.num_saved
    terms = [Term("gradients", 8 * num_gradients * (N - 1) // N, f"2 x 4 P_l x {N - 1}/{N}")]
    if config.shard_optimizer:
        weights = (4 * num_masters + inputs.c * inputs.num_saved) * (N - 1) // N
        terms.append(Term("updated weights", weights, f"4 P_l x {N - 1}/{N}"))
    if inputs.is_sharded:
        passes = 3 if config.has_reference and config.precompute_reference is False else 2
        num_gathers = passes * -(-config.gradient_accumulation_steps // N)
        formula = f"{num_gathers} x (P_q / 2 + scales) x {N - 1}/{N}"
        terms.append(Term("layers", num_gathers * sum(inputs.layer_pages) * (N - 1) // N, formula))
    return terms


def disk_terms(inputs: PlanInputs, strategy: MemoryStrategy, paged_from_file: bool) -> list[Term]:
    """Return what a run writes. `paged_from_file`: whether a paged base uses the checkpoint's own 4-bit files."""
    lora = "8 P_l" if inputs.config.has_frozen_start else "4 P_l"
    adapter = int(lora[0]) * inputs.num_lora + 4 * inputs.num_row_weights + inputs.c * inputs.num_saved
    states = state_term(inputs, MemoryStrategy())
    num_trained = inputs.num_lora + inputs.num_row_weights + inputs.num_saved
    trained = 4 * num_trained * (inputs.config.optim == "schedule_free_adamw")  # beside the average
    one = adapter + sum(inputs.state_sizes) + trained
    limit = inputs.config.save_total_limit
    count = 1 + (max(limit, 2) if inputs.config.load_best_model_at_end else limit)  # the next one is complete first
    learned = lora + (" + 4 P_n" if inputs.row_shapes else "") + (" + c P_s" if inputs.num_saved else "")
    formula = f"{count} x ({learned} + {'4 P_l + ' * bool(trained)}{states.name})"
    terms = [Term("checkpoints", count * one, formula), Term("adapter", adapter, learned)]
    if strategy.weights_budget is not None and not paged_from_file:
        terms.append(Term("base's pages", sum(inputs.pages), "P_q / 2 + scales"))
    if inputs.device == "cpu" and inputs.config.optim.startswith("paged"):
        terms.append(Term("states paged out", states.num_bytes, states.name))
    if inputs.device == "cpu" and strategy.num_offloaded:
        terms.append(
            Term(
                "inputs paged out",
                strategy.num_offloaded * inputs.tokens(strategy) * inputs.layer.hidden,
                "c T d a layer",
            )
        )
    return terms
