"""All tests and benchmarks of a GPU in one call under ten minutes: python -m benchmarks.gpu [--lengths 512 2048 8192]

1. the suite's GPU tests; 2. each kernel compared with the speed of a plain copy, or of a bfloat16 product, and with
bitsandbytes; 3. whole training steps on 1B- and 8B-shaped random weights: onecard with CUDA graphs and without,
bitsandbytes+peft, LoRA on a 16-bit base with peft and with onecard's own step, each in a process of its own: tokens a
second, peak memory, model FLOP utilization on useful FLOPs; and tokens generated a second; 4. what fits under a cap
(gpu_memory.py). A part that has not begun after --minutes does not run, and the result says so.

The processes of part 3 start and import at the beginning. They use the GPU only after the parent sends a line.

Results go to results/gpu_<device>_<date>.json and .md. On a machine without a GPU, --dry-run checks the script's logic
on the CPU with a tiny shape.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import RESULTS, table

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
CONTENDERS = ("onecard", "bnb", "eager", "lora", "onecard16")  # eager: onecard without CUDA graphs
GENERATES = ("onecard", "bnb")
OURS = ("onecard", "eager", "onecard16")
RANK, STEPS, NEW_TOKENS = 16, 4, 32
CASES = ("7b", "8b-context", "123b")
GPU_TESTS = [
    f"tests/{name}.py" for name in ("kernels/test_triton", "train/test_gpu", "nn/test_experts", "infer/test_graphs")
]
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}  # dense bfloat16


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
    return statistics.median(times)


def kernel_clock(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds on the device, with cold caches."""
    if device.type != "cuda":
        return clock(call, device)
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=30, return_mode="median") / 1e3  # type: ignore


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def kernels(device: torch.device, N: int, K: int) -> list[dict[str, Any]]:
    """Return each kernel's time, and its speed as a share of a plain copy's or a bfloat16 product's speed."""
    from onecard.kernels import elementwise, ops
    from onecard.kernels.backend import backend
    from onecard.kernels.reference import Rates
    from onecard.quant.dynamic import zeros_8bit
    from onecard.quant.state import PackedWeight

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    W, copy = random(N, K), random(N, K)
    packed, state = ops.quantize_4bit(W)
    weight = PackedWeight.of(packed, state)
    speed = 2 * W.nbytes / kernel_clock(lambda: copy.copy_(W), device)
    stored = packed.nbytes + state.nbytes
    logits, target = random(512, 32000), torch.randint(0, 32000, (512,), device=device)
    x, norm, gate, up = random(512, K), random(K), random(512, N), random(512, N)
    A, B = random(RANK, K, dtype=torch.float32), random(N, RANK, dtype=torch.float32)
    heads, angles = random(1, 512, 32, 128).transpose(1, 2), random(1, 512, 128)
    w, g = random(N, K, dtype=torch.float32), random(N, K, dtype=torch.float32)
    states = (*zeros_8bit(w.numel(), device, True), *zeros_8bit(w.numel(), device, False))
    rates = Rates.of(9, 1e-4, (0.9, 0.999), 1e-8, 0.0)
    codec = backend(device).codec
    found: list[tuple[str, Callable[[], object], int]] = [
        ("quantize", lambda: ops.quantize_4bit(W), W.nbytes + stored),
        ("dequantize, reused buffer", lambda: codec.dequantize_into(weight, copy), stored + W.nbytes),
        ("cross-entropy 512 x 32000", lambda: ops.cross_entropy_(logits, target), 3 * logits.nbytes),
        ("RMSNorm, 512 rows", lambda: elementwise.rms_norm(x, norm, 1e-5), 2 * x.nbytes),
        ("SwiGLU, 512 rows", lambda: elementwise.swiglu(gate, up), 3 * gate.nbytes),
        ("rotary positions, 512 x 32 heads", lambda: elementwise.rope(heads, angles, angles), 2 * heads.nbytes),
        ("AdamW, 8-bit states", lambda: ops.adamw_8bit_([(w, g, *states)], rates), 3 * w.nbytes + w.numel() * 4),
    ]
    for M in (1, 4, 16):
        y = random(M, K)
        found.append((f"product of {M} rows", lambda y=y: ops.qlora_linear(y, packed, state), stored))
        with_lora = lambda y=y: ops.qlora_linear(y, packed, state, None, A, B, 2.0)  # noqa: E731
        found.append((f"product of {M} rows with LoRA", with_lora, stored + A.nbytes + B.nbytes))
    results = []
    for name, call, num_bytes in found:
        seconds = kernel_clock(call, device)
        results.append({"kernel": f"{name}, {N}x{K}", "ms": seconds * 1e3, "of_floor": num_bytes / seconds / speed})
    for M in (512, 2048):
        y = random(M, K)
        plain = kernel_clock(lambda y=y: y @ W.T, device)
        seconds = kernel_clock(lambda y=y: ops.qlora_linear(y, packed, state, None, A, B, 2.0), device)
        name = f"dequantize, product and LoRA of {M} rows, {N}x{K}"
        results.append({"kernel": name, "ms": seconds * 1e3, "of_floor": plain / seconds})
    return results + peer_kernels(device, W)


def peer_kernels(device: torch.device, W: torch.Tensor) -> list[dict[str, Any]]:
    """Return the times of three of bitsandbytes' kernels, if it is installed."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return []
    packed, state = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    x = torch.randn(1, W.shape[1], device=device, dtype=torch.bfloat16)
    import bitsandbytes as package

    calls = {
        "quantize": lambda: bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=True),
        "dequantize": lambda: bnb.dequantize_4bit(packed, state),
        "product of 1 row": lambda: package.matmul_4bit(x, packed.t(), quant_state=state),  # type: ignore
    }
    shape = f"{W.shape[0]}x{W.shape[1]}"
    return [{"kernel": f"bitsandbytes {n}, {shape}", "ms": kernel_clock(c, device) * 1e3} for n, c in calls.items()]


def random_model(shape: str, contender: str, device: torch.device, share: bool = False, **fields: int) -> Any:
    """Return a Llama of random weights on the device, with the contender's kind of linears and with adapters.

    With `share`, linears of one shape share a weight. `fields` replace the shape's.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes: dict[str, Any] = {**SHAPES[shape], **fields}
    config = LlamaConfig(max_position_embeddings=16384, tie_word_embeddings=False, **sizes)
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
        from onecard.adapter.layers import register_fused
        from onecard.hf.fusion import fuse

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


def steps(shape: str, contender: str, length: int, device: torch.device, model: Any) -> dict[str, float]:
    """Return a step's median seconds and allocator peak. Ours uses its own loss and attention, a peer the model's."""
    from onecard.hf.attention import use_packed_attention
    from onecard.memory.inputs import MemoryStrategy
    from onecard.optim.adamw import AdamW
    from onecard.train.graphs import DecoderGraphs
    from onecard.train.loss import decode, head_loss
    from onecard.train.recompute import recompute_layers

    ours, base = contender in OURS, model.get_base_model()
    recompute_layers(base, MemoryStrategy(SHAPES[shape]["num_hidden_layers"] if recomputes(length) else 0))
    trainable = [p for p in model.parameters() if p.requires_grad]
    graphed = ours and contender != "eager" and not recomputes(length) and device.type == "cuda"
    graphs = DecoderGraphs(base, trainable, 1 << 40) if graphed else None
    optimizer = AdamW(trainable, lr=1e-4) if ours else torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (1, length), device=device)
    at = torch.arange(length, device=device)
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": at[None], "supervised": (at[:-1], ids[0, 1:])}
    batch["cu_seqlens"] = [0, length]

    def step() -> None:
        if graphs is not None:
            graphs.attach_gradients()
        if ours:
            hidden = decode(base, batch) if graphs is None else graphs(batch)
            loss = head_loss(base, hidden, batch, length - 1)
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with use_packed_attention(base) if ours else nullcontext():
        seconds = clock(step, device, *((2, 1) if recomputes(length) else (STEPS, 3)))
    if graphs is not None and graphs.refused:
        raise RuntimeError("; ".join(graphs.refused.values()))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"seconds": seconds, "peak": float(peak)}


def recomputes(length: int) -> bool:
    """Whether layers are recomputed at this length, in all contenders."""
    return length >= 8192


def child(shape: str, contender: str, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Return the steps of each length on one model; for a length that fails (out of memory), the error's first line."""
    for name in ("peft", "transformers", "bitsandbytes" if contender == "bnb" else "onecard.infer.graphs"):
        with suppress(ImportError):
            import_module(name)
    if contender == "onecard16":
        from benchmarks.train import keep_16_bits
    sys.stdin.readline()  # wait until the parent releases the GPU
    model = random_model(shape, "onecard" if contender in OURS else contender, device).train()
    if contender == "onecard16":
        keep_16_bits(model)
    found: dict[str, Any] = {}
    if contender in GENERATES:
        found["generate"] = generated(model.eval(), contender, device)
        model.train()
    for length in lengths:
        try:
            found[str(length)] = steps(shape, contender, length, device, model)
        except RuntimeError as error:
            found[str(length)] = {"failed": str(error).strip().splitlines()[0][:200]}
            model.zero_grad(set_to_none=True)
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="of gpu_memory.py")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing new begins")
    parser.add_argument("--dry-run", action="store_true", help="the CPU and a tiny shape; nothing is written")
    parser.add_argument("--child", nargs=2, metavar=("SHAPE", "CONTENDER"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.dry_run else "cpu")
    if args.child:
        shape, contender = args.child
        print(json.dumps(child(shape, contender, args.lengths, device)))
        return
    if device.type == "cpu" and not args.dry_run:
        sys.exit("no GPU here; --dry-run checks the script")
    if args.dry_run:
        args.shapes, args.lengths = ["tiny"], [64, 96]
    for found in measure_all(args, device):
        if not args.dry_run:
            print(write(found), flush=True)


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the results so far after each part. A part that would begin after --minutes is skipped."""
    deadline = time.monotonic() + 60 * args.minutes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "tests": None, "steps": [], "memory": []}
    found["generate"] = []
    dry = ["--dry-run"] if args.dry_run else []
    pairs = sorted(product(args.contenders, args.shapes), key=lambda pair: CONTENDERS.index(pair[0]) // 2)
    pairs = [(shape, contender) for contender, shape in pairs]
    lengths = [*dry, "--lengths", *map(str, args.lengths)]
    waiting = [start("benchmarks.gpu", *lengths, "--child", *pair) for pair in pairs]
    if device.type == "cuda" and not args.no_tests:
        together = ["-n", "auto"] if find_spec("xdist") else []
        suite = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *together, *GPU_TESTS]
        done = subprocess.run(suite, capture_output=True, text=True)
        print(done.stdout[-6000:], flush=True)
        found["tests"] = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    sizes = [(256, 128)] if args.dry_run else [(5632, 2048), (14336, 4096)]
    found["kernels"] = [row for N, K in sizes for row in kernels(device, N, K)]
    yield found
    for (shape, contender), running in zip(pairs, waiting):
        row = {"shape": shape, "contender": contender}
        measured = in_time(deadline, running)
        if contender in GENERATES:
            seconds = measured.get("generate", {}).get("seconds")
            rate = {"tok_s": NEW_TOKENS / seconds} if seconds else {"failed": measured.get("failed", "")}
            found["generate"].append({**row, **rate})
            print(found["generate"][-1], flush=True)
        for length in args.lengths:
            found["steps"].append({**row, **step_row(shape, length, measured.get(str(length), measured), name)})
            print(found["steps"][-1], flush=True)
        yield found
    for case in args.cases:
        running = start("benchmarks.gpu_memory", *dry, "--case", case)
        found["memory"].append({"case": case, **in_time(deadline, running)})
        print(found["memory"][-1], flush=True)
        yield found


def start(module: str, *arguments: str) -> subprocess.Popen:
    """Start a child that waits for a line before it uses the GPU."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", module, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def in_time(deadline: float, child: subprocess.Popen) -> dict[str, Any]:
    """Return a child's results; or its last error line (out of memory, not installed), or that no time was left."""
    if time.monotonic() > deadline:
        child.kill()
        return {"failed": "not run: the time was over"}
    output, errors = child.communicate("go\n")
    if child.returncode:
        return {"failed": (errors.strip().splitlines() or [f"exit {child.returncode}"])[-1][:200]}
    return json.loads(output.splitlines()[-1])


def step_row(shape: str, length: int, measured: dict[str, Any], name: str) -> dict[str, Any]:
    """Return one length's speed, memory and share of the GPU's peak."""
    if "failed" in measured:
        return {"length": length, **measured}
    rate = length / measured["seconds"]
    limit = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    share = rate * useful_flops(shape, length) / limit if limit else None
    numbers = {"tok_s": rate, "peak_gb": measured["peak"] / 1e9, "mfu": share}
    return {"length": length, "recompute": recomputes(length), **numbers}


def write(found: dict[str, Any]) -> Path:
    """Write the JSON and the Markdown. Return the Markdown's path."""
    stem = re.sub(r"\W+", "-", found["device"].lower())
    path = RESULTS / f"gpu_{stem}_{time.strftime('%Y-%m-%d')}"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(found))
    return path.with_suffix(".md")


def markdown(found: dict[str, Any]) -> str:
    """Format four tables: kernels, steps, generation, memory."""
    rows = [
        [r["kernel"], f"{r['ms']:.3f}", f"{r['of_floor']:.0%}" if "of_floor" in r else ""] for r in found["kernels"]
    ]
    lines = [f"# {found['device']}", f"torch {found['torch']}; GPU tests: {found['tests']}"]
    lines += [table(["kernel", "ms", "of its floor"], rows)]
    cells = []
    for r in found["steps"]:
        numbers = [r["failed"], "", ""] if "failed" in r else [
            f"{r['tok_s']:,.0f}", f"{r['peak_gb']:.1f}", f"{r['mfu']:.0%}" if r["mfu"] else "",
        ]  # fmt: skip
        cells.append([r["shape"], str(r["length"]), r["contender"], "yes" if r.get("recompute") else "no", *numbers])
    lines += [table(["shape", "tokens", "", "recompute", "tok/s", "peak GB", "MFU"], cells)]
    rates = [[r["shape"], r["contender"], r.get("failed") or f"{r['tok_s']:.1f}"] for r in found["generate"]]
    lines += [table(["shape", "generate", "tok/s"], rates)]
    lines += [table(["case", "found"], [[r["case"], r.get("failed") or r["found"]] for r in found["memory"]])]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
