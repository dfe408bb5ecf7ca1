"""Does a merged checkpoint do what the live adapter does? Logits and loss of both on the same rows.

difference = ||z_merged - z_live|| / ||z_live - z_base||        the share of the adapter's effect that is off
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from onecard.data.dataset import Dataset
from onecard.infer.adapters import with_adapter
from onecard.train.loss import IGNORE


@dataclass
class Agreement:
    """How near a merged model is to base and adapter together, over the supervised positions."""

    difference: float
    argmax: float
    loss_live: float
    loss_merged: float


@torch.no_grad()
def compare(base: Any, adapter: str, merged: str, dataset: Dataset, num_examples: int = 32) -> Agreement:
    """Run the 4-bit base with and without its adapter and the merged model on the first examples."""
    examples = dataset.examples[:num_examples]
    without = [logits(base, example.input_ids, example.labels)[0] for example in examples]
    live = with_adapter(base, adapter)
    dtype = base.config.quantization_config.bnb_4bit_compute_dtype
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype, local_files_only=True).eval()
    effect = off = 0.0
    hits = total = 0
    losses = [0.0, 0.0]
    for example, before in zip(examples, without):
        z_live, target = logits(live, example.input_ids, example.labels)
        z_merged, _ = logits(plain, example.input_ids, example.labels)
        effect += (z_live - before).square().sum().item()
        off += (z_merged - z_live).square().sum().item()
        hits += int((z_live.argmax(-1) == z_merged.argmax(-1)).sum())
        total += len(target)
        for i, z in enumerate((z_live, z_merged)):
            losses[i] += torch.nn.functional.cross_entropy(z, target, reduction="sum").item()
    return Agreement((off / effect) ** 0.5 if effect else float("inf"), hits / total, *(x / total for x in losses))


def logits(model: Any, input_ids: list[int], labels: list[int]) -> tuple[Tensor, Tensor]:
    """float32 (P, V) at the positions whose next token is learned, and those tokens, (P,)."""
    target = torch.tensor(labels[1:])
    learned = target != IGNORE
    z = model(input_ids=torch.tensor([input_ids]), use_cache=False).logits[0, :-1]
    return z[learned].float(), target[learned]
