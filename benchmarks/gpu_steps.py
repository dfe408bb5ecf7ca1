"""Whole training steps on a GPU, on random weights of public shapes: ours by the product's own update, peers by theirs.

python -m benchmarks.gpu runs it; `--sections steps` alone. For each contender and each row: tokens a second; the memory
that torch's allocator has reserved; useful FLOPs as a share of the GPU's peak; and the share of the wall time in which
the GPU computes, from one more step under torch.profiler. A low share means that the GPU waits for the host.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.shapes import LLAMAS

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    **{name: LLAMAS[name] for name in ("1b", "8b")},
}  # fmt: skip
RANK, STEPS, WARM, NEW_TOKENS, RATE = 16, 4, 4, 32, 1e-4
CONTENDERS = ("onecard", "bnb", "eager", "lora", "onecard16")  # eager: onecard without CUDA graphs
GENERATES = ("onecard", "bnb")
OURS = ("onecard", "eager", "onecard16")
LONGEST = 131072


@dataclass(frozen=True)
class Row:
    """What a micro-batch is.

    Attributes:
        documents: of equal length, packed into the row. Peers take rows of one document.
        recompute: whether all layers recompute their activations in the backward.
    """

    tokens: int
    documents: int = 1
    recompute: bool = False

    @classmethod
    def parse(cls, text: str) -> Row:
        """Read what `str` writes: 8192x16r is 16 documents in 8,192 tokens, recomputed."""
        tokens, _, documents = text.removesuffix("r").partition("x")
        return cls(int(tokens), int(documents or 1), text.endswith("r"))

    def __str__(self) -> str:
        return f"{self.tokens}{f'x{self.documents}' * (self.documents > 1)}{'r' * self.recompute}"


ROWS = [Row(512), Row(2048), Row(2048, 8), Row(8192), Row(8192, 1, True), Row(8192, 16, True)]


def clock(call: Callable[[], object], device: torch.device, rounds: int = 30, warm: int = 3) -> float:
    """Return the median seconds of a call, including synchronization with the device."""
    times = []
    for number in range(rounds + warm):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        if number >= warm:
            times.append(time.perf_counter() - start)
    return median(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_seconds(step: Callable[[], object], device: torch.device) -> float | None:
    """Return the seconds in which the GPU computes during a call, or None without a GPU."""
    if device.type != "cuda":
        step()
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        wait(device)
    events = [event for event in found.events() or () if event.device_type.name == "CUDA"]
    return union((event.time_range.start, event.time_range.end) for event in events) / 1e6


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def random_model(shape: str, contender: str, device: torch.device, share: bool = False, **fields: int) -> Any:
    """Return a Llama of random weights on the device, with the contender's kind of linears and with adapters.

    With `share`, linears of one shape share a weight. `fields` replace the shape's.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes: dict[str, Any] = {**SHAPES[shape], **fields}
    config = LlamaConfig(max_position_embeddings=LONGEST, tie_word_embeddings=False, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    made: dict[torch.Size, Any] = {}
    for name, linear in linears:
        ours = random_linear(linear, contender, device, made.get(linear.weight.shape) if share else None)
        made[linear.weight.shape] = ours
        model.set_submodule(name, ours)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner = model.get_submodule(name.rpartition(".")[0])
            value = torch.ones if "norm" in name else lambda s, **k: 0.02 * torch.randn(s, **k)
            filled = value(parameter.shape, device=device, dtype=torch.bfloat16)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(filled, requires_grad=False))
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.requires_grad_(False)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    if contender == "onecard":
        from onecard import BitsAndBytesConfig
        from onecard.adapter.layers import register_fused
        from onecard.hf.fusion import fuse

        model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        fuse(model)
        register_fused(lora)
    return get_peft_model(model, lora)


def random_linear(linear: nn.Linear, contender: str, device: torch.device, like: Any = None) -> nn.Module:
    """Return the contender's linear of that shape with a random weight; ours with the weight of `like` if given."""
    N, K = linear.weight.shape
    if like is not None:
        from onecard.nn.linear import Linear4bit

        shared = Linear4bit(K, N, False, torch.bfloat16, device)
        shared.set_weight(like.weight.data, like.quant_state)
        return shared
    W = 0.02 * torch.randn(N, K, device=device, dtype=torch.bfloat16)
    if contender == "onecard":
        from onecard.kernels import ops
        from onecard.nn.linear import Linear4bit

        ours = Linear4bit(K, N, False, torch.bfloat16, device)
        ours.set_weight(*ops.quantize_4bit(W))
        return ours
    if contender == "bnb":
        from bitsandbytes.nn.modules import Linear4bit as PeerLinear
        from bitsandbytes.nn.modules import Params4bit

        peer = PeerLinear(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        peer.weight = Params4bit(W, requires_grad=False, quant_type="nf4", compress_statistics=True)  # type: ignore
        return peer.to(device)
    plain = nn.Linear(K, N, bias=False, device="meta")
    plain.weight = nn.Parameter(W, requires_grad=False)
    return plain


def our_run(model: Any, row: Row, device: torch.device, strategy: Any, **more: Any) -> Any:
    """Return a Run of the product on random documents. `more` replaces its settings."""
    from onecard.config import TrainConfig, make_config
    from onecard.data.chat.mask import Example
    from onecard.data.loader import Loader
    from onecard.train.run import Run

    fields: dict[str, Any] = {
        "model": "-", "data": "-", "output": tempfile.gettempdir(), "r": RANK, "lora_alpha": 2 * RANK,
        "learning_rate": RATE, "gradient_accumulation_steps": 1, "max_seq_length": row.tokens, "packing": True,
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_steps": 1 << 20, "device": str(device),
    }  # fmt: skip
    config = make_config(TrainConfig, fields | more, "benchmark")
    vocabulary, length = model.config.vocab_size, row.tokens // row.documents
    ids = torch.randint(0, vocabulary, (4 * row.documents, length)).tolist()
    data = [Example(document, [-100, *document[1:]], "random") for document in ids]
    return Run(config, model, Loader(data, row.tokens, True, 1, 0), 1 << 20, {}, strategy=strategy)


def our_step(run: Any, graphs: bool, stack: ExitStack) -> Callable[[], object]:
    """Return the product's update of a run, set up as train/session.py and train/loop.py do until `stack` closes."""
    from onecard.hf.attention import use_packed_attention
    from onecard.train.recompute import recompute_layers
    from onecard.train.run import make_graphs
    from onecard.train.step import optimizer_step

    recompute_layers(run.base, run.strategy, run.offload)
    run.graphs = make_graphs(run, 1 << 40) if graphs else None
    stack.enter_context(use_packed_attention(run.base))
    return lambda: optimizer_step(run)


def peer_step(model: Any, row: Row, device: torch.device) -> Callable[[], object]:
    """Return an update as peft's users write it, with torch's fused AdamW."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if row.recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    else:
        base.gradient_checkpointing_disable()
    return plain_step(model, row, device)


def plain_step(model: Any, row: Row, device: torch.device) -> Callable[[], object]:
    """Return an update of a model that computes its own loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (1, row.tokens), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measured(step: Callable[[], object], row: Row, device: torch.device) -> dict[str, Any]:
    """Return a step's median seconds, the GPU's busy seconds in one more step, and the most memory reserved."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    long = row.recompute or device.type != "cuda"  # no graph of it is captured, which the first rounds do
    seconds = clock(step, device, *((2, 1) if long else (STEPS, WARM)))
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return {"seconds": seconds, "busy": busy_seconds(step, device), "reserved": float(reserved)}


def contender_step(contender: str, model: Any, row: Row, device: torch.device) -> dict[str, Any]:
    """Measure one row of a contender."""
    if contender not in OURS:
        return measured(peer_step(model, row, device), row, device)
    from onecard.memory.inputs import MemoryStrategy

    layers = model.config.num_hidden_layers if row.recompute else 0
    with ExitStack() as stack:
        run = our_run(model, row, device, MemoryStrategy(layers))
        found = measured(our_step(run, contender != "eager", stack), row, device)
    if run.graphs is not None and run.graphs.refused:
        found["refused"] = "; ".join(run.graphs.refused.values())
    return found


def import_libraries(contender: str) -> None:
    """Import what a contender needs, before the GPU is free."""
    for name in ("peft", "transformers", "bitsandbytes" if contender == "bnb" else "onecard.infer.graphs"):
        with suppress(ImportError):
            import_module(name)


def child(shape: str, contender: str, rows: list[Row], device: torch.device) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield what is found of generation and of each row, on one model; of a row that fails, the error's first line."""
    if contender == "onecard16":
        from benchmarks.train import keep_16_bits
    model = random_model(shape, "onecard" if contender in OURS else contender, device).train()
    if contender == "onecard16":
        keep_16_bits(model)
    if contender in GENERATES:
        yield "generate", attempt(lambda: generated(model.eval(), contender, device))
        model.train()
    for row in rows:
        if contender in OURS or row.documents == 1:
            yield str(row), attempt(lambda row=row: contender_step(contender, model, row, device))
            model.zero_grad(set_to_none=True)


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `measure` returns, or {"failed": the first line of its error}."""
    try:
        return measure()
    except Exception as error:  # one row of many: the others are still measured
        return {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}


def generated(model: Any, contender: str, device: torch.device) -> dict[str, float]:
    """Return seconds of NEW_TOKENS greedy tokens after a prompt of 32: ours by its decoder, the peer by generate."""
    prompt = torch.randint(0, model.config.vocab_size, (1, 32), device=device)
    sizes = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    if contender == "bnb":
        with torch.no_grad():
            return {"seconds": clock(lambda: model.generate(input_ids=prompt, **sizes), device, 2, 1)}
    from onecard.infer.graphs import make_context

    context = make_context(model)

    def answer() -> None:
        rest = context.rewind(prompt[0].tolist())
        for _ in range(NEW_TOKENS):
            rest = [int(context.feed(rest).argmax())]

    return {"seconds": clock(answer, device, 2, 1)}


def useful_flops(shape: str, length: int) -> float:
    """Return useful operations per token: 4 N + 4 V d + 6 P + 3.5 (2 S d L). Recomputation is not useful."""
    s = SHAPES[shape]
    d, f, L = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    kv = d * s["num_key_value_heads"] // s["num_attention_heads"]
    linears = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    N, P = L * sum(a * b for a, b in linears), L * RANK * sum(a + b for a, b in linears)
    return 4 * N + 4 * s["vocab_size"] * d + 6 * P + 3.5 * 2 * length * d * L


def row_result(shape: str, row: Row, found: dict[str, Any], peak_flops: float | None) -> dict[str, Any]:
    """Return a row's speed, memory, share of the GPU's peak, and share of the time in which the GPU computes."""
    common = {"shape": shape, "row": str(row)}
    if "failed" in found:
        return {**common, **found}
    rate = row.tokens / found["seconds"]
    context = row.tokens // row.documents
    share = rate * useful_flops(shape, context) / peak_flops if peak_flops else None
    busy = found["busy"] / found["seconds"] if found["busy"] is not None else None
    numbers = {"tok_s": rate, "reserved_gb": found["reserved"] / 1e9, "mfu": share, "busy": busy}
    return {**common, **numbers, **({"refused": found["refused"]} if "refused" in found else {})}
