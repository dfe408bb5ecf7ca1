"""Compare a written model with the live adapter: logits and loss of each on the same held-out tokens.

    off by  ||z - z_live|| / ||z_live - z_base||                      the share of the adapter's effect that is missed
    kept    <z - z_base, z_live - z_base> / ||z_live - z_base||^2     the share of the effect that is present
    error   mean over positions of KL(softmax(z_live) || softmax(z)), in nats

z are logits at supervised positions, all computed in float32 from the stored weights, so that the numbers measure the
weights and not 16-bit arithmetic. The live model runs as in training (packed attention where that reproduces the
model's own). The written files are read back, dequantized to 16 bits by their format's reader (hf/stored.py) if they
are in fewer, and run with transformers' attention. One model is in memory at a time; the live model's logits are in an
unnamed temporary file.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from onecard.adapter.load import with_adapter
from onecard.adapter.tokens import vocabulary_of, with_rows
from onecard.config import LOGITS_CHUNK_BYTES, ExportConfig, QuantConfig
from onecard.data.chat.mask import Example
from onecard.data.dataset import Dataset
from onecard.errors import UserError
from onecard.export.calibrated.writer import read_rows
from onecard.export.folder import check_room, new_folder
from onecard.export.merge.merged import Base, open_merged, write_merged
from onecard.export.merge.quantized import Kept, check_type, write_quantized
from onecard.export.readers import is_read_by_bitsandbytes, load_in_bitsandbytes, load_written, logits
from onecard.hf.attention import use_packed_attention
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.documents import read_model_document
from onecard.hf.gguf.config import FAMILIES as READ
from onecard.hf.load import find_checkpoint, load_model, pick_device
from onecard.train.evaluate import choose_loss
from onecard.train.loss import packed_loss, supervised

LIVE = "live adapter"
NOTHING = 1e-12  # of ||z||^2: a smaller effect is rounding
NUM_EXAMPLES, NUM_TOKENS = 32, 8192  # at most, of the data for the comparison


@dataclass
class Agreement:
    """How close a written model is to the live adapter.

    Attributes:
        off, kept: None if the adapter changes nothing.
        argmax: share of positions with the live adapter's likeliest token.
        losses: float32 (P,), the loss of each position.
        divergence: mean KL divergence from the live adapter, nats.
        right: share of positions whose likeliest token is the data's.
        nbytes: of the files with the weights; None for the live adapter.
    """

    name: str
    off: float | None
    kept: float | None
    argmax: float
    losses: Tensor
    divergence: float = 0.0
    right: float = 0.0
    nbytes: int | None = None

    @property
    def loss(self) -> float:
        return self.losses.double().mean().item()


@dataclass
class Verified:
    """A written model and its comparison, which chose it if there are several."""

    folder: Path
    kept: str
    live: Agreement
    tried: list[Agreement]
    in_weights: Kept | None = None  # how much of the update 4 bits keep; None in 16 bits

    def table(self) -> list[str]:
        """Return the lines for the terminal."""
        names = ("off by", "effect kept", "error", "same token", "right token", "loss", "bytes")
        lines = [f"{'':14s}" + "".join(f"{name:>13s}" for name in names)]
        for found in (self.live, *self.tried):
            shares = [f"{share:.2%}" if share is not None else "-" for share in (found.off, found.kept)]
            tokens = [f"{found.divergence:.4f}", f"{found.argmax:.2%}", f"{found.right:.2%}", f"{found.loss:.4f}"]
            size = "-" if found.nbytes is None else f"{found.nbytes:,}"
            line = f"{found.name:14s}" + "".join(f"{value:>13s}" for value in (*shares, *tokens, size))
            lines.append(line + ("  kept" if found.name == self.kept and len(self.tried) > 1 else ""))
        if self.live.off is None and self.live.name == LIVE:
            lines.append("the adapter changes nothing on these tokens: there is no effect to have a share of")
        return lines


@dataclass
class Live:
    """Logits of the base without and with its adapter, in a file, one example after the other. Without an adapter both
    are those of the model."""

    name: str
    examples: list[tuple[Tensor, Tensor, Tensor]]  # input_ids (1, T); positions (P,) and their targets (P,)
    vocab_size: int
    file: BinaryIO
    losses: list[Tensor] = field(default_factory=list)
    size: float = 0.0
    effect: float = 0.0
    hits: list[Tensor] = field(default_factory=list)

    def write(self, before: Tensor, after: Tensor, target: Tensor) -> None:
        self.hits.append(after.argmax(-1) == target)
        self.size += after.double().square().sum().item()
        self.effect += (after - before).double().square().sum().item()
        self.losses.append(nn.functional.cross_entropy(after, target, reduction="none"))
        for z in (before, after):
            self.file.write(z.contiguous().numpy().data)

    def read(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.file.seek(0)
        for _, positions, _ in self.examples:
            shape = (2, len(positions), self.vocab_size)
            buffer = bytearray(self.file.read(4 * 2 * len(positions) * self.vocab_size))
            before, after = torch.frombuffer(buffer, dtype=torch.float32).view(shape)
            yield before, after

    @property
    def agreement(self) -> Agreement:
        changes = self.effect > NOTHING * self.size
        share = (0.0, 1.0) if changes else (None, None)
        return Agreement(self.name, *share, 1.0, torch.cat(self.losses), right=mean(self.hits))


def merge_verified(
    model: str,
    adapter: str,
    output: str,
    dataset: Dataset,
    bases: list[Base],
    quant: QuantConfig | None = None,
    requantized: QuantConfig | None = None,
    device: str = "cpu",
    num_examples: int = NUM_EXAMPLES,
    num_tokens: int = NUM_TOKENS,
) -> Verified:
    """Merge into each of `bases`, compare with the live adapter, and keep the better one.

    The dequantized base is the nearer one. The original weights are kept only if their loss is lower by more than two
    standard errors of the difference.

    Args:
        quant: same as in `open_merged`.
        requantized: how to round the result to 4 bits; None: it stays in 16 bits.
        num_examples, num_tokens: limits of the dataset's first examples and of their tokens, since three models compute
            each one in float32. At least one example is used, and truncated if it is longer.

    Raises:
        UserError: same as `open_merged` and `write_quantized`; no such device.
    """
    device = str(pick_device(device))
    if requantized is not None:
        check_type(requantized)
    merged = {base: open_merged(model, adapter, base, quant) for base in bases}
    target, in_weights = Path(output), None
    check_room(target, sum(m.nbytes for m in merged.values()))
    with new_folder(target) as folder, tempfile.TemporaryFile(dir=folder) as file:
        rows = first_rows(dataset, num_examples, num_tokens)
        live = run_live(model, adapter, merged[bases[0]].quant, dataset, rows, device, file)
        tried = []
        for base, found in merged.items():
            (folder / base).mkdir()
            if requantized is None:
                write_merged(found, folder / base)
            else:
                in_weights = write_quantized(found, folder / base, requantized)
            tried.append(compare(live, base, folder / base, device))
        kept = better(tried)
        for base in set(bases) - {kept}:
            shutil.rmtree(folder / base)
        for path in (folder / kept).iterdir():
            os.rename(path, folder / path.name)
        (folder / kept).rmdir()
    return Verified(target, kept, live.agreement, tried, in_weights)


def rows_to_verify(config: ExportConfig, on_data: Callable[[Dataset], None] | None = None) -> Dataset:
    """Read the data for `verify_export`, before anything is written.

    Raises:
        UserError: a GGUF file of this model would have no reader here; no such device; same as `read_rows`.
    """
    assert config.verify is not None
    pick_device(config.device)
    if config.format == "gguf":
        check_readable(config.model)
    dataset = read_rows(config.model, config.adapter, config.verify, config, on_data)
    first_rows(dataset, NUM_EXAMPLES, NUM_TOKENS)
    return dataset


def check_readable(model: str) -> None:
    """Raise UserError unless the GGUF file of a model can be read back (hf/gguf)."""
    from onecard.export.gguf.architecture import Architecture

    arch = Architecture(read_model_document(find_checkpoint(model)))
    if arch.name not in READ or arch.num_experts:
        do = "leave verify out; llama-perplexity measures the file, and merge --verify the adapter"
        found = f"{arch.family}{', with experts' * bool(arch.num_experts)}"
        raise UserError(f"verify reads GGUF files of {', '.join(READ)}", found, do, model)


def verify_export(config: ExportConfig, written: Path, quant: QuantConfig, dataset: Dataset) -> list[str]:
    """Compare an exported file or folder with the live adapter, or without one with the model. Return the lines that
    say so.

    Args:
        quant: how training quantized a 16-bit base.
        dataset: the result of `rows_to_verify`.

    Raises:
        UserError: a file that its reader refuses.
    """
    device, rows = str(pick_device(config.device)), first_rows(dataset, NUM_EXAMPLES, NUM_TOKENS)
    with tempfile.TemporaryFile(dir=written.parent) as file:
        live = run_live(config.model, config.adapter, quant, dataset, rows, device, file)
        found = compare(live, config.format, written, device)
    return [rows_line(dataset), *Verified(written, found.name, live.agreement, [found]).table()]


def verify_quantized(model: str, written: Path, dataset: Dataset, device: str) -> list[str]:
    """Compare a written 4-bit checkpoint with the 16-bit model: as onecard reads it, and as transformers does with
    bitsandbytes, where that is installed. Return the lines that say so.

    Raises:
        UserError: a checkpoint that its reader refuses.
    """
    rows, device = first_rows(dataset, NUM_EXAMPLES, NUM_TOKENS), str(pick_device(device))
    with tempfile.TemporaryFile(dir=written.parent) as file:
        live = run_live(model, None, QuantConfig(), dataset, rows, device, file)
        tried = [compare(live, "onecard", written, device)]
        if is_read_by_bitsandbytes(written):
            tried.append(compare(live, "bitsandbytes", written, device, load_in_bitsandbytes))
    return [rows_line(dataset), *Verified(written, "", live.agreement, tried).table()]


def first_rows(dataset: Dataset, num_examples: int, num_tokens: int) -> Sequence[Example]:
    """Return the first examples with at most num_tokens together. The first one is truncated to that."""
    first = dataset.examples[0]
    rows = [replace(first, input_ids=first.input_ids[:num_tokens], labels=first.labels[:num_tokens])]
    if rows[0].num_supervised == 0:
        must = "the first row must have a token to learn within the tokens that are compared"
        raise UserError(must, f"none in its first {num_tokens:,}", "put a shorter row first", first.where)
    total = len(rows[0].input_ids)
    for example in dataset.examples[1:num_examples]:
        total += len(example.input_ids)
        if total > num_tokens:
            break
        rows.append(example)
    return rows


def rows_line(dataset: Dataset) -> str:
    """Return a line that says which rows `merge_verified` compares, and why not more."""
    rows = first_rows(dataset, NUM_EXAMPLES, NUM_TOKENS)
    tokens, total = sum(len(row.input_ids) for row in rows), len(dataset.examples)
    line = f"verifying on {len(rows)} of {total:,} rows, {tokens:,} tokens"
    whole = len(rows) == total and tokens == dataset.num_tokens
    return line if whole else f"{line}: the first, at most {NUM_EXAMPLES} rows and {NUM_TOKENS:,} tokens, to bound time"


def bases_of(model: str, requantized: QuantConfig | None) -> list[Base]:
    """Return the bases to try: both, if the checkpoint has original weights and the result is not rounded to 4 bits."""
    both = requantized is None and not inspect_checkpoint(find_checkpoint(model)).is_4bit
    return ["dequantized", "original"] if both else ["dequantized"]


def better(tried: list[Agreement]) -> str:
    """Return the name of the base to keep."""
    best = tried[0]
    for other in tried[1:]:
        lower = (best.losses - other.losses).double()
        if lower.mean() > 2 * lower.std() / len(lower) ** 0.5:
            best = other
    return best.name


@torch.no_grad()
def run_live(
    model: str,
    adapter: str | None,
    quant: QuantConfig,
    dataset: Dataset,
    rows: Sequence[Example],
    device: str,
    file: BinaryIO,
) -> Live:
    """Run the 4-bit base with its adapter disabled and enabled; without an adapter, the checkpoint as it is."""
    if adapter is None:
        base = load_written(Path(model), device)
    else:
        base = load_model(model, quant.quant_type, quant.blocksize, quant.double_quant, torch.float32, device)
    tuned: Any = with_adapter(base, adapter)
    vocab_size = vocabulary_of(base)
    examples = []
    for example in rows:
        positions, target = supervised(torch.tensor([example.labels]))
        most = max(LOGITS_CHUNK_BYTES // (4 * vocab_size), 1)
        examples.append((torch.tensor([example.input_ids]), positions[:most], target[:most]))
    live = Live("the model" if adapter is None else LIVE, examples, vocab_size, file)
    packed = adapter is not None and choose_loss(tuned, dataset)[0] is packed_loss
    with use_packed_attention(base) if packed else nullcontext():
        for ids, positions, target in shown(examples, live.name):
            after = logits(base, ids, positions, packed)
            if adapter is None:
                live.write(after, after, target)
                continue
            with tuned.disable_adapter(), with_rows(tuned):
                live.write(logits(base, ids, positions, packed), after, target)
    del base, tuned
    gc.collect()
    return live


@torch.no_grad()
def compare(
    live: Live, name: str, path: Path, device: str, load: Callable[[Path, str], Any] = load_written
) -> Agreement:
    """Compare a checkpoint's folder, or a GGUF file, as `load` reads it, with the live adapter."""
    model = load(path, device)
    off = along = 0.0
    hits, right, losses, divergences = [], [], [], []
    for (ids, positions, target), (before, after) in zip(shown(live.examples, f"{name} model"), live.read()):
        z = logits(model, ids, positions, False)
        off += (z - after).double().square().sum().item()
        along += ((z - before).double() * (after - before)).sum().item()
        hits.append(z.argmax(-1) == after.argmax(-1))
        right.append(z.argmax(-1) == target)
        each = nn.functional.kl_div(z.log_softmax(-1), after.log_softmax(-1), reduction="none", log_target=True)
        divergences.append(each.sum(-1))
        losses.append(nn.functional.cross_entropy(z, target, reduction="none"))
    del model
    gc.collect()
    changes = live.agreement.off is not None
    shares = ((off / live.effect) ** 0.5, along / live.effect) if changes else (None, None)
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    return Agreement(name, *shares, mean(hits), torch.cat(losses), mean(divergences), mean(right), nbytes)


def mean(pieces: list[Tensor]) -> float:
    return torch.cat(pieces).double().mean().item()


def shown(examples: list[Any], what: str) -> Iterable[Any]:
    """Return the examples with a progress bar on a terminal, which is removed at the end."""
    console = Console(stderr=True)
    return track(examples, f"verify: {what}", console=console, transient=True, disable=not console.is_terminal)
