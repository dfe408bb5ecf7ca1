"""Choice of a model's loss function, and the mean loss over a dataset."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from onecard.adapter.tokens import vocabulary_of
from onecard.config import LOSS_PROBE_TOKENS
from onecard.data.dataset import Dataset
from onecard.data.loader import Loader
from onecard.data.packing import collate
from onecard.hf.attention import NotPacked, supports_packing, use_packed_attention
from onecard.hf.fused import unfuse, unfused
from onecard.infer.check import check_computes
from onecard.kernels.cpu.contention import sharing_cores
from onecard.nn.embedding import device_of
from onecard.train.loss import IGNORE, packed_loss, plain_loss, to_device
from onecard.train.ranks import WORK, Ranks
from onecard.train.run import LossFunction


def choose_loss(model: Any, examples: Dataset) -> tuple[LossFunction, str | None]:
    """Choose the packed loss if it equals that of the model's own modules on two short documents, else the plain loss.

    If the fused modules change the plain loss, they are unfused.

    Returns:
        the loss function, and the reason for the plain loss (None for the packed loss).
    """
    base = inner(model)
    batch = to_device(probe_batch(examples), device_of(base))
    check_computes(base, batch["input_ids"][:, : batch["cu_seqlens"][1]])
    num_tokens = int((batch["labels"] != IGNORE).sum())
    # A mean of about 46 losses. Their logits differ by a few roundings of the compute dtype, half an eps each.
    eps = torch.finfo(base.config.quantization_config.bnb_4bit_compute_dtype).eps

    def same(found: float, expected: float) -> bool:
        return abs(found - expected) <= max(4 * eps, 1e-4) * max(1.0, abs(expected))

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with unfused():
                expected = plain_loss(base, batch, num_tokens).item()
            why = f"{base.config.model_type} has attention of its own kind"
            if supports_packing(base):
                try:
                    with use_packed_attention(base):
                        found = packed_loss(base, batch, num_tokens).item()
                    if same(found, expected):
                        return packed_loss, None
                    why = f"the packed loss differs from the model's own ({found:.5f}, {expected:.5f})"
                except NotPacked as reason:
                    why = f"{base.config.model_type} {reason}"
            if not same(plain_loss(base, batch, num_tokens).item(), expected):
                unfuse(base)
            return plain_loss, why
    finally:
        model.train(training)


def probe_batch(examples: Dataset) -> dict[str, Any]:
    """Build a row of two short documents; all tokens but each document's first are supervised."""
    batch = collate([*examples.examples[:2], examples.examples[0]][:2])
    spans = list(zip(batch["cu_seqlens"], batch["cu_seqlens"][1:]))[:2]
    ids = [batch["input_ids"][0, start : min(end, start + LOSS_PROBE_TOKENS)] for start, end in spans]
    labels = [torch.cat([torch.tensor([IGNORE]), piece[1:]]) for piece in ids]
    return {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(piece)) for piece in ids])[None],
        "cu_seqlens": [0, len(ids[0]), len(ids[0]) + len(ids[1])],
    }


def attention_of(model: PreTrainedModel, loss: LossFunction) -> AbstractContextManager:
    """Return the attention that a loss needs: packed for the packed loss, else the model's own."""
    return use_packed_attention(model) if loss is packed_loss else nullcontext()


def mean_loss(model: PreTrainedModel, dataset: Dataset, loss: LossFunction, ranks: Ranks | None = None) -> float:
    """Return the mean cross-entropy per supervised token, in nats. The caller sets the attention that `loss` needs.

    Args:
        ranks: the processes that share the rows; default: this one alone.
    """
    training, ranks = model.training, ranks or Ranks()
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # of losses, of tokens
    device = next(model.parameters()).device
    loader = Loader(dataset.examples, dataset.row_tokens, True, 1, 0)
    with torch.no_grad(), ranks.in_step(model):
        for number in ranks.share(list(range(loader.num_batches(0)))):
            loader.load_state_dict({"epoch": 0, "batch": number})
            batch = to_device(loader.next_batch(), device)
            count = int((batch["labels"] != IGNORE).sum())
            sums += torch.tensor([loss(model, batch, count).item() * count, count], dtype=torch.float64)
    model.train(training)
    ranks.wait(WORK)
    total, num_tokens = ranks.sum(sums).tolist()
    return total / num_tokens


def inner(model: Any) -> Any:
    """Return transformers' model, unwrapped from peft's model if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_size(config: Any) -> tuple[int | None, int | None]:
    """Return the vocabulary size and the number of positions from a model's config."""
    text = config.get_text_config()
    return getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)


def evaluate(model: Any, dataset: Dataset, loss: LossFunction | None = None, ranks: Ranks | None = None) -> float:
    """Return `mean_loss` of a loaded model, with or without an adapter.

    Args:
        loss: the result of choose_loss for the model; None calls choose_loss, which runs a few short forwards.
        ranks: same as in `mean_loss`.
    """
    base = inner(model)
    dataset.check_fits(vocabulary_of(base), model_size(base.config)[1])
    loss = loss or choose_loss(model, dataset)[0]
    with attention_of(base, loss), sharing_cores():
        return mean_loss(base, dataset, loss, ranks)
