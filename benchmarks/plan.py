"""The memory plan compared with measured memory, on the CPU: python -m benchmarks.plan [--only llama-keep ...]

Each configuration trains two updates, or generates, in a process of its own. `RUNS` are whole runs of `onecard train`
and `onecard demo`, with or without validation, answers to sample prompts and checkpoints. The measured value is the
peak of the process's resident memory minus its value before loading. It includes pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import nullcontext
from multiprocessing import Process
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import MB, run_child, table, write_result
from benchmarks.shapes import SHAPES, TOKENIZER

WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
DEEP = {**WIDE, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
LARGE = {**WIDE, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10, "num_attention_heads": 32}
VOCABULARY = {**WIDE, "vocab_size": 128256}
EXPERTS = {**WIDE, "num_hidden_layers": 8, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 704}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama-keep": ("llama", WIDE, {}),
    "llama-recompute": ("llama", WIDE, {"gradient_checkpointing": True}),
    "llama-2048": ("llama", WIDE, {"max_seq_length": 2048}),
    "llama-rank-128": ("llama", WIDE, {"r": 128, "gradient_checkpointing": True}),
    "llama-q-v": ("llama", WIDE, {"target_modules": ["q_proj", "v_proj"], "r": 8}),
    "llama-deep-keep": ("llama", DEEP, {"per_device_train_batch_size": 2}),
    "llama-deep-recompute": ("llama", DEEP, {"gradient_checkpointing": True, "max_seq_length": 1024}),
    "llama-large": ("llama", LARGE, {"max_seq_length": 256}),
    "llama-large-recompute": ("llama", LARGE, {"gradient_checkpointing": True, "max_seq_length": 2048}),
    "llama-large-paged": ("llama", LARGE, {"gradient_checkpointing": True, "weights_budget": "220MB"}),
    "llama-large-offload": (
        "llama",
        LARGE,
        {"gradient_checkpointing": True, "max_seq_length": 2048, "num_offloaded": 10},
    ),
    "llama-large-4096": ("llama", LARGE, {"gradient_checkpointing": True, "max_seq_length": 4096}),
    "llama-large-chunks": (
        "llama",
        LARGE,
        {"gradient_checkpointing": True, "max_seq_length": 4096, "mlp_chunk": 1024},
    ),
    "llama-4096-dropout": (
        "llama",
        WIDE,
        {"gradient_checkpointing": True, "max_seq_length": 4096, "lora_dropout": 0.1},
    ),
    "llama-chunks-dropout": (
        "llama",
        WIDE,
        {"gradient_checkpointing": True, "max_seq_length": 4096, "mlp_chunk": 1024, "lora_dropout": 0.1},
    ),
    "llama-split": ("llama", WIDE, {"per_device_train_batch_size": 4, "max_forward_tokens": 1024}),
    "llama-generate": ("llama", LARGE, {"method": "generate", "max_seq_length": 2048}),
    "llama-large-8bit": ("llama", LARGE, {"r": 64, "optim": "paged_adamw_8bit", "gradient_checkpointing": True}),
    "llama-vocabulary": ("llama", VOCABULARY, {"gradient_checkpointing": True}),
    "llama-dropout": ("llama", WIDE, {"lora_dropout": 0.1}),
    "llama-float32": ("llama", WIDE, {"compute_dtype": "float32"}),
    "mistral": ("mistral", WIDE, {"per_device_train_batch_size": 4, "max_seq_length": 256}),
    "qwen2": ("qwen2", WIDE, {}),
    "qwen3": ("qwen3", WIDE, {"gradient_checkpointing": True}),
    "phi3": ("phi3", WIDE, {}),
    "stablelm": ("stablelm", WIDE, {}),
    "llama-dora": ("llama", WIDE, {"use_dora": True}),
    "llama-saved": ("llama", WIDE, {"modules_to_save": ["lm_head"], "gradient_checkpointing": True}),
    "experts": ("qwen3_moe", EXPERTS, {}),
    "experts-recompute": ("qwen3_moe", EXPERTS, {"gradient_checkpointing": True}),
    "experts-lora": ("qwen3_moe", EXPERTS, {"target_parameters": ["gate_up_proj", "down_proj"]}),
    "gemma2": ("gemma2", WIDE, {"gradient_checkpointing": True}),
}
SMALL = {**SHAPES["135m"], "max_position_embeddings": 2048}
CHECKED = {"eval_data": "heldout.jsonl", "save_steps": 1, "eval_steps": 1}
PLAIN: dict[str, Any] = {"sample_prompts": []}
# Whole runs on the demo's data: shape, fields of TrainConfig. An empty shape means the demo's own model.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "demo": ({}, {}),  # the command, with the answers that it evaluates
    "demo-train": ({}, {"max_seq_length": 512, "max_steps": 8, **CHECKED}),
    "demo-plain": ({}, {"max_seq_length": 512, "max_steps": 8, **PLAIN}),
    "demo-unpacked": ({}, {"max_seq_length": 512, "max_steps": 8, "packing": False, **PLAIN}),
    "135m-eval": (SMALL, {"max_seq_length": 256, **CHECKED}),
    "135m-plain": (SMALL, {"max_seq_length": 256, **PLAIN}),
    "135m-samples": (SMALL, {"max_seq_length": 256}),
    "135m-512-eval": (SMALL, {"max_seq_length": 512, **CHECKED}),
    "135m-loftq": (SMALL, {"max_seq_length": 64, "init_lora_weights": "loftq", **PLAIN}),
    "135m-pissa": (SMALL, {"max_seq_length": 64, "init_lora_weights": "pissa_niter_4", **PLAIN}),
    "135m-recompute": (SMALL, {"max_seq_length": 512, "gradient_checkpointing": True, **CHECKED}),
}
DEMO = {"num_hidden_layers": 4, "hidden_size": 256, "vocab_size": 896}
ALLOWED, ALLOWED_BYTES = 0.08, 32 << 20  # an error may be one or the other


def make_checkpoint(name: str, folder: Path) -> None:
    """Write a checkpoint of the configuration's family and shape with random weights, in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from onecard.hf.load import load_tokenizer

    family, shape, _ = CONFIGURATIONS[name] if name in CONFIGURATIONS else ("llama", RUNS[name][0], {})
    fields = {**shape, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "phi3":
        fields.pop("head_dim")
    config = AutoConfig.for_model(family, **fields)
    config.dtype = torch.bfloat16
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(str(TOKENIZER)).save_pretrained(folder)


def whole_run(name: str, folder: str) -> None:
    """Run `onecard train` on some of the demo's data, or `onecard demo`, and print the numbers of its report."""
    from io import StringIO

    from rich.console import Console

    from onecard.config import TrainConfig, make_config
    from onecard.demo.run import FOLDER, run_demo
    from onecard.train.session import run_training

    shape, fields = RUNS[name]
    console, output = Console(file=StringIO()), str(Path(folder) / "run")
    if name == "demo":
        result = run_demo(output, console)
    else:
        for file, count in (("train.jsonl", 120), ("heldout.jsonl", 24)):
            rows = (FOLDER / "data" / file).read_text(encoding="utf-8").splitlines(keepends=True)
            (Path(folder) / file).write_text("".join(rows[:count]), encoding="utf-8")
        model = folder if shape else str(FOLDER / "base")
        settings = {"model": model, "data": str(Path(folder) / "train.jsonl"), "output": output, "max_steps": 2,
                    "gradient_accumulation_steps": 2, **fields}  # fmt: skip
        if "eval_data" in fields:
            settings["eval_data"] = str(Path(folder) / fields["eval_data"])
        result = run_training(make_config(TrainConfig, settings, "benchmark"), False, console)
    found = dict(result.report.memory)
    terms = {name.removeprefix("plan: "): n for name, n in found.items() if name.startswith("plan: ")}
    total = terms.pop("total")
    print(json.dumps({"plan": total, "terms": terms, "measured": found["measured: peak beside the process"]}))


def child(name: str, folder: str) -> None:
    if name in RUNS:
        return whole_run(name, folder)
    from peft import get_peft_model

    import onecard
    from onecard.adapter.layers import lora_config
    from onecard.config import TrainConfig, make_config, parse_bytes
    from onecard.data.chat.mask import Example
    from onecard.data.loader import Loader
    from onecard.hf.attention import supports_packing, use_packed_attention
    from onecard.hf.checkpoint import inspect_checkpoint
    from onecard.hf.load import pick_compute_dtype
    from onecard.hf.skeleton import read_model
    from onecard.memory.inputs import MemoryStrategy, PlanInputs
    from onecard.memory.measure import begin_peak, peak_memory_bytes, return_large_blocks
    from onecard.memory.terms import plan_terms
    from onecard.memory.workload import known
    from onecard.train.loss import packed_loss, plain_loss
    from onecard.train.recompute import recompute_layers
    from onecard.train.run import Run
    from onecard.train.step import optimizer_step

    device = torch.device("cpu")
    _, shape, settings = CONFIGURATIONS[name]
    settings = dict(settings)
    method, given_up = settings.pop("method", "qlora"), ("num_offloaded", "max_forward_tokens", "mlp_chunk")
    given = {key: settings.pop(key) for key in given_up if key in settings}
    fields = {"model": folder, "data": "-", "output": folder, "max_seq_length": 512, "packing": False,
              "gradient_accumulation_steps": 1, "gradient_checkpointing": False, **settings}  # fmt: skip
    config = make_config(TrainConfig, fields, "benchmark")
    dtype = pick_compute_dtype(config.compute_dtype, device)
    model = read_model(inspect_checkpoint(Path(folder)))
    budget = parse_bytes(config.weights_budget) if config.weights_budget else None
    strategy = MemoryStrategy(shape["num_hidden_layers"] if config.gradient_checkpointing else 0, budget, **given)
    return_large_blocks()  # as train does
    length, batch = config.max_seq_length, config.per_device_train_batch_size
    rows = torch.randint(4, shape["vocab_size"], (2 * batch, length)).tolist()
    loader = Loader([Example(row, row, "random") for row in rows], length, False, batch, 0)
    load = known(loader, 1, (), [rows[0][:-4]] if method == "generate" else [])
    terms = plan_terms(PlanInputs(model, config, dtype, load), method, strategy)
    before = begin_peak(device)
    base = onecard.load_model(folder, compute_dtype=dtype, device="cpu", weights_budget=budget)
    adapted: Any = get_peft_model(base, lora_config(config, base))
    if method == "generate":
        adapted.generate(torch.tensor([rows[0][:-4]]), max_new_tokens=4, do_sample=False, eos_token_id=[])
    else:
        packs = supports_packing(base)
        run = Run(config, adapted, loader, 2, {}, packed_loss if packs else plain_loss, strategy=strategy)
        adapted.train()
        recompute_layers(run.base, strategy, run.offload)
        with use_packed_attention(run.base) if packs else nullcontext():
            for _ in range(2):
                optimizer_step(run)
    measured = peak_memory_bytes(device) - before
    found = {term.name: term.num_bytes for term in terms}
    print(json.dumps({"plan": sum(found.values()), "terms": found, "measured": measured}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [*RUNS, *CONFIGURATIONS]
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--child", choices=names)
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.folder)
    lines, errors, within = [], {}, 0
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            if name in CONFIGURATIONS or RUNS[name][0]:
                maker = Process(target=make_checkpoint, args=(name, Path(folder)))  # keep its memory out of the child
                maker.start()
                maker.join()
            found = run_child("benchmarks.plan", "--child", name, "--folder", folder)
        errors[name] = found["plan"] / found["measured"] - 1
        is_within = abs(found["plan"] - found["measured"]) <= max(ALLOWED * found["measured"], ALLOWED_BYTES)
        within += is_within
        family, shape, settings = CONFIGURATIONS[name] if name in CONFIGURATIONS else ("llama", *RUNS[name])
        layers, hidden, vocabulary = (shape.get(key, DEMO[key]) for key in DEMO)
        size = f"{family}, {layers} x {hidden}, V {vocabulary:,}"
        line = [name, size, ", ".join(f"{k}={v}" for k, v in settings.items()), f"{found['plan'] / MB:,.0f}"]
        lines.append([*line, f"{found['measured'] / MB:,.0f}", f"{errors[name]:+.1%}"])
        print(" | ".join(lines[-1]), json.dumps({k: round(v / MB) for k, v in found["terms"].items()}), flush=True)
    worst = max(errors, key=lambda name: abs(errors[name]))
    header = ["", "model", "settings (512 tokens, rank 16, all kept unless said)", "plan, MB", "measured, MB", "error"]
    summary = f"Within 8 % or 32 MiB: {within} of {len(lines)}. Worst: {worst}, {errors[worst]:+.1%}."
    body = f"{table(header, lines)}\n\n{summary}"
    print(body)
    if args.only == names:
        print(write_result("plan_cpu", "The memory plan against measurement", body))


if __name__ == "__main__":
    main()
