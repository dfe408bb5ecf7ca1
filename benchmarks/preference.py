"""Each loss on preferences: onecard, and trl's trainer with peft and bitsandbytes; and onecard's SFT at equal tokens.

    python -m benchmarks.preference [--losses dpo ipo orpo kto simpo] [--pairs 1] [--steps 3] [--rounds 1]

The model is that of `benchmarks.real`. A pair is a question of GSM8K with its own answer and that of the next question.
Every step has all pairs, so that all contenders read the same tokens in every step. All start from the same adapter.
onecard computes the reference before the training, trl in the step: the defaults. In bfloat16 the later losses are not
those of trl, because peft rounds the adapter's output away (LOG.md, 2026-11-27). So each loss also runs in float32,
over bitsandbytes' 4-bit weights in trl: these losses are compared. Peaks and speeds are those of bfloat16.
onecard's SFT learns the same documents, chosen and rejected alike. Each run is a process of its own, in turn. The
machine may be busy: compare the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.measure import MB, run_child, status_bytes, table, write_result
from benchmarks.real import DATA, make_model
from benchmarks.train import RANK

# loss: trl's trainer, and the settings that are not the defaults of both tools
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("trl.DPO", {}),
    "ipo": ("trl.DPO", {"loss_type": ["ipo"]}),
    "orpo": ("trl.experimental.orpo.ORPO", {}),
    "kto": ("trl.KTO", {}),
    "simpo": ("trl.experimental.cpo.CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
}
RATE, LENGTH, SEED = 1e-4, 512, 42
GOAL = 1.1
NAMES = ("onecard", "trl")
Dtype = Literal["bfloat16", "float32"]


def pairs(count: int) -> list[dict[str, Any]]:
    """Return text rows. The prompt ends with a line break, where all tokenizers of both tools cut alike."""
    lines = (DATA / "train_300.jsonl").read_text(encoding="utf-8").splitlines()[: count + 1]
    rows = [json.loads(line) for line in lines]
    return [
        {"prompt": f"{row['question']}\n", "chosen": row["answer"], "rejected": other["answer"]}
        for row, other in zip(rows, rows[1:])
    ]


def answers(count: int) -> list[dict[str, Any]]:
    """Return the same documents as single answers with a label."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs(count)
        for side in ("chosen", "rejected")
    ]


def run_onecard(args: argparse.Namespace, dtype: Dtype, folder: str) -> dict[str, Any]:
    import onecard

    rows = answers(args.pairs) if args.loss in ("sft", "kto") else pairs(args.pairs)
    if args.loss == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    data = Path(folder) / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = onecard.TrainConfig(
        model=str(make_model()),
        data=str(data),
        output=f"{folder}/run",
        loss=args.loss,
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
        compute_dtype=dtype,
        seed=SEED,
        device="cpu",
    )
    before = status_bytes("VmRSS")
    found = onecard.train(config).metrics
    return {
        "seconds": [row["seconds"] for row in found],
        "losses": [row["loss"] for row in found],
        "before": before,
    }


def run_trl(args: argparse.Namespace, dtype: Dtype, folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

    place, _, name = LOSSES[args.loss][0].rpartition(".")
    config, trainer = (getattr(import_module(place), f"{name}{what}") for what in ("Config", "Trainer"))
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **rest: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *arguments: Any, **rest: Any) -> None:
            seconds.append(time.perf_counter() - self.begin)

    rows = answers(args.pairs) if args.loss == "kto" else pairs(args.pairs)
    before = status_bytes("VmRSS")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    checkpoint = make_model()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, quantization_config=quantization)
    settings = config(
        output_dir=f"{folder}/trl",
        max_steps=args.steps,
        per_device_train_batch_size=len(rows),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_length=LENGTH,
        gradient_checkpointing=args.recompute,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=dtype == "bfloat16",
        disable_tqdm=True,
        **LOSSES[args.loss][1],
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.bos_token = None  # trl's older trainers write one that the tokenizer does not write
    torch.manual_seed(SEED)  # peft's start of the adapter is the next to draw from it, as in onecard
    made = trainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    return {"seconds": seconds, "losses": losses, "before": before}


def child(args: argparse.Namespace) -> None:
    """Print a run in bfloat16, the peak of the process, and the losses of a run in float32 after that."""
    run = run_trl if args.child == "trl" else run_onecard
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        found = run(args, "bfloat16", one)
        peak = status_bytes("VmHWM")
        exact = [] if args.loss == "sft" else run(args, "float32", two)["losses"]
    print(json.dumps({**found, "float32": exact, "peak": peak}))


def num_tokens(count: int) -> int:
    """Count the tokens of a step."""
    from onecard.data.chat.mask import encode_pair
    from onecard.hf.load import load_tokenizer

    tokenizer = load_tokenizer(str(make_model()))
    parts = [(row["prompt"], row["completion"]) for row in answers(count)]
    return sum(len(encode_pair(prompt, answer, tokenizer, "row", LENGTH)[0][:LENGTH]) for prompt, answer in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--losses", nargs="*", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--recompute", action="store_true", help="recompute activations; without it all are kept")
    parser.add_argument("--child", choices=NAMES)
    parser.add_argument("--loss", choices=("sft", *LOSSES))
    args = parser.parse_args()
    if args.child:
        return child(args)
    make_model()
    tokens = num_tokens(args.pairs)
    common = ["--pairs", str(args.pairs), "--steps", str(args.steps), *(["--recompute"] if args.recompute else [])]
    turns = [("onecard", "sft"), *((name, loss) for loss in args.losses for name in NAMES)]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {turn: [] for turn in turns}
    for number in range(args.rounds):
        for turn in turns:
            found = run_child("benchmarks.preference", "--child", turn[0], "--loss", turn[1], *common)
            runs[turn].append(found)
            speed = tokens / statistics.median(found["seconds"][1:])
            losses = [[round(value, 4) for value in found[what]] for what in ("losses", "float32")]
            print(f"round {number + 1}", *turn, f"{speed:.1f} tok/s {found['peak'] / MB:.0f} MB", *losses, flush=True)
            if done := [loss for loss in args.losses if all(runs[each, loss] for each in NAMES)]:
                print(report(args, done, tokens, runs), flush=True)  # a run that is ended early leaves these


def report(
    args: argparse.Namespace, losses: list[str], tokens: int, runs: dict[tuple[str, str], list[dict[str, Any]]]
) -> Path:
    """Write the ratios and the losses of the steps."""

    def median(turn: tuple[str, str], what: str) -> float:
        if what == "seconds":
            return statistics.median(second for run in runs[turn] for second in run["seconds"][1:])
        return statistics.median(run["peak"] - (run["before"] if what == "own" else 0) for run in runs[turn])

    lines, steps = [], []
    for loss in losses:
        ours, theirs, sft = ("onecard", loss), ("trl", loss), ("onecard", "sft")
        speeds = [median(other, "seconds") / median(ours, "seconds") for other in (theirs, sft)]
        peaks = [median(ours, what) / median(other, what) for other in (theirs, sft) for what in ("peak", "own")]
        goal = "met" if max(peaks[2:]) <= GOAL else "missed"
        lines.append([loss, *(f"{ratio:.2f}x" for ratio in (speeds[0], *peaks[:2], speeds[1], *peaks[2:])), goal])
        for dtype, what in (("float32", "float32"), ("bfloat16", "losses")):
            both = [runs[name, loss][0][what] for name in NAMES]
            steps += [[loss, dtype, name, *(f"{value:.5f}" for value in values)] for name, values in zip(NAMES, both)]
        apart = [
            abs(one - other) / abs(other) for one, other in zip(*(runs[name, loss][0]["float32"] for name in NAMES))
        ]
        steps.append([loss, "float32", "relative difference", *(f"{value:.0e}" for value in apart)])
    header = ["loss", "speed against trl", "peak against trl", "above the libraries", "speed against SFT",
              "peak against SFT", "above the libraries", f"goal: at most {GOAL}x SFT's peak"]  # fmt: skip
    body = (
        f"SmolLM2-135M-Instruct, {args.pairs} pairs of GSM8K, {tokens:,} tokens a step, rank {RANK} on all linears, "
        f"{'activations recomputed' if args.recompute else 'all activations kept'}; medians of {args.rounds} processes "
        f"of {args.steps} steps each, the first step left out. The machine was busy: only the ratios are of use. Peaks "
        f"and speeds are those of bfloat16, a peak that of the whole process or what it adds to the imported "
        f"libraries. Speed is of the steps, more is better: onecard's reference is computed before them, trl's in "
        f"them. trl runs over peft and bitsandbytes. SFT is onecard's, of the same documents.\n"
        f"\n{table(header, lines)}\n\nLosses of the steps:\n"
        f"\n{table(['loss', 'dtype', '', *(f'step {i + 1}' for i in range(args.steps))], steps)}"
    )
    return write_result("preference", "Losses on preferences, side by side", body)


if __name__ == "__main__":
    main()
