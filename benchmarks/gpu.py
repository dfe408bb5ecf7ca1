"""Everything that needs a GPU in one call under ten minutes: python -m benchmarks.gpu [--lengths 512 2048 8192]

1. the suite's GPU tests; 2. each kernel against the memory speed that a plain copy reaches here, and against
bitsandbytes; 3. whole training steps on 1B- and 8B-shaped random weights: onecard, bitsandbytes+peft and LoRA on a
16-bit base, each in a process of its own: tokens a second, peak memory, model FLOP utilization on useful FLOPs.

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
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.measure import RESULTS, run_child, table

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
CONTENDERS = ("onecard", "bnb", "lora")
RANK, STEPS = 16, 6
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}  # dense bfloat16


def clock(call: Callable[[], object], device: torch.device, rounds: int = 30) -> float:
    """Median seconds of a call, the device waited for."""
    times = []
    for number in range(rounds + 3):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        if number >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels(device: torch.device, N: int, K: int) -> list[dict[str, Any]]:
    """Each kernel's time, the bytes it must move, and the share of a copy's speed that this is."""
    from onecard.kernels import ops

    W = torch.randn(N, K, device=device, dtype=torch.bfloat16)
    packed, state = ops.quantize_4bit(W)
    weight = (packed, state.absmax, state.nested_absmax, state.nested_offset, state.quant_type, state.blocksize)
    copy = torch.empty_like(W)
    speed = 2 * W.nbytes / clock(lambda: copy.copy_(W), device)
    stored = packed.nbytes + state.nbytes
    logits = torch.randn(512, 32000, device=device, dtype=torch.bfloat16)
    target = torch.randint(0, 32000, (512,), device=device)
    backend = ops.backend(device)
    found = [
        ("quantize", lambda: ops.quantize_4bit(W), W.nbytes + stored),
        ("dequantize, reused buffer", lambda: backend.dequantize_into(*weight, copy), stored + W.nbytes),
        ("cross-entropy 512 x 32000", lambda: ops.cross_entropy_(logits, target), 3 * logits.nbytes),
    ]
    for M in (1, 4, 16):
        x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
        found.append((f"product of {M} rows", lambda x=x: ops.qlora_linear(x, packed, state), stored))
    results = []
    for name, call, num_bytes in found:
        seconds = clock(call, device)
        results.append({"kernel": f"{name}, {N}x{K}", "ms": seconds * 1e3, "of_copy": num_bytes / seconds / speed})
    return results + peer_kernels(device, W)


def peer_kernels(device: torch.device, W: torch.Tensor) -> list[dict[str, Any]]:
    """The same three from bitsandbytes, where it is installed."""
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
        "product of 1 row": lambda: package.matmul_4bit(x, packed.t(), quant_state=state),
    }
    shape = f"{W.shape[0]}x{W.shape[1]}"
    return [{"kernel": f"bitsandbytes {n}, {shape}", "ms": clock(c, device) * 1e3} for n, c in calls.items()]


def random_model(shape: str, contender: str, device: torch.device) -> Any:
    """A Llama of random weights made on the device, its linears in the contender's form, with adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(max_position_embeddings=16384, tie_word_embeddings=False, **SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for name, linear in linears:
        model.set_submodule(name, random_linear(linear, contender, device))
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
        from onecard.nn.fused import fuse
        from onecard.nn.lora import register_fused

        fuse(model)
        register_fused(lora)
    return get_peft_model(model, lora)


def random_linear(linear: nn.Linear, contender: str, device: torch.device) -> nn.Module:
    N, K = linear.weight.shape
    W = 0.02 * torch.randn(N, K, device=device, dtype=torch.bfloat16)
    if contender == "onecard":
        from onecard.kernels import ops
        from onecard.nn.linear import Linear4bit

        ours = Linear4bit(K, N, False, torch.bfloat16, device)
        ours.set_weight(*ops.quantize_4bit(W))
        return ours
    if contender == "bnb":
        from bitsandbytes.nn import Linear4bit as PeerLinear
        from bitsandbytes.nn import Params4bit

        peer = PeerLinear(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        peer.weight = Params4bit(W.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        return peer.to(device)
    plain = nn.Linear(K, N, bias=False, device="meta")
    plain.weight = nn.Parameter(W, requires_grad=False)
    return plain


def steps(shape: str, contender: str, length: int, recompute: bool, device: torch.device) -> dict[str, float]:
    """Median seconds of a step and the allocator's peak; ours with its own loss and attention, peers as documented."""
    from onecard.hf.attention import use_packed_attention
    from onecard.train.loss import packed_loss

    model = random_model(shape, contender, device).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=device.type == "cuda")
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (1, length), device=device)
    at = torch.arange(length, device=device)
    batch = {"input_ids": ids, "position_ids": at[None], "supervised": (at[:-1], ids[0, 1:])}
    base = model.get_base_model()

    def step() -> None:
        if contender == "onecard":
            loss = packed_loss(base, {**batch, "cu_seqlens": [0, length]}, length - 1)
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if contender == "onecard":
        with use_packed_attention(base):
            seconds = clock(step, device, STEPS)
    else:
        seconds = clock(step, device, STEPS)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"seconds": seconds, "peak": float(peak)}


def useful_flops(shape: str, length: int) -> float:
    """A token's useful operations: 4 N + 4 V d + 6 P + 3.5 (2 S d L); recomputation is not useful."""
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
    parser.add_argument("--dry-run", action="store_true", help="the CPU and a tiny shape; nothing is written")
    parser.add_argument("--child", nargs=4, metavar=("SHAPE", "CONTENDER", "LENGTH", "RECOMPUTE"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.dry_run else "cpu")
    if args.child:
        shape, contender, length, recompute = args.child
        print(json.dumps(steps(shape, contender, int(length), recompute == "True", device)))
        return
    if device.type == "cpu" and not args.dry_run:
        sys.exit("no GPU here; --dry-run checks the script")
    if args.dry_run:
        args.shapes, args.lengths = ["tiny"], [64]
    begin = time.time()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "tests": None, "steps": []}
    if device.type == "cuda":
        suite = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        done = subprocess.run(suite, capture_output=True, text=True)
        found["tests"] = (done.stdout.strip().splitlines() or ["no output"])[-1]
    sizes = [(256, 128)] if args.dry_run else [(5632, 2048), (14336, 4096)]
    found["kernels"] = [row for N, K in sizes for row in kernels(device, N, K)]
    for shape in args.shapes:
        for length in args.lengths:
            for contender in CONTENDERS:
                found["steps"].append(one_step(shape, contender, length, args.dry_run, name))
                print(found["steps"][-1], f"{time.time() - begin:.0f} s", flush=True)
    if not args.dry_run:
        write(found)


def one_step(shape: str, contender: str, length: int, dry: bool, name: str) -> dict[str, Any]:
    """One child's row; a contender that fails (out of memory, not installed) gets its last words instead."""
    row: dict[str, Any] = {"shape": shape, "contender": contender, "length": length}
    recompute = length >= 8192
    try:
        extra = ["--dry-run"] if dry else []
        measured = run_child("benchmarks.gpu", *extra, "--child", shape, contender, str(length), str(recompute))
    except RuntimeError as error:
        return {**row, "failed": str(error).strip().splitlines()[-1][:200]}
    rate = length / measured["seconds"]
    limit = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    row |= {"tok_s": rate, "peak_gb": measured["peak"] / 1e9, "recompute": recompute}
    return {**row, "mfu": rate * useful_flops(shape, length) / limit if limit else None}


def write(found: dict[str, Any]) -> None:
    """The JSON and the Markdown."""
    stem = re.sub(r"\W+", "-", found["device"].lower())
    path = RESULTS / f"gpu_{stem}_{time.strftime('%Y-%m-%d')}"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    rows = [[r["kernel"], f"{r['ms']:.3f}", f"{r['of_copy']:.0%}" if "of_copy" in r else ""] for r in found["kernels"]]
    lines = [f"# {found['device']}", f"torch {found['torch']}; GPU tests: {found['tests']}"]
    lines += [table(["kernel", "ms", "of a copy's speed"], rows)]
    cells = []
    for r in found["steps"]:
        numbers = [r["failed"], "", ""] if "failed" in r else [
            f"{r['tok_s']:,.0f}", f"{r['peak_gb']:.1f}", f"{r['mfu']:.0%}" if r["mfu"] else "",
        ]  # fmt: skip
        cells.append([r["shape"], str(r["length"]), r["contender"], "yes" if r.get("recompute") else "no", *numbers])
    lines += [table(["shape", "tokens", "", "recompute", "tok/s", "peak GB", "MFU"], cells)]
    path.with_suffix(".md").write_text("\n\n".join(lines) + "\n")
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
