"""Two figures from real numbers: a 7B model's training memory, and NF4's levels over the density of real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from onecard.config import MXFP4_STORAGE, QUANT_TYPES
from onecard.errors import UserError
from onecard.faults import as_user_error
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.load import find_checkpoint
from onecard.hf.skeleton import read_model
from onecard.hf.stored import read_tensor
from onecard.kernels import ops
from onecard.memory.plan import Plan, plan
from onecard.memory.terms import Method
from onecard.quant.codebook import quant_map

GB = 1e9
METHODS: dict[Method, str] = {
    "full": "full fine-tuning", "lora": "LoRA, 16-bit base", "qlora": "QLoRA, 4-bit base",
}  # fmt: skip
OFTEN_QUOTED = {"full": 112, "lora": 24, "qlora": 6}  # GB
DIFFERENCE = (
    "Often quoted: 112 GB is 16 bytes for each of 7.0 billion weights, where the model has 6.74; 24 and 6 GB\n"
    "are the cards that LoRA and QLoRA are said to need. Activations of all rows here are recomputed."
)
GROUPS = {
    "weights": ("weights, 16-bit", "base, 4-bit codes", "base, scales", "embeddings, norms, head", "LoRA weights"),
    "gradients": ("gradients", "LoRA gradients"),
    "float32 masters": ("float32 masters",),
    "optimizer states": ("AdamW states",),
    "activations and scratch": ("activations", "logits chunk", "scratch"),
    "CUDA context, allocator": ("allocator", "CUDA context, libraries"),
}
COLOURS = ("#1f6f8b", "#e09f3e", "#9e2a2b", "#540b0e", "#99c1b9", "#8d99a6")
BLOCKSIZE = 64


def memory_bill(path: Path, model: str = "llama-2-7b", length: int = 512) -> dict[str, dict[str, float]]:
    """Draw stacked bars of full, LoRA and QLoRA training on a GPU. Return {method: {group: GB}}."""
    bills = {}
    for method in METHODS:
        settings = {"device": "cuda", "compute_dtype": "bfloat16", "gradient_checkpointing": True}
        found = plan(model, method, max_seq_length=length, **settings)
        terms = {term.name: term.num_bytes for term in found.terms}
        assert set(terms) <= {name for names in GROUPS.values() for name in names}, terms
        bills[method] = {group: sum(terms.get(name, 0) for name in names) / GB for group, names in GROUPS.items()}
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axis: Any = figure.subplots()
    left = [0.0] * len(METHODS)
    for group, colour in zip(GROUPS, COLOURS):
        values = [bills[method][group] for method in METHODS]
        axis.barh(list(METHODS.values()), values, left=left, color=colour, label=group, height=0.55)
        left = [a + b for a, b in zip(left, values)]
    for row, (method, total) in enumerate(zip(METHODS, left)):
        quoted = OFTEN_QUOTED[method]
        axis.plot([quoted, quoted], [row - 0.38, row + 0.38], color="black", linewidth=1.4, linestyle=(0, (2, 1.5)),
                  label="often quoted" if row == 0 else None)  # fmt: skip
        axis.text(max(total, quoted) + 1.5, row, f"{total:.1f} GB", va="center", fontsize=12, fontweight="bold")
        axis.text(max(total, quoted) + 1.5, row + 0.27, f"quoted: {quoted}", va="center", fontsize=8.5, color="#555555")
    axis.set_xlabel(f"GB of device memory: {model}, one row of {length} tokens, rank 16 on all linears")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.16 * max(left))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right", fontsize=9)
    figure.text(0.01, -0.01, DIFFERENCE, fontsize=8.5, color="#444444", va="top")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return bills


def plot_plan(path: str | Path, found: Plan, title: str) -> None:
    """Draw a plan's terms as bars, the largest first, with total and limit. Raises UserError if the write fails."""
    terms = sorted(found.terms, key=lambda term: term.num_bytes, reverse=True)
    figure = Figure(figsize=(8, 1.6 + 0.36 * len(terms)), layout="constrained")
    axis: Any = figure.subplots()
    values = [term.num_bytes / GB for term in terms]
    bars = axis.barh([term.name for term in terms], values, color=COLOURS[0], height=0.65)
    axis.bar_label(bars, fmt="{:.2f}", padding=3, fontsize=9)
    limit = "" if found.device_memory_bytes is None else f" of {found.device_memory_bytes / GB:.2f} GB"
    axis.set_title(f"{title}: {found.total_bytes / GB:.2f} GB{limit}", loc="left", fontsize=11)
    axis.set_xlabel("GB")
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    with as_user_error(Path(path), lambda: ("the plot is not whole", "ask for it again")):
        try:
            figure.savefig(path, dpi=150)
        except ValueError as error:
            must, do = "the plot must be of a kind that can be drawn", "name it like plan.png"
            raise UserError(must, str(error), do, str(path)) from None


def levels_and_density(path: Path, model: str) -> dict[tuple[str, bool], float]:
    """Draw NF4's and Int4's levels over the density of a layer's scaled weights, and each type's measured error.

    Returns:
        {(quant_type, double_quant): ||W - W_hat|| / ||W||} of the model's largest linear.
    """
    name, W = largest_linear(model)
    kinds = [(kind, nested) for kind in QUANT_TYPES for nested in ((False,) if kind == "mxfp4" else (False, True))]
    errors = {(kind, nested): relative_error(W, kind, nested) for kind, nested in kinds}
    blocks = W.flatten()[: W.numel() // BLOCKSIZE * BLOCKSIZE].view(-1, BLOCKSIZE)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)).flatten()
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1.25))
    top.hist(scaled.numpy(), bins=160, range=(-1, 1), density=True, color="#d5dde0")
    height = top.get_ylim()[1]
    for kind, colour, low, high in (("nf4", "#1f6f8b", 0.0, 0.52), ("int4", "#e09f3e", 0.54, 1.0)):
        levels = [x for x in quant_map(kind).tolist() if abs(x) <= 1]
        title = {"nf4": "NF4: as many weights to each level", "int4": "Int4: as far from each level to the next"}[kind]
        top.vlines(levels, low * height, high * height, color=colour, linewidth=1.6, label=title)
    top.set_ylabel("density")
    top.set_xlabel(f"weight / absmax of its block of {BLOCKSIZE}: {name}, {tuple(W.shape)}")
    top.spines[["top", "right"]].set_visible(False)
    top.set_ylim(0, 1.15 * height)
    top.legend(frameon=False, loc="upper center", ncols=2, fontsize=9)
    rows = [f"{kind}{', double quantization' if nested else ''}" for kind, nested in errors]
    bars = bottom.barh(rows, [100 * e for e in errors.values()],
                       color=["#1f6f8b" if kind == "nf4" else "#b9c4c9" for kind, _ in errors])  # fmt: skip
    bottom.bar_label(bars, fmt="{:.2f} %", padding=3, fontsize=9)
    bottom.set_xlabel("error, % of the weight's norm")
    bottom.invert_yaxis()
    bottom.margins(x=0.12)
    bottom.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return errors


def relative_error(W: Tensor, quant_type: str, double_quant: bool) -> float:
    """Return ||W - W_hat|| / ||W|| after quantization to 4 bits."""
    how = MXFP4_STORAGE if quant_type == "mxfp4" else {"blocksize": BLOCKSIZE, "double_quant": double_quant}
    back = ops.dequantize_4bit(*ops.quantize_4bit(W, quant_type, **how))
    return ((W.double() - back.double()).norm() / W.double().norm()).item()


def largest_linear(model: str) -> tuple[str, Tensor]:
    """Return name and float32 weight of the largest linear that is quantized. No other tensor is read."""
    checkpoint = inspect_checkpoint(find_checkpoint(model))
    if checkpoint.is_4bit:
        do = "pass the checkpoint that it was made from"
        raise UserError("the figure must be of weights in 16 or 32 bits", "a checkpoint in 4 bits", do, model)
    linears = read_model(checkpoint).linears
    name = max((n for n in checkpoint.tensors if n in linears), key=lambda n: linears[n].weight.numel())
    return name, read_tensor(checkpoint.tensors[name]).to(torch.float32)


def draw_figures(output: str, model: str | None) -> list[str]:
    """Draw memory_bill.png and nf4_int4.png in a folder. Return lines with their numbers.

    Args:
        model: checkpoint folder or hub id whose largest linear is used; None for the demo's base.
    """
    folder, base = Path(output), model or str(Path(__file__).parents[1] / "demo" / "base")
    with as_user_error(folder, lambda: ("no figure is whole but those named above", "draw them again")):
        folder.mkdir(parents=True, exist_ok=True)
        bill = memory_bill(folder / "memory_bill.png")
        errors = levels_and_density(folder / "nf4_int4.png", base)
    lines = [f"{method:6s} {sum(groups.values()):6.1f} GB" for method, groups in bill.items()]
    for (kind, nested), error in errors.items():
        lines.append(f"{kind:5s}{' double quantization' if nested else '':20s} error {error:.3%} of the weight's norm")
    return [*lines, f"figures  {folder}"]
