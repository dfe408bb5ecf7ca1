"""DPO on a real model: onecard, and trl's DPOTrainer with peft and bitsandbytes; and onecard's own SFT at equal tokens.

    python -m benchmarks.preference [--pairs 3] [--steps 6] [--rounds 3]

The model is that of `benchmarks.real`. A pair is a question of GSM8K with its own answer and that of the next question.
Every step has all pairs, so that all contenders read the same tokens in every step. Both start from the same adapter.
onecard computes the reference before the training, trl in the step: the defaults. The norms of the gradients of step 1
can be held to a plain float32 model: LOG.md has one.
onecard's SFT learns the same documents, chosen and rejected alike. Each run is a process of its own, in turn, with all
activations kept and with recomputation. The machine may be busy: compare the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import MB, run_child, status_bytes, table, write_result
from benchmarks.real import DATA, make_model
from benchmarks.train import RANK

CONTENDERS = {"dpo": "onecard, DPO", "trl": "trl, peft, bitsandbytes, DPO", "sft": "onecard, SFT"}
SETTINGS = ("keep", "recompute")
RATE, LENGTH, SEED = 1e-4, 512, 42


def pairs(count: int) -> list[dict[str, str]]:
    """Return text rows. The prompt ends with a line break, where all tokenizers of both tools cut alike."""
    lines = (DATA / "train_300.jsonl").read_text(encoding="utf-8").splitlines()[: count + 1]
    rows = [json.loads(line) for line in lines]
    return [
        {"prompt": f"{row['question']}\n", "chosen": row["answer"], "rejected": other["answer"]}
        for row, other in zip(rows, rows[1:])
    ]


def run_onecard(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    import onecard

    rows = pairs(args.pairs)
    if args.child == "sft":
        answers = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in answers]
    data = Path(folder) / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = onecard.TrainConfig(
        model=str(make_model()),
        data=str(data),
        output=f"{folder}/run",
        loss=args.child,
        r=RANK,
        lora_alpha=2 * RANK,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        max_seq_length=LENGTH,
        packing=False,
        per_device_train_batch_size=len(rows),
        gradient_accumulation_steps=1,
        gradient_checkpointing=args.recompute,
        max_steps=args.steps,
        sample_prompts=[],
        compute_dtype="bfloat16",
        seed=SEED,
        device="cpu",
    )
    before = status_bytes("VmRSS")
    found = onecard.train(config).metrics
    return {
        "seconds": [row["seconds"] for row in found],
        "losses": [row["loss"] for row in found],
        "margins": [row.get("rewards/margins", 0.0) for row in found],
        "norms": [row["grad_norm"] for row in found],
        "before": before,
    }


def run_trl(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **rest: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *arguments: Any, **rest: Any) -> None:
            seconds.append(time.perf_counter() - self.begin)

    before = status_bytes("VmRSS")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    checkpoint = make_model()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, quantization_config=quantization)
    settings = DPOConfig(
        output_dir=f"{folder}/trl",
        max_steps=args.steps,
        per_device_train_batch_size=args.pairs,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_length=LENGTH,
        gradient_checkpointing=args.recompute,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=True,
        disable_tqdm=True,
    )
    torch.manual_seed(SEED)  # peft's start of the adapter is the next to draw from it, as in onecard
    trainer = DPOTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(pairs(args.pairs)),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    names = {"losses": "loss", "margins": "rewards/margins", "norms": "grad_norm"}
    found = {what: [row[name] for row in rows] for what, name in names.items()}
    return {"seconds": seconds, **found, "before": before}


def child(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = (run_trl if args.child == "trl" else run_onecard)(args, folder)
    print(json.dumps({**found, "peak": status_bytes("VmHWM")}))


def num_tokens(count: int) -> int:
    """Count the tokens of a step."""
    from onecard.data.chat.mask import encode_pair
    from onecard.hf.load import load_tokenizer

    tokenizer = load_tokenizer(str(make_model()))
    answers = [(row["prompt"], row[side]) for row in pairs(count) for side in ("chosen", "rejected")]
    return sum(len(encode_pair(prompt, answer, tokenizer, "row", LENGTH)[0][:LENGTH]) for prompt, answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--child", choices=CONTENDERS)
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    if args.child:
        return child(args)
    make_model()
    tokens, runs = num_tokens(args.pairs), {}
    for number in range(args.rounds):
        for setting in args.settings:
            for name in CONTENDERS:
                extra = ["--recompute"] if setting == "recompute" else []
                common = ["--pairs", str(args.pairs), "--steps", str(args.steps)]
                found = run_child("benchmarks.preference", "--child", name, *common, *extra)
                runs.setdefault((name, setting), []).append(found)
                speed = tokens / statistics.median(found["seconds"][1:])
                print(f"round {number + 1}  {name:4s} {setting:10s} {speed:7.1f} tok/s  {found['peak'] / MB:7.0f} MB",
                      [round(loss, 4) for loss in found["losses"]], flush=True)  # fmt: skip
    print(report(args, tokens, runs))


def report(args: argparse.Namespace, tokens: int, runs: dict[tuple[str, str], list[dict[str, Any]]]) -> Path:
    """Write the ratios and the losses of the steps."""
    seconds = {key: statistics.median(s for run in found for s in run["seconds"][1:]) for key, found in runs.items()}
    peak = {key: statistics.median(run["peak"] for run in found) for key, found in runs.items()}
    own = {key: statistics.median(run["peak"] - run["before"] for run in found) for key, found in runs.items()}
    lines = []
    for setting in args.settings:
        for other in ("trl", "sft"):
            one, two = ("dpo", setting), (other, setting)
            ratios = (seconds[two] / seconds[one], peak[one] / peak[two], own[one] / own[two])
            lines.append([CONTENDERS[other], setting, *(f"{ratio:.2f}x" for ratio in ratios), f"{peak[one] / MB:,.0f}"])
    header = ["onecard's DPO against", "activations", "speed", "peak", "peak above the libraries", "its peak, MB"]
    losses = []
    for setting in args.settings:
        for name in ("dpo", "trl"):
            for what in ("losses", "margins", "norms"):
                values = [f"{value:.4f}" for value in runs[name, setting][0][what]]
                losses.append([CONTENDERS[name], setting, what, *values])
    steps = [f"step {i + 1}" for i in range(args.steps)]
    body = (
        f"SmolLM2-135M-Instruct, {args.pairs} pairs of GSM8K, {tokens:,} tokens a step, rank {RANK} on all linears, "
        f"bfloat16; medians of {args.rounds} processes of {args.steps} steps each, the first step left out. The "
        f"machine was busy: only the ratios are of use. Speed is of the steps. onecard's reference is computed before "
        f"them, trl's in them.\n"
        f"\n{table(header, lines)}\n\n{table(['', 'activations', '', *steps], losses)}"
    )
    return write_result("preference", "DPO, side by side", body)


if __name__ == "__main__":
    main()
