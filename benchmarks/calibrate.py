"""What calibrated 4-bit bases cost beside 16 bits and the nearest codes: losses before and after training, and time.

    python -m benchmarks.calibrate [before] [after] [--seeds 3] [--steps 80 300]
    python -m benchmarks.calibrate time [--shape 1.1b]

SmolLM2-135M-Instruct, 300 rows of GSM8K to calibrate on and to learn, 100 held out (benchmarks/real.py). The general
text is of other topics than the calibration's. Each base is a process of its own. A seed sets the order of the rows,
thus the calibration rows, the order of learning, and LoRA's start. mxfp4 here has the levels of E2M1 and a power of two
as scale of each 32 weights; it is a comparison, no format of onecard.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import anonymous_peak, run_child, table, write_result
from benchmarks.real import DATA, LENGTH, PACKAGE, examples, make_loader, make_model
from benchmarks.shapes import make_checkpoint
from benchmarks.train import RANK, RATE, keep_16_bits, load_onecard, onecard_steps, start_adapter

TOKENS, GENERAL_TOKENS = 8192, 4096  # of calibration on the data; measured
VARIANTS = ("nearest", "scales", "feedback", "both", "start")
TITLES = {
    "16 bits": "16 bits",
    "nearest": "nearest codes",
    "scales": "scales only",
    "feedback": "feedback only",
    "both": "scales and feedback",
    "start": "scales and feedback, low-rank start",
}
KINDS = ("nf4", "fp4", "int4", "mxfp4")
MXFP4 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6


class Nowhere:
    """Stands for a writer: the losses need no files."""

    def add(self, *args: Any) -> None:
        pass


def shuffled(rows: list[Any], seed: int) -> list[Any]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[index] for index in order]


def general(folder: Path) -> list[Any]:
    """Return the measured pieces of general text."""
    from onecard.export.calibrated.rows import PIECE_TOKENS, general_pieces
    from onecard.hf.load import load_tokenizer

    pieces = general_pieces(load_tokenizer(str(folder)), PIECE_TOKENS)[1::2]
    return pieces[: GENERAL_TOKENS // PIECE_TOKENS]


def mx_scales(W: torch.Tensor) -> torch.Tensor:
    """Return the scale of each weight as the MX formats set it: 6 times a power of two for each 32 weights."""
    largest = W.reshape(-1, 32).abs().amax(1).clamp(min=1e-30)
    return (6 * 2.0 ** (largest.log2().floor() - 2)).repeat_interleave(32).view_as(W)


def mx_rounded(W: torch.Tensor, scale: torch.Tensor, factor: Any) -> torch.Tensor:
    from onecard.export.calibrated.feedback import choose_levels

    return MXFP4[choose_levels(W, scale, factor, MXFP4).long()] * scale


def mx_nearest(W: torch.Tensor) -> torch.Tensor:
    from onecard.export.calibrated.feedback import Factor

    return mx_rounded(W, mx_scales(W), Factor.of(torch.eye(W.shape[1])))


def without_feedback(factor: Any) -> Any:
    return replace(factor, U_KK=torch.eye(len(factor.d_K)))


def mx_calibrated(W: torch.Tensor, factor: Any, variant: str) -> torch.Tensor:
    """Return W_hat with the levels of mxfp4. Scales are chosen from the format's own, its half and its double."""
    exact = mx_scales(W)
    tried = torch.stack([exact * share for share in ((1.0,) if variant == "feedback" else (1.0, 0.5, 2.0))])
    plain = torch.stack([mx_rounded(W, scale, without_feedback(factor)) for scale in tried])
    errors = ((plain - W).square() * factor.weight_K).view(len(tried), -1, 32).sum(2)
    scale = tried.view(len(tried), -1, 32)[errors.argmin(0), torch.arange(errors.shape[1])].view_as(W)
    return mx_rounded(W, scale, without_feedback(factor) if variant == "scales" else factor)


def variant_of_calibrator(variant: str) -> Any:
    """Return the class of a pass that only chooses scales, only feeds errors back, or does both."""
    from onecard.export.calibrated import calibrator, feedback

    if variant == "feedback":
        feedback.SHARES = torch.ones(1)

    class Trial(calibrator.Calibrator):
        def quantized(self, name: str, factor: Any) -> Any:
            return super().quantized(name, without_feedback(factor) if variant == "scales" else factor)

    return Trial


def make_trial(args: argparse.Namespace, folder: Path, chosen: dict[str, torch.Tensor]) -> Any:
    """Return a pass that quantizes as the variant and the kind say, and leaves each W_hat in `chosen`."""
    from onecard.config import LoraSettings, QuantConfig
    from onecard.export.calibrated import calibrator
    from onecard.export.calibrated.bill import CALIBRATED, NEAREST, SIXTEEN
    from onecard.export.merge.merged import open_merged

    class MxTrial(calibrator.Calibrator):
        def quantize(self, layer: Any, streams: Any, writer: Any) -> None:
            layer.advance(streams[SIXTEEN])
            found: dict[str, Any] = self.linears(layer)
            for name in found:
                self.put(name, mx_nearest(self.matrix(name).float()))
            layer.advance(streams[NEAREST])
            for name, W_hat in found.items():
                self.put(name, W_hat)
            layer.advance(streams[CALIBRATED])

        def quantized(self, name: str, factor: Any) -> Any:
            return mx_calibrated(self.matrix(name).float(), factor, args.variant)

    kind: Any = MxTrial if args.kind == "mxfp4" else variant_of_calibrator(args.variant)

    class Kept(kind):
        def put(self, name: str, W: torch.Tensor) -> None:
            super().put(name, W)
            chosen[name] = W.bfloat16()  # the nearest, then the calibrated

    mx = args.kind == "mxfp4"
    quant = QuantConfig(quant_type="nf4" if mx else args.kind)
    lora = LoraSettings(r=RANK) if args.variant == "start" else None
    return Kept(open_merged(str(folder), None, "original"), quant, lora, torch.device("cpu"))


def before_child(args: argparse.Namespace) -> dict[str, Any]:
    """Return the losses of a variant of one kind before training, and those of 16 bits and nearest codes."""
    found = run_trial(args, {})
    return {form: (loss.data, loss.general) for form, loss in found.items()}


@torch.no_grad()
def run_trial(args: argparse.Namespace, chosen: dict[str, torch.Tensor]) -> Any:
    """Run `make_trial`'s pass over the data and return the losses by form of the base."""
    from onecard.data.dataset import Dataset
    from onecard.export.calibrated.calibration import first_batches
    from onecard.export.calibrated.rows import choose_rows
    from onecard.hf.load import load_tokenizer

    folder = make_model()
    training = Dataset(shuffled(examples(folder, DATA / "train_300.jsonl"), args.seed), "messages", LENGTH)
    held_out = Dataset(examples(folder, DATA / "eval_100.jsonl"), "messages", LENGTH)
    rows = choose_rows(training, held_out, load_tokenizer(str(folder)), True, TOKENS)
    rows.data, _ = first_batches(held_out.examples, LENGTH, True)
    rows.general, _ = first_batches(general(folder), LENGTH, True)
    return make_trial(args, folder, chosen).run(rows, Nowhere(), lambda done, total: None)


def level_weights(args: argparse.Namespace, folder: Path) -> dict[str, torch.Tensor]:
    """Return what codes of int4 or mxfp4, which no checkpoint holds, stand for: the nearest codes, or a trial's."""
    from safetensors.torch import load_file

    from onecard.kernels import ops

    chosen: dict[str, torch.Tensor] = {}
    if args.variant == "nearest":
        for name, W in load_file(folder / "model.safetensors").items():
            if W.ndim == 2 and "layers" in name:
                mx = args.kind == "mxfp4"
                W_hat = mx_nearest(W.float()) if mx else ops.dequantize_4bit(*ops.quantize_4bit(W, "int4", 64, True))
                chosen[name] = W_hat.bfloat16()
    else:
        run_trial(args, chosen)
    return chosen


def after_child(args: argparse.Namespace) -> dict[str, Any]:
    """Return the losses of a contender before training and after each of `args.steps`."""
    from safetensors.torch import load_file

    from onecard.adapter.start import set_start
    from onecard.config import LoraSettings, QuantConfig
    from onecard.data.dataset import Dataset
    from onecard.export.calibrated import base as calibration
    from onecard.export.merge.quantized import quantize_checkpoint
    from onecard.hf.load import load_tokenizer
    from onecard.train.evaluate import mean_loss
    from onecard.train.loss import packed_loss

    folder, start = make_model(), dict[str, Any]()
    rows = shuffled(examples(folder, DATA / "train_300.jsonl"), args.seed)
    held_out, others = examples(folder, DATA / "eval_100.jsonl"), general(folder)
    settings = argparse.Namespace(child="onecard", length=LENGTH, steps=max(args.steps), recompute=False)
    own = dict[str, torch.Tensor]()
    if args.variant == "16 bits":
        own = load_file(folder / "model.safetensors")
    elif args.kind in ("int4", "mxfp4"):
        own = level_weights(args, folder)
    with tempfile.TemporaryDirectory() as temporary:
        if args.kind == "fp4" and args.variant == "nearest":
            quantize_checkpoint(str(folder), f"{temporary}/base", QuantConfig(quant_type=args.kind))
            folder = Path(temporary) / "base"
        elif not own and args.variant not in ("16 bits", "nearest"):
            calibration.Calibrator = variant_of_calibrator(args.variant)
            learned, kept = (Dataset(part, "messages", LENGTH) for part in (rows, held_out))
            lora = LoraSettings(r=RANK) if args.variant == "start" else None
            output, quant = Path(temporary) / "base", QuantConfig(quant_type=args.kind)
            tokenizer = load_tokenizer(str(folder))
            with torch.no_grad():
                source = calibration.Source(str(folder), quant, learned, kept, TOKENS, lora)
                found = calibration.calibrate_base(source, output, tokenizer, "cpu")
            folder, start = found.folder, found.start
        base = load_onecard(settings, folder)

    def begin(model: Any) -> None:
        start_adapter(model, 2 + args.seed)
        if start:
            set_start(model, start)
        if own:
            keep_16_bits(model, lambda name, module: own[f"{plain_name(name)}.weight"])

    def measure(documents: list[Any]) -> float:  # the steps keep packed attention on
        return mean_loss(base, Dataset(documents, "messages", LENGTH), packed_loss)

    losses: dict[str, tuple[float, float]] = {}
    for number, _ in enumerate(onecard_steps(settings, folder, base, make_loader(rows, args.seed), begin), 1):
        if number in args.steps:
            losses[str(number)] = (measure(held_out), measure(others))
    return losses


def plain_name(name: str) -> str:
    """Return a module's name without peft's wrappers."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def time_child(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and peak memory of a calibration beside those of the nearest codes' checkpoint."""
    from onecard.config import QuantConfig
    from onecard.data.dataset import Dataset
    from onecard.export.calibrated.base import Source, calibrate_base
    from onecard.export.merge.quantized import quantize_checkpoint
    from onecard.hf.load import load_tokenizer
    from onecard.memory.measure import return_large_blocks

    return_large_blocks()
    folder = make_checkpoint(args.shape)
    every = examples(folder, DATA / "train_300.jsonl")
    sets = [Dataset(part, "messages", LENGTH) for part in (every[30:], every[:30])]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, torch.no_grad(), anonymous_peak() as peak:
        first, start = peak[0], time.perf_counter()
        if args.variant == "nearest":
            quantize_checkpoint(str(folder), f"{temporary}/out", QuantConfig())
        else:
            tokenizer, output = load_tokenizer(str(folder)), Path(temporary) / "out"
            bill = calibrate_base(Source(str(folder), QuantConfig(), sets[0], sets[1]), output, tokenizer, "cpu").bill
            found = dict(bill.tokens)
        found["seconds"] = time.perf_counter() - start
    return {**found, "peak": peak[0] - first}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help="before, after and time; default: the first two")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="*", default=[80, 300])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS[1:], default=list(VARIANTS[1:]), help="before: of the first kind"
    )
    parser.add_argument("--known", type=Path, help="what an earlier run printed; what is there is not run again")
    parser.add_argument("--shape", default="1.1b")
    parser.add_argument("--child", choices=("before", "after", "time"))
    parser.add_argument("--variant", choices=TITLES)
    parser.add_argument("--kind", choices=KINDS, default="nf4")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.child:
        run = {"before": before_child, "after": after_child, "time": time_child}[args.child]
        return print(json.dumps(run(args)))
    for part in args.parts or ("before", "after"):
        {"before": before, "after": after, "time": timed}[part](args)


def call(args: argparse.Namespace, child: str, variant: str, *more: str) -> dict[str, Any]:
    known = f"{child} {variant} {' '.join(more)}: "
    for line in args.known.read_text().splitlines() if args.known else ():
        if line.startswith(known):
            return json.loads(line[line.index("{") :])
    begin = time.perf_counter()
    found = run_child("benchmarks.calibrate", "--child", child, "--variant", variant, *more)
    print(f"{known}{time.perf_counter() - begin:.0f} s", json.dumps(found), flush=True)
    return found


def before(args: argparse.Namespace) -> None:
    """Write the table of losses before training."""
    rows = []
    for kind in args.kinds:
        found: dict[str, list[tuple[float, float]]] = {}
        for seed in range(args.seeds if kind == args.kinds[0] else 1):
            for variant in args.variants if kind == args.kinds[0] else ["both"]:
                losses = call(args, "before", variant, "--kind", kind, "--seed", str(seed))
                last = losses.pop(list(losses)[-1])
                found.setdefault(variant, []).append(last)
                if "nearest" not in found or len(found["nearest"]) == seed:
                    found.setdefault("16 bits", []).append(losses["16 bits"])
                    found.setdefault("nearest", []).append(losses["nearest codes"])
        low, high = found["16 bits"][0], found["nearest"][0]
        for name in TITLES:
            if name in found and (name != "16 bits" or kind == args.kinds[0]):
                cells = []
                for column in (0, 1):
                    values = [loss[column] for loss in found[name]]
                    closed = (high[column] - statistics.mean(values)) / (high[column] - low[column])
                    cells += [several(values), f"{closed:.0%}"]
                rows.append([kind if name != "16 bits" else "", TITLES[name], *cells])
    header = ["levels", "base", "held-out rows", "gap closed", "general text", "gap closed"]
    body = (
        f"SmolLM2-135M-Instruct ({PACKAGE}); calibrated on {TOKENS:,} tokens of GSM8K's training rows and a quarter as "
        f"many of general text. Losses of 100 held-out rows and of {GENERAL_TOKENS:,} tokens of other general text, in "
        f"nats a token: for {args.kinds[0]} the mean of {args.seeds} seeds (least to most), else of one seed.\n\n"
        f"{table(header, rows)}"
    )
    print(write_result("calibrate_before_135m", "A calibrated base before training", body))


def after(args: argparse.Namespace) -> None:
    """Write the table of losses after training: the first kind's with all seeds and variants, one of the others."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    numbers = [str(number) for number in args.steps]
    for kind in args.kinds:
        first = kind == args.kinds[0]
        for seed in range(args.seeds if first else 1):
            for variant in ("16 bits", "nearest", *args.variants) if first else ("nearest", "both"):
                more = [] if kind == KINDS[0] else ["--kind", kind]
                losses = call(args, "after", variant, *more, "--seed", str(seed), "--steps", *numbers)
                found.setdefault((kind, variant), []).append(losses)
    rows = []
    for (kind, variant), runs in found.items():
        row = ["" if variant == "16 bits" else kind, TITLES[variant]]
        for number in numbers:
            for column in (0, 1):
                values = [run[number][column] for run in runs]
                base = statistics.mean(run[number][column] for run in found[args.kinds[0], "16 bits"][: len(runs)])
                row += [several(values), f"{statistics.mean(values) / base - 1:+.1%}"]
        rows.append(row)
    header = ["levels", "base"]
    for number in numbers:
        header += [f"held out, {number} steps", "to 16 bits", f"general text, {number} steps", "to 16 bits"]
    body = (
        f"SmolLM2-135M-Instruct ({PACKAGE}) on 300 rows of GSM8K; rows of about {LENGTH} tokens a step, rank {RANK} on "
        f"all linears, AdamW at {RATE}, bfloat16. 16 bits is the same step on the checkpoint's own weights, int4 and "
        f"mxfp4 on the 16-bit values of their levels. Losses are those of 100 held-out rows and of {GENERAL_TOKENS:,} "
        f"tokens of general text, in nats a token: for {args.kinds[0]} the mean of {args.seeds} seeds (least to most), "
        f"else of the first seed, beside 16 bits of that seed.\n\n{table(header, rows)}"
    )
    print(write_result("calibrate_after_135m", "A calibrated base after training", body))


def several(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def timed(args: argparse.Namespace) -> None:
    """Write seconds and peak memory."""
    rows = []
    for variant in ("nearest", "both"):
        found = call(args, "time", variant, "--shape", args.shape)
        tokens = sum(value for key, value in found.items() if key not in ("seconds", "peak"))
        rows.append([TITLES[variant], f"{found['seconds']:.0f}", f"{found['peak'] / 1e9:.2f}", f"{tokens:,}"])
    header = ["base", "seconds", "peak GB", "tokens run or measured"]
    body = f"The shape {args.shape} with random weights, on this CPU.\n\n{table(header, rows)}"
    print(write_result(f"calibrate_time_{args.shape}", "Time and memory of a calibration", body))


if __name__ == "__main__":
    main()
