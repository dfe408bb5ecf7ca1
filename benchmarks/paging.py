"""A frozen base that does not fit, paged, compared with a resident one.

    python -m benchmarks.paging [--shape 8b] [--device-memory 3GiB]

The checkpoint has random weights, written directly in 4 bits (bitsandbytes' format). Each contender trains a few steps
in a process of its own on the same tokens. The losses must be equal to the bit. Memory is the peak of the process's
anonymous memory minus its value before loading: the run's own. The plan chooses from --device-memory what to recompute,
offload and page, as in `train`. Shapes too large for this machine's memory run with --only paged. Checkpoints stay in
benchmarks/.checkpoints for the next call; --remove deletes this one at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import anonymous_peak, run_child, spread, status_bytes, table, write_result
from benchmarks.shapes import CACHE, LLAMAS, TOKENIZER

RANDOM_BYTES = 1 << 26


def make_4bit_checkpoint(shape: str) -> Path:
    """Write a folder in bitsandbytes' format, one file per layer, at the disk's speed."""
    from transformers import LlamaConfig

    from onecard.config import QuantConfig
    from onecard.export.merge.quantized import quantized_shapes
    from onecard.hf.load import load_tokenizer
    from onecard.hf.writer import TensorFile

    folder, s = CACHE / f"{shape}-4bit", LLAMAS[shape]
    if (folder / "tokenizer.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    d, f, head = s["hidden_size"], s["intermediate_size"], s["hidden_size"] // s["num_attention_heads"]
    kv = head * s["num_key_value_heads"]
    linears = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    codes = torch.randint(0, 256, (RANDOM_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    places: dict[str, str] = {}
    for number in range(s["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        tensors: dict[str, Any] = {}
        for name, size in linears.items():
            tensors |= quantized_shapes(f"{prefix}{name}.weight", size, QuantConfig())
        norms = [f"{prefix}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
        tensors |= {name: ("BF16", (d,)) for name in norms}
        path = f"layer-{number:03d}.safetensors"
        file = TensorFile(folder / path, tensors)
        for name, size in linears.items():
            write_random_weight(file, f"{prefix}{name}.weight", size, codes)
        for name in norms:
            file.append(name, torch.ones(d, dtype=torch.bfloat16))
        file.close()
        places |= dict.fromkeys(tensors, path)
    ends = {"model.embed_tokens.weight": (s["vocab_size"], d), "lm_head.weight": (s["vocab_size"], d)}
    file = TensorFile(
        folder / "ends.safetensors", {n: ("BF16", z) for n, z in ends.items()} | {"model.norm.weight": ("BF16", (d,))}
    )
    for name, (rows, width) in ends.items():
        for first in range(0, rows, 4096):
            count = min(4096, rows - first)
            file.append(name, (0.02 * torch.randn(count, width)).bfloat16())
    file.append("model.norm.weight", torch.ones(d, dtype=torch.bfloat16))
    file.close()
    places |= dict.fromkeys([*ends, "model.norm.weight"], "ends.safetensors")
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer = load_tokenizer(str(TOKENIZER))
    config = LlamaConfig(max_position_embeddings=8192, tie_word_embeddings=False, **s).to_dict()
    config |= {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"], "bos_token_id": tokenizer.bos_token_id}
    config |= {"eos_token_id": tokenizer.eos_token_id}
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder


def write_random_weight(file: Any, name: str, size: tuple[int, int], codes: torch.Tensor) -> None:
    """Write random codes, and scales between 2 / sqrt(K) and 3 / sqrt(K), so that activations stay of order one."""
    from onecard.export.merge.quantized import STATE_BYTES
    from onecard.quant.codebook import dynamic_map, quant_map

    N, K = size
    blocks, left = N * K // 64, N * K // 2
    while left:
        file.append(name, codes[: min(left, RANDOM_BYTES)])
        left -= min(left, RANDOM_BYTES)
    for start in range(0, blocks, RANDOM_BYTES):
        file.append(f"{name}.absmax", codes[: min(RANDOM_BYTES, blocks - start)])
    offset = 2.5 / K**0.5
    file.append(f"{name}.quant_map", quant_map("nf4", "cpu"))
    file.append(f"{name}.nested_absmax", torch.full((-(-blocks // 256),), offset / 5))
    file.append(f"{name}.nested_quant_map", dynamic_map("cpu"))
    facts = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K], "nested_blocksize": 256,
             "nested_dtype": "float32", "nested_offset": offset}  # fmt: skip
    file.append(f"{name}.quant_state.bitsandbytes__nf4", json.dumps(facts).encode().ljust(STATE_BYTES))


def child(args: argparse.Namespace) -> None:
    """Train with onecard's own loop and print the measurements."""
    from peft import get_peft_model

    import onecard
    from onecard.adapter.layers import lora_config
    from onecard.config import TrainConfig, make_config, parse_bytes
    from onecard.data.chat.mask import Example
    from onecard.data.loader import Loader
    from onecard.hf.attention import use_packed_attention
    from onecard.hf.checkpoint import inspect_checkpoint
    from onecard.hf.skeleton import read_model
    from onecard.memory.inputs import PlanInputs
    from onecard.memory.measure import return_large_blocks
    from onecard.memory.strategy import describe, strategy_within, total_bytes
    from onecard.train.recompute import recompute_layers
    from onecard.train.run import Run
    from onecard.train.step import optimizer_step

    folder = make_4bit_checkpoint(args.shape)
    return_large_blocks()
    before = status_bytes("RssAnon")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(4, LLAMAS[args.shape]["vocab_size"], (args.steps, args.length), generator=generator).tolist()
    fields = {
        "model": str(folder), "data": "-", "output": "-", "r": args.rank,
        "max_seq_length": args.length, "max_steps": args.steps, "gradient_accumulation_steps": 1, "packing": False,
        "optim": args.optim,
    }  # fmt: skip
    config = make_config(TrainConfig, fields, "benchmark")
    limit, inputs = (
        parse_bytes(args.device_memory),
        PlanInputs(read_model(inspect_checkpoint(folder)), config, torch.bfloat16),
    )
    strategy = strategy_within(inputs, limit)
    assert total_bytes(inputs, strategy) <= limit, describe(strategy, inputs.model)
    if args.child == "resident":  # everything else stays the same
        strategy = replace(strategy, weights_budget=None, offload_optimizer_states=False, num_offloaded=0)
    planned = total_bytes(inputs, strategy)
    with anonymous_peak() as peak, tempfile.TemporaryDirectory() as output:
        begin = time.perf_counter()
        budget = strategy.weights_budget
        base = onecard.load_model(str(folder), compute_dtype=torch.bfloat16, device="cpu", weights_budget=budget)
        load = time.perf_counter() - begin
        torch.manual_seed(0)
        model: Any = get_peft_model(base, lora_config(config))
        loader = Loader([Example(row, row, "random") for row in rows], args.length, False, 1, 0)
        run = Run(config.model_copy(update={"output": output}), model, loader, args.steps, {}, strategy=strategy)
        model.train()
        recompute_layers(run.base, strategy, run.offload)
        with use_packed_attention(run.base):
            steps = [optimizer_step(run) for _ in range(args.steps)]
    found: dict[str, Any] = {"seconds": [s["seconds"] for s in steps], "losses": [s["loss"] for s in steps]}
    found |= {"load": load, "fit": describe(strategy, inputs.model), "plan": planned, "pages": vars(run.paged)}
    print(json.dumps({**found, "peak": peak[0] - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=LLAMAS, default="1b")
    parser.add_argument("--device-memory", default="1GiB", help="what the paged run may take; the plan chooses how")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optim", default="adamw")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=("resident", "paged"), default=["resident", "paged"])
    parser.add_argument("--remove", action="store_true", help="delete the checkpoint at the end")
    parser.add_argument("--child", choices=("resident", "paged"))
    args = parser.parse_args()
    if args.child:
        return child(args)
    make_4bit_checkpoint(args.shape)
    common = [f"--{name}={getattr(args, name)}" for name in ("shape", "length", "steps", "rank", "optim")]
    common.append(f"--device-memory={args.device_memory}")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    for _ in range(args.rounds):
        for name in args.only:
            runs[name].append(run_child("benchmarks.paging", "--child", name, *common))
            print(name, json.dumps(runs[name][-1]), flush=True)
    speeds = {name: [args.length / s for r in found for s in r["seconds"][1:]] for name, found in runs.items()}
    lines = []
    for name, found in runs.items():
        pages = found[0]["pages"]
        lines.append([
            name, spread(speeds[name] or [args.length / found[0]["seconds"][0]]),
            f"{statistics.median(r['peak'] for r in found) / 2**30:.2f}", f"{found[0]['plan'] / 2**30:.2f}",
            f"{found[0]['load']:.1f}", f"{pages['bytes_in'] / 1e9:.1f}", f"{pages['bytes_out'] / 1e9:.1f}",
            f"{pages['stall_seconds']:.1f}",
            f"{found[0]['losses'][-1]:.6f}",
        ])  # fmt: skip
    header = ["", "tok/s", "GiB over base", "planned", "load s", "GB in", "GB out", "s waited", "last loss"]
    fits = "\n".join(f"- {name}: {found[0]['fit']}" for name, found in runs.items())
    notes = ""
    if len(runs) == 2:
        equal = runs["resident"][0]["losses"] == runs["paged"][0]["losses"]
        ratio = statistics.median(speeds["paged"]) / statistics.median(speeds["resident"])
        notes = f"Losses equal to the bit: {equal}. Paged runs at {ratio:.0%} of the resident speed."
    body = (
        f"{args.shape} Llama shape in 4 bits, {args.length} tokens a step, rank {args.rank}, {args.optim}; the paged "
        f"run within {args.device_memory}, the other with as many layers recomputed; the first of {args.steps} steps "
        f"left out of the speed.\n\n{fits}\n\n"
        f"{table(header, lines)}\n\n{notes}"
    )
    print(write_result(f"paging_{args.shape}", "A base that is paged", body))
    if args.remove:
        shutil.rmtree(CACHE / f"{args.shape}-4bit")


if __name__ == "__main__":
    main()
