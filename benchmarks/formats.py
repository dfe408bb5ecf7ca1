"""`onecard train` on 2,000 rows of each data format, compared with bitsandbytes+peft on the same rows.

    python -m benchmarks.formats [--shape 135m] [--steps 6]

Ours is the user's command, in a process of its own; its numbers come from metrics.jsonl. The peer gets the tokens and
labels of our data pipeline, so that both learn the same tokens. It gets the documents of each of our packed rows as one
padded batch, as in a trainer without packing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.measure import MB, run_child, status_bytes, table, write_result
from benchmarks.shapes import SHAPES, make_checkpoint
from benchmarks.train import RANK, RATE
from onecard.config import TrainConfig, make_config
from onecard.data.load import load_dataset
from onecard.data.loader import Loader
from onecard.demo.run import FOLDER
from onecard.hf.load import load_tokenizer

COUNT, LENGTH = 2000, 512
FORMATS = ("messages", "prompt-completion", "alpaca", "sharegpt", "text")


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Return 2,000 rows: one to four chats of the demo joined into one, in one of the five formats."""
    demo = [json.loads(line)["messages"] for line in (FOLDER / "data" / "train.jsonl").read_text().splitlines()]
    rng, rows = Random(3), []
    for _ in range(COUNT):
        turns = [turn for pair in rng.sample(demo, rng.randint(1, 4)) for turn in pair]
        asked, answer = "\n".join(t["content"] for t in turns[:-1]), turns[-1]["content"]
        rows.append(
            {
                "messages": {"messages": turns},
                "prompt-completion": {"prompt": asked, "completion": answer},
                "alpaca": {"instruction": "Write the order as JSON.", "input": asked, "output": answer},
                "sharegpt": {
                    "conversations": [
                        {"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in turns
                    ]
                },
                "text": {"text": asked + "\n" + answer},
            }[kind]
        )
    return rows


def settings(args: argparse.Namespace, data: Path, output: str) -> dict[str, Any]:
    return {
        "model": str(make_checkpoint(args.shape)), "data": str(data), "output": output, "max_steps": args.steps,
        "max_seq_length": LENGTH, "r": RANK, "lora_alpha": 2 * RANK, "learning_rate": RATE,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "sample_prompts": [],
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0,
    }  # fmt: skip


def run_ours(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        fields = settings(args, data, f"{folder}/run")
        config = Path(folder) / "run.yaml"
        config.write_text(json.dumps(fields))  # JSON is YAML
        command = [str(Path(sys.executable).with_name("onecard")), "train", "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        steps = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return {
        "supervised": statistics.median(s["supervised_tokens_per_second"] for s in steps[1:]),
        "peak": steps[-1]["memory_bytes"],
        "losses": [s["loss"] for s in steps],
    }


def run_peer(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Run bitsandbytes + peft (in the child) on the documents of our packed rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = make_config(TrainConfig, settings(args, data, "-"), "benchmark")
    dataset = load_dataset(str(data), load_tokenizer(config.model), config)
    loader = Loader(dataset.examples, LENGTH, True, 1, config.seed)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.bfloat16, quantization_config=quantization)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    model.train()
    rates, losses = [], []
    for indices in loader.batches(0)[: args.steps]:
        documents = [dataset.examples[i] for i in indices]
        width = max(len(d.input_ids) for d in documents)
        ids = torch.tensor([d.input_ids + [0] * (width - len(d.input_ids)) for d in documents])
        labels = torch.tensor([d.labels + [-100] * (width - len(d.labels)) for d in documents])
        mask = torch.tensor([[1] * len(d.input_ids) + [0] * (width - len(d.input_ids)) for d in documents])
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=labels, attention_mask=mask, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        rates.append(int((labels[:, 1:] != -100).sum()) / (time.perf_counter() - begin))
    return {"supervised": statistics.median(rates[1:]), "peak": status_bytes("VmHWM"), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--child", type=Path)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_peer(args, args.child)))
        return
    make_checkpoint(args.shape)
    folder, lines = Path(tempfile.mkdtemp()), []
    for kind in FORMATS:
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
        ours = run_ours(args, data)
        peer = run_child("benchmarks.formats", "--child", str(data), "--shape", args.shape, "--steps", str(args.steps))
        cells = [kind, f"{ours['supervised']:.0f}", f"{peer['supervised']:.0f}"]
        cells += [f"{ours['supervised'] / peer['supervised']:.2f}x"]
        cells += [f"{ours['peak'] / MB:,.0f}", f"{peer['peak'] / MB:,.0f}", f"{ours['peak'] / peer['peak']:.2f}x"]
        cells += [f"{r['losses'][0]:.3f}, {r['losses'][-1]:.3f}" for r in (ours, peer)]
        lines.append(cells)
        print("  ".join(cells), flush=True)
    shutil.rmtree(folder)
    header = [
        "2,000 rows of",
        "ours",
        "bitsandbytes + peft",
        "ratio",
        "ours, MB",
        "peer, MB",
        "ratio",
        "losses, first and last",
        "peer's",
    ]
    note = (
        f"{args.shape} Llama shape, random weights, rows of up to {LENGTH} tokens, rank {RANK}, {args.steps} updates, "
        "the first left out; supervised tokens a second (median), peak of the whole process, mean loss of an update. "
        "Ours packs documents, the peer pads them."
    )
    print(write_result(f"formats_{args.shape}", "Five data formats, side by side", f"{note}\n\n{table(header, lines)}"))


if __name__ == "__main__":
    main()
