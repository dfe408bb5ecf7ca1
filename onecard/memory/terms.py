"""Bytes a term, its formula beside it, from headers or a known shape and the settings alone. docs/plan.md tells why.

P_q weights that 4 bits take, P_e of them in experts, P_o the others, P = P_q + P_o, P_l LoRA weights, P_s those of
modules_to_save; T tokens that go through the model at a time, L layers, d hidden, k key heads x head size, f
intermediate, V vocabulary; c bytes of the compute dtype. What a layer keeps for its backward is told in activations.py.
The terms of a step are those at its fullest moment, one of

    the loss                           all that is kept, the inputs of the layers that recompute, the logits' chunk
    a recomputing layer's backward     the inputs, that layer whole and what its backward works on, gradients so far
    the first layer's backward         that layer, what its backward works on, all gradients
    the update of modules in 16 bits   all gradients, one of them in float32
    an answer to a sample prompt       the cache, the prompt going through one layer; no gradients

Validation is never the fullest: it keeps nothing, and its rows are not longer. A paged base takes its budget and
nothing more: the head is a page of it, embeddings are read row by row. What a CPU process grows by beside its
tensors is told in process.py.
"""

from __future__ import annotations

from typing import Literal

from onecard.config import ROW_MULTIPLE, logits_chunk_bytes
from onecard.hf.attention import supports_packing
from onecard.kernels.cpu import allocator
from onecard.memory.activations import heads_of
from onecard.memory.inputs import Case, Fit, Term
from onecard.memory.process import process_terms
from onecard.paging.activations import AHEAD
from onecard.quant.dynamic import STATE_BLOCKSIZE

Method = Literal["full", "lora", "qlora", "generate"]
END_TENSORS = 4  # of a token's hidden size, that live around the loss
CUDA_RESERVE = 0.04  # of what a step allocates and frees: blocks rounded up, pieces that nothing fits into

CUDA_CONTEXT = Term("CUDA context, libraries", 500 << 20, "an allowance")


def plan_terms(case: Case, method: Method = "qlora", fit: Fit | None = None) -> list[Term]:
    """The terms of a method; without a fit, as gradient_checkpointing says and with a resident base."""
    fit = fit or Fit(case.model.num_layers if case.config.gradient_checkpointing else 0, case.budget)
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
        rows, tokens = case.config.per_device_train_batch_size, case.length
        own, step = [lora], generate_terms(case, rows, tokens, case.batch_tokens)
    else:
        saved, gradients = (
            Term("modules saved", case.c * case.num_saved, "c P_s"),
            Term("LoRA gradients", 4 * P_l, "4 P_l"),
        )
        if case.num_saved:
            gradients = Term("gradients", gradients.num_bytes + saved.num_bytes, "4 P_l + c P_s")
        own = [lora, *([saved] if case.num_saved else []), state_term(case, fit)]
        step = step_terms(case, fit, gradients)
    return [*base, *own, *step, *device_terms(case, step, method != "generate")]


def device_terms(case: Case, step: list[Term], learns: bool) -> list[Term]:
    """What the libraries hold beside the tensors."""
    if case.device != "cuda":
        return process_terms(case, learns)
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
        weights = case.c * sum(linear.weight.numel() for linear in case.model.linears.values()) // layers
        kept_weights = [Term("a layer's weights", weights, "c P_q / L")] if fit.keeps_weights else []
        moments.append([so_far(stay / layers), last, *kept_weights])
    if case.num_saved and case.c < 4:
        moments.append([gradients, Term("a gradient in float32", 4 * max(case.saved_sizes), "4 x the largest of P_s")])
    load = case.workload
    if load.prompt_tokens:
        answers = generate_terms(case, *load.answered, load.prompt_tokens)
        moments.append([*answers, heap_term(case, tokens, max(moments[0][1].num_bytes, loss.num_bytes))])
    return [term for term in max(moments, key=lambda moment: sum(t.num_bytes for t in moment)) if term.num_bytes]


def heap_term(case: Case, tokens: int, activations: int) -> Term:
    """What malloc keeps of a step that is over: all results that are too small for blocks of their own."""
    widest = case.c * tokens * max(case.model.text.hidden_size, case.intermediate)
    kept = activations if case.device == "cpu" and widest < allocator.SMALLEST else 0
    return Term("malloc's heap", kept, "a step's activations, where each is under 1 MiB")


def generate_terms(case: Case, rows: int, length: int, prompt_tokens: int) -> list[Term]:
    """The cache of every layer's keys and values of rows of `length` tokens, and prompts going through one layer."""
    text = case.model.text
    _, heads, head = heads_of(text)
    window = getattr(text, "sliding_window", None) or length
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * case.model.num_layers
    lengths = [min(length, window) if "sliding" in kind else length for kind in kinds]
    cached = 2 * case.c * heads * head * rows
    working = case.c * prompt_tokens * (3 * case.intermediate + 2 * text.hidden_size)
    return [
        Term("KV cache", cached * (sum(lengths) + max(lengths)), "2 c k T (L + 1), T at most the window's"),
        Term("prompt's activations", working, "c T (3 f + 2 d)"),
        Term("last logits", (4 + case.c) * rows * text.vocab_size, "(4 + c) V a row"),
    ]


def logits_term(case: Case, tokens: int) -> Term:
    """A chunk of the head's output, in float32 more than once where the family caps the logits or the head learns, a
    cast head's parts; or all of it, where documents go through the model's own forward (train/loss.py)."""
    c, vocabulary = case.c, case.model.text.vocab_size
    if not supports_packing(case.model.modules):
        return Term("logits", (c + 8) * tokens * vocabulary, "(c + 8) T V")
    learns = any(name.endswith("lm_head") for name in case.config.modules_to_save or ())
    capped = learns or getattr(case.model.text, "final_logit_softcapping", None) is not None
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
