"""Compare a merged checkpoint with the live adapter: logits and loss of each on the same held-out tokens.

    off by  ||z - z_live|| / ||z_live - z_base||                      the share of the adapter's effect that is missed
    kept    <z - z_base, z_live - z_base> / ||z_live - z_base||^2     the share of the effect that is present

z are logits at supervised positions, all computed in float32 from the stored weights, so that the numbers measure the
weights and not 16-bit arithmetic. The live model runs as in training (packed attention where that reproduces the
model's own). The written checkpoint is read back from its files and runs with transformers' attention. One model is in
memory at a time; the live model's logits are in an unnamed temporary file.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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
from onecard.config import LOGITS_CHUNK_BYTES, QuantConfig
from onecard.data.chat.mask import Example
from onecard.data.dataset import Dataset
from onecard.errors import UserError
from onecard.export.folder import check_room, new_folder
from onecard.export.merge.merged import Base, open_merged, write_merged
from onecard.export.merge.quantized import Kept, check_type, write_quantized
from onecard.hf.attention import use_packed_attention
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.head import model_class
from onecard.hf.load import find_checkpoint, load_model, pick_device
from onecard.hf.skeleton import read_config
from onecard.nn.embedding import Head, cast_output, device_of
from onecard.train.evaluate import choose_loss
from onecard.train.loss import packed_loss, supervised

NOTHING = 1e-12  # of ||z||^2: a smaller effect is rounding
NUM_EXAMPLES, NUM_TOKENS = 32, 8192  # at most, of the data for the comparison


@dataclass
class Agreement:
    """How close a checkpoint is to the live adapter.

    Attributes:
        off, kept: None if the adapter changes nothing.
        argmax: share of positions with the live adapter's likeliest token.
        losses: float32 (P,), the loss of each position.
    """

    name: str
    off: float | None
    kept: float | None
    argmax: float
    losses: Tensor

    @property
    def loss(self) -> float:
        return self.losses.double().mean().item()


@dataclass
class Verified:
    """A merged checkpoint and the comparison that chose it."""

    folder: Path
    kept: str
    live: Agreement
    tried: list[Agreement]
    in_weights: Kept | None = None  # how much of the update 4 bits keep; None in 16 bits

    def table(self) -> list[str]:
        """Return the lines for the terminal."""
        lines = [f"{'':14s}{'off by':>9s}{'effect kept':>13s}{'same token':>12s}{'loss':>9s}"]
        for found in (self.live, *self.tried):
            shares = [f"{share:.2%}" if share is not None else "-" for share in (found.off, found.kept)]
            line = f"{found.name:14s}{shares[0]:>9s}{shares[1]:>13s}{found.argmax:>12.2%}{found.loss:>9.4f}"
            lines.append(line + ("  kept" if found.name == self.kept and len(self.tried) > 1 else ""))
        if self.live.off is None:
            lines.append("the adapter changes nothing on these tokens: there is no effect to have a share of")
        return lines


@dataclass
class Live:
    """Logits of the base without and with its adapter, in a file, one example after the other."""

    examples: list[tuple[Tensor, Tensor, Tensor]]  # input_ids (1, T); positions (P,) and their targets (P,)
    vocab_size: int
    file: BinaryIO
    losses: list[Tensor] = field(default_factory=list)
    size: float = 0.0
    effect: float = 0.0

    def write(self, before: Tensor, after: Tensor, target: Tensor) -> None:
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
        return Agreement("live adapter", *share, 1.0, torch.cat(self.losses))


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
    model: str, adapter: str, quant: QuantConfig, dataset: Dataset, rows: Sequence[Example], device: str, file: BinaryIO
) -> Live:
    """Run the 4-bit base with its adapter disabled and enabled."""
    base = load_model(model, quant.quant_type, quant.blocksize, quant.double_quant, torch.float32, device)
    tuned = with_adapter(base, adapter)
    vocab_size = vocabulary_of(base)
    examples = []
    for example in rows:
        positions, target = supervised(torch.tensor([example.labels]))
        most = max(LOGITS_CHUNK_BYTES // (4 * vocab_size), 1)
        examples.append((torch.tensor([example.input_ids]), positions[:most], target[:most]))
    live = Live(examples, vocab_size, file)
    packed = choose_loss(tuned, dataset)[0] is packed_loss
    with use_packed_attention(base) if packed else nullcontext():
        for ids, positions, target in shown(examples, "live adapter"):
            with tuned.disable_adapter(), with_rows(tuned):
                before = logits(base, ids, positions, packed)
            live.write(before, logits(base, ids, positions, packed), target)
    del base, tuned
    gc.collect()
    return live


@torch.no_grad()
def compare(live: Live, name: str, folder: Path, device: str) -> Agreement:
    """Compare the checkpoint in a folder with the live adapter."""
    model = load_written(folder, device)
    off = along = 0.0
    hits, losses = [], []
    for (ids, positions, target), (before, after) in zip(shown(live.examples, f"{name} base"), live.read()):
        z = logits(model, ids, positions, False)
        off += (z - after).double().square().sum().item()
        along += ((z - before).double() * (after - before)).sum().item()
        hits.append(z.argmax(-1) == after.argmax(-1))
        losses.append(nn.functional.cross_entropy(z, target, reduction="none"))
    del model
    gc.collect()
    changes = live.agreement.off is not None
    shares = ((off / live.effect) ** 0.5, along / live.effect) if changes else (None, None)
    return Agreement(name, *shares, torch.cat(hits).float().mean().item(), torch.cat(losses))


def shown(examples: list[Any], what: str) -> Iterable[Any]:
    """Return the examples with a progress bar on a terminal, which is removed at the end."""
    console = Console(stderr=True)
    return track(examples, f"verify: {what}", console=console, transient=True, disable=not console.is_terminal)


def load_written(folder: Path, device: str) -> Any:
    """Load a checkpoint that computes in float32. Linears and embeddings keep the file's dtype and are cast at use."""
    if inspect_checkpoint(folder).is_4bit:
        return load_model(str(folder), compute_dtype=torch.float32, device=device)
    kind = model_class(read_config(folder))
    model: Any = kind.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Head(module))
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(cast_output(torch.float32))
    for module in model.modules():
        if not isinstance(module, (Head, nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return model.to(device)


def logits(model: Any, ids: Tensor, positions: Tensor, packed: bool) -> Tensor:
    """Return float32 logits (P, V) at some positions of one document (1, T)."""
    ids = ids.to(device_of(model))
    how = {"cu_seqlens": [0, ids.shape[1]]} if packed else {}
    kept = positions.to(ids.device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=kept, **how).logits[0].float().cpu()
