"""Holds a family to transformers + peft + torch's AdamW on the weights that our 4 bits stand for.

A family ends on the fast path (packed rows), on the plain path, or refused with a UserError. Whatever is not refused
must be the same as the plain computation; a difference or another exception fails.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import onecard
from onecard.adapter.layers import lora_config
from onecard.adapter.load import with_adapter
from onecard.adapter.origin import origin_of
from onecard.config import TrainConfig
from onecard.data.chat.mask import Example
from onecard.data.dataset import Dataset
from onecard.data.loader import Loader
from onecard.errors import UserError
from onecard.export.merge.merged import merge
from onecard.hf.attention import use_packed_attention
from onecard.hf.names import stored_names
from onecard.infer.decoding import CachedContext, OneByOne, Uncached
from onecard.infer.graphs import make_context
from onecard.nn.experts import weights_of
from onecard.train.evaluate import choose_loss, evaluate
from onecard.train.loss import IGNORE, packed_loss
from onecard.train.run import Run
from onecard.train.session import save_adapter
from onecard.train.step import optimizer_step
from tests.families.build import class_of, make_family

STEPS = 3
WAYS = {CachedContext: "cache", OneByOne: "cache, one token a pass", Uncached: "all tokens again"}
EQUAL, MERGED = 1e-4, 1e-3  # relative, float32; a merged weight, and a scan that goes on, are rounded once more
SETTINGS: dict[str, Any] = {
    "data": "rows", "device": "cpu", "compute_dtype": "float32", "max_seq_length": 64, "r": 4, "lora_alpha": 8,
    "gradient_accumulation_steps": 1, "max_steps": STEPS, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0, "weight_decay": 0.01,
}  # fmt: skip


@dataclass
class Outcome:
    """How a family ends.

    Attributes:
        path: "fast", "plain" or "refused"; "unbuilt" where transformers does not build it.
        why: of any but the fast path.
        gaps: relative differences by what was compared.
        unmerged: why `onecard merge` refuses it.
        misread: whether peft renames some of the adapter's own keys when it loads them, and so does not find them.
        generation: how it goes on after a prompt.
    """

    family: str
    path: str = ""
    why: str = ""
    gaps: dict[str, float] = field(default_factory=dict)
    unmerged: str = ""
    misread: bool = False
    generation: str = "-"


def rows() -> Dataset:
    """Documents of several lengths, of which the first tokens are not learned."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for number, length in enumerate((23, 31, 17, 40, 29, 12)):
        ids = torch.randint(5, 250, (length,), generator=generator).tolist()
        examples.append(Example(ids, [IGNORE] * 4 + ids[4:], f"row {number}"))
    return Dataset(examples, "text", SETTINGS["max_seq_length"])


def check(family: str, folder: Path, **settings: Any) -> Outcome:
    """Build a family's checkpoint in a folder and hold it to what plain libraries compute.

    Args:
        settings: of the training, beside SETTINGS.

    Raises:
        AssertionError: a difference.
    """
    outcome = Outcome(family)
    try:
        base = make_family(folder / "base", family)
    except Exception as error:
        outcome.path, outcome.why = "unbuilt", " ".join(str(error).split())[:120]
        return outcome
    try:
        hold(outcome, base, folder, settings)
    except UserError as error:
        outcome.path, outcome.why = "refused", f"{error.must}: {error.found}"[:200]
    return outcome


def hold(outcome: Outcome, base: Path, folder: Path, settings: dict[str, Any]) -> None:
    """The whole way of one family, each part compared."""
    config = TrainConfig(model=str(base), output=str(folder / "run"), **SETTINGS, **settings)
    ours = onecard.load_model(str(base), compute_dtype=torch.float32, device="cpu")
    dataset = rows()
    torch.manual_seed(config.seed)
    live = get_peft_model(ours, lora_config(config, ours))
    run = Run(config, live, Loader(dataset.examples, 64, True, 1, config.seed), STEPS, {})
    run.loss, reason = choose_loss(live, dataset)
    outcome.path, outcome.why = "plain" if reason else "fast", reason or ""
    twin = dequantized(ours, base)
    ids = torch.tensor([dataset.examples[3].input_ids])
    compare(outcome, "logits", logits(live, ids), logits(twin, ids))  # B is zero: the adapter changes nothing yet
    plain = plain_peft(live, twin)
    found, expected = train_ours(run, dataset), train_plain(plain, config, dataset)
    compare(outcome, "losses", torch.tensor(found), torch.tensor(expected))
    check_plan(ours, base)
    check_generation(outcome, live, ids)
    save_adapter(live, folder / "adapter", origin_of(ours, str(base)))
    check_merged(outcome, live, plain, base, folder, ids)


def compare(outcome: Outcome, what: str, found: Tensor, expected: Tensor, bound: float = EQUAL) -> None:
    """Note the greatest difference relative to the greatest value; raise AssertionError above `bound`."""
    gap = float((found - expected).abs().max() / expected.abs().max())
    outcome.gaps[what] = gap
    assert gap < bound, f"{outcome.family}: {what} differ by {gap:.1e}, {outcome.path or 'loaded'}"


def check_plan(ours: Any, base: Path) -> None:
    """The plan counts the bytes that the loaded base holds."""
    planned = {term.name: term.num_bytes for term in onecard.plan(str(base), compute_dtype="float32", r=4).terms}
    weights = [weight for module in ours.modules() for _, weight in weights_of(module)]
    codes = {id(weight.weight): weight.weight.nbytes for weight in weights}
    others = [p.nbytes for name, p in ours.named_parameters() if id(p) not in codes and "lora_" not in name]
    assert sum(size for name, size in planned.items() if name.endswith("4-bit codes")) == sum(codes.values())
    assert planned["base, scales"] == sum(weight.loaded_state.nbytes for weight in weights)
    assert planned["embeddings, norms, head"] == sum(others)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits


def dequantized(ours: Any, base: Path) -> Any:
    """transformers' own model with the weights that ours stand for."""
    twin: Any = class_of(base).from_pretrained(base, dtype=torch.float32).eval()
    modules = dict(twin.named_modules())
    for name, module in ours.named_modules():
        name = name.replace(".base_layer", "")
        for leaf, weight in weights_of(module):
            W, target = weight.dequantize(), getattr(modules[name], leaf).data
            target.copy_(W.T if isinstance(modules[name], Conv1D) else W)
    return twin


def plain_peft(live: Any, twin: Any) -> Any:
    """peft's own adapter on the twin, from the same start."""
    settings = live.peft_config["default"]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=settings.target_modules,
        target_parameters=settings.target_parameters,
        task_type="CAUSAL_LM",
    )
    plain = get_peft_model(twin, config)
    start = {name: p for name, p in live.named_parameters() if p.requires_grad}
    learned = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert start.keys() == learned.keys(), sorted(start.keys() ^ learned.keys())[:4]
    for name, parameter in learned.items():
        parameter.data.copy_(start[name].data)
    return plain


def train_ours(run: Run, dataset: Dataset) -> list[float]:
    """The losses of STEPS updates by the run's own path, and the loss on all rows after them."""
    run.model.train()
    if run.loss is packed_loss:
        with use_packed_attention(run.base):
            losses = [optimizer_step(run)["loss"] for _ in range(STEPS)]
    else:
        losses = [optimizer_step(run)["loss"] for _ in range(STEPS)]
    return [*losses, evaluate(run.model, dataset, run.loss)]


def train_plain(model: Any, config: TrainConfig, dataset: Dataset) -> list[float]:
    """The same by a plain loop."""
    loader = Loader(dataset.examples, 64, True, 1, config.seed)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=config.learning_rate, weight_decay=config.weight_decay)
    losses = []
    for _ in range(STEPS):
        model.train()
        batch = loader.next_batch()
        edges = batch["cu_seqlens"]
        pairs = [
            (batch["input_ids"][:, a:b], batch["labels"][:, a:b])
            for a, b in zip(edges, edges[1:])
            if (batch["labels"][:, a:b] != IGNORE).any()
        ]
        loss = document_losses(model, pairs)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    pairs = [(torch.tensor([e.input_ids]), torch.tensor([e.labels])) for e in dataset.examples]
    with torch.no_grad():
        return [*losses, document_losses(model, pairs).item()]


def document_losses(model: Any, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean cross-entropy of a supervised token, each document by itself."""
    total, count = torch.zeros(()), 0
    for ids, labels in pairs:
        z = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total = total + nn.functional.cross_entropy(z, labels[0, 1:], ignore_index=IGNORE, reduction="sum")
        count += int((labels[0, 1:] != IGNORE).sum())
    return total / count


def check_generation(outcome: Outcome, live: Any, ids: Tensor) -> None:
    """What generate, chat and serve compute, piece by piece, is the model's own forward."""
    expected, tokens = logits(live, ids)[0], ids[0].tolist()
    context = make_context(live)
    outcome.generation = WAYS[type(context)]
    ends = (20, 25, 26, 27)  # a prompt, more of it, tokens one by one
    found = torch.cat([context.feed(tokens[start:end]) for start, end in zip((0, *ends), ends)])
    compare(outcome, "generation", found, expected[[end - 1 for end in ends]], MERGED)


def check_merged(outcome: Outcome, live: Any, plain: Any, base: Path, folder: Path, ids: Tensor) -> None:
    """The merged checkpoint, and the adapter as plain peft reads it, do what the live adapter does."""
    expected = logits(live, ids)
    plain.load_adapter(folder / "adapter", "saved")
    plain.set_adapter("saved")
    outcome.misread = misread(plain, live)
    if not outcome.misread:
        compare(outcome, "plain peft", logits(plain, ids), expected, MERGED)
    again = with_adapter(
        onecard.load_model(str(base), compute_dtype=torch.float32, device="cpu"), str(folder / "adapter")
    )
    compare(outcome, "read again", logits(again, ids), expected)
    try:
        merged = merge(str(base), str(folder / "adapter"), str(folder / "merged"))
    except UserError as error:
        outcome.unmerged = f"{error.must}: {error.found}"
        return
    model = class_of(base).from_pretrained(merged, dtype=torch.float32)
    compare(outcome, "merged", logits(model, ids), expected, MERGED)
    check_kept(again.get_base_model(), base, merged)


def check_kept(ours: Any, base: Path, merged: Path) -> None:
    """The merged checkpoint has the base's own bits in each tensor that is not in 4 bits."""
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    named = [(path.replace(".base_layer", ""), module) for path, module in ours.named_modules()]
    quantized = {f"{path}.{leaf}" for path, module in named for leaf, _ in weights_of(module)}
    stored = stored_names(ours, before)
    kept = [stored[own] for own in stored if own.replace(".base_layer", "") not in quantized]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def misread(plain: Any, live: Any) -> bool:
    """Whether an adapter that peft has loaded as "saved" lacks values of the one that was saved."""
    stored = {name.replace(".default.", ".saved."): p for name, p in live.named_parameters() if p.requires_grad}
    loaded = dict(plain.named_parameters())
    return any(not torch.equal(loaded[name], p) for name, p in stored.items())
