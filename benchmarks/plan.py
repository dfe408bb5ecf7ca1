"""The memory plan against what is then measured, on the CPU: python -m benchmarks.plan [--only llama-keep ...]

Each configuration trains two updates, or generates, in a process of its own. Measured is the process's anonymous
memory at its peak over what it had before loading, and the resident pages of its mappings of the checkpoint's files.
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

from benchmarks.measure import MB, anonymous_peak, mapped_bytes, run_child, status_bytes, table, write_result
from benchmarks.shapes import TOKENIZER

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
    "llama-split": ("llama", WIDE, {"per_device_train_batch_size": 4, "part_tokens": 1024}),
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


def make_checkpoint(name: str, folder: Path) -> None:
    """A checkpoint of the configuration's family and shape with random weights, in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from onecard.hf.load import load_tokenizer

    family, shape, _ = CONFIGURATIONS[name]
    fields = {**shape, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "phi3":
        fields.pop("head_dim")
    config = AutoConfig.for_model(family, **fields)
    config.dtype = torch.bfloat16
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(str(TOKENIZER)).save_pretrained(folder)


def child(name: str, folder: str) -> None:
    from peft import get_peft_model

    import onecard
    from onecard.config import TrainConfig, make_config, parse_bytes
    from onecard.data.loader import Loader
    from onecard.data.template import Example
    from onecard.hf.attention import supports_packing, use_packed_attention
    from onecard.hf.checkpoint import inspect_checkpoint
    from onecard.hf.load import pick_compute_dtype
    from onecard.memory.case import Case, Fit
    from onecard.memory.measure import return_large_blocks
    from onecard.memory.model import read_model
    from onecard.memory.terms import plan_terms
    from onecard.nn.lora import lora_config
    from onecard.train.loss import packed_loss, plain_loss
    from onecard.train.step import Run, recompute_layers, update

    device = torch.device("cpu")
    _, shape, settings = CONFIGURATIONS[name]
    settings = dict(settings)
    method, given_up = settings.pop("method", "qlora"), {"num_offloaded", "part_tokens"} & settings.keys()
    given = {key: settings.pop(key) for key in given_up}
    fields = {"model": folder, "data": "-", "output": folder, "max_seq_length": 512, "packing": False,
              "gradient_accumulation_steps": 1, "gradient_checkpointing": False, **settings}  # fmt: skip
    config = make_config(TrainConfig, fields, "benchmark")
    dtype = pick_compute_dtype(config.compute_dtype, device)
    model = read_model(inspect_checkpoint(Path(folder)))
    budget = parse_bytes(config.weights_budget) if config.weights_budget else None
    fit = Fit(shape["num_hidden_layers"] if config.gradient_checkpointing else 0, budget, **given)
    return_large_blocks()  # as train does
    terms = plan_terms(Case(model, config, dtype), method, fit)
    before = status_bytes("RssAnon")
    with anonymous_peak() as peak:
        base = onecard.load_model(folder, compute_dtype=dtype, device="cpu", weights_budget=budget)
        adapted: Any = get_peft_model(base, lora_config(config, base))
        length, batch = config.max_seq_length, config.per_device_train_batch_size
        rows = torch.randint(4, shape["vocab_size"], (2 * batch, length)).tolist()
        loader = Loader([Example(row, row, "random") for row in rows], length, False, batch, 0)
        if method == "generate":
            adapted.generate(torch.tensor([rows[0][:-4]]), max_new_tokens=4, do_sample=False, eos_token_id=[])
        else:
            packs = supports_packing(base)
            run = Run(config, adapted, loader, 2, {}, packed_loss if packs else plain_loss, fit=fit)
            adapted.train()
            recompute_layers(run.base, fit.num_recomputed, run.offload, fit.num_offloaded)
            with use_packed_attention(run.base) if packs else nullcontext():
                for _ in range(2):
                    update(run)
    measured = peak[0] - before + mapped_bytes(Path(folder))
    found = {term.name: term.num_bytes for term in terms}
    print(json.dumps({"plan": sum(found.values()), "terms": found, "measured": measured}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--child", choices=CONFIGURATIONS)
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.folder)
    lines, errors = [], {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            maker = Process(target=make_checkpoint, args=(name, Path(folder)))  # whose memory is not the child's
            maker.start()
            maker.join()
            found = run_child("benchmarks.plan", "--child", name, "--folder", folder)
        errors[name] = found["plan"] / found["measured"] - 1
        family, shape, settings = CONFIGURATIONS[name]
        size = f"{family}, {shape['num_hidden_layers']} x {shape['hidden_size']}, V {shape['vocab_size']:,}"
        line = [name, size, ", ".join(f"{k}={v}" for k, v in settings.items()), f"{found['plan'] / MB:,.0f}"]
        lines.append([*line, f"{found['measured'] / MB:,.0f}", f"{errors[name]:+.1%}"])
        print(" | ".join(lines[-1]), json.dumps({k: round(v / MB) for k, v in found["terms"].items()}), flush=True)
    worst = max(errors, key=lambda name: abs(errors[name]))
    within = sum(abs(error) <= 0.08 for error in errors.values())
    header = ["", "model", "settings (512 tokens, rank 16, all kept unless said)", "plan, MB", "measured, MB", "error"]
    body = f"{table(header, lines)}\n\nWithin 8 %: {within} of {len(lines)}. Worst: {worst}, {errors[worst]:+.1%}."
    if len(args.only) == len(CONFIGURATIONS):
        print(write_result("plan_cpu", "The memory plan against measurement", body))


if __name__ == "__main__":
    main()
