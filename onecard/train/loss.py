"""Cross-entropy over the vocabulary head without the full logits.

    loss = sum over supervised positions of (logsumexp(z) - z[target]) / N,    z = cap(scale * h W^T + b)

The head runs on supervised positions only, one chunk of rows at a time. The gradient of a chunk's logits overwrites
them, N dz = softmax(z) - onehot(target), and the gradient of h is computed from it at once. Peak extra memory is one
chunk of logits, for any length and vocabulary. N counts the whole accumulation window, so that 8 x 1, 4 x 2 and 1 x 8
are the same update.

A loss on preferences weighs each token's loss by a factor that is known only after all of them. A token's loss depends
on its own row of h alone, so the backward multiplies that row's gradient by the factor. The memory is the same.

Shape suffixes: P supervised positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from onecard.adapter.tokens import head_parts
from onecard.config import ROW_MULTIPLE, logits_chunk_bytes
from onecard.hf.attention import NotPacked
from onecard.kernels import ops
from onecard.kernels.cpu import allocator
from onecard.nn.embedding import NewRows, project, project_back

IGNORE = -100
LOGIT_FIELDS = ("logit_scale", "logits_scaling", "final_logit_softcapping")
ROWS_SCALED = 256  # rows of gradients that exist in float32 at a time


@cache
def source_of(kind: type) -> str | None:
    """Return the source of a model's class and of its own bases; None if there is none."""
    bases = kind.__mro__[: kind.__mro__.index(PreTrainedModel)] if PreTrainedModel in kind.__mro__ else (kind,)
    try:
        return "".join(map(inspect.getsource, bases))
    except (OSError, TypeError):
        return None


@dataclass(frozen=True)
class LogitTransform:
    """A model family's transform between the head's product and the softmax."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> LogitTransform:
        """Read the text model's config: Cohere multiplies by logit_scale, Granite divides by logits_scaling, Gemma-2
        caps. A value that the model's class does not read has no effect: Aya Vision has Cohere's layers alone."""
        config, source = model.config.get_text_config(), source_of(type(model))
        found = {name: getattr(config, name, None) for name in LOGIT_FIELDS if source is None or name in source}
        scale = (found.get("logit_scale") or 1.0) / (found.get("logits_scaling") or 1.0)
        return cls(float(scale), found.get("final_logit_softcapping"))

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale if self.scale != 1.0 else z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def backward(self, dz: Tensor, z: Tensor) -> Tensor:
        """Return the gradient of the transform's input, from the gradient `dz` of its output `z`."""
        if self.softcap is not None:
            dz = dz * (1 - (z / self.softcap) ** 2)
        return dz * self.scale if self.scale != 1.0 else dz


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_PH, W_VH, bias, rows_NH, target_P, transform, num_tokens, new):
        losses_P, grad_PH, dz_PN = losses_and_gradients(h_PH, W_VH, bias, target_P, transform, new)
        ctx.save_for_backward(grad_PH, dz_PN, None if new is None else h_PH)
        ctx.num_tokens = num_tokens
        return (losses_P.double().sum() / num_tokens).float()

    @staticmethod
    def backward(ctx, grad_loss):
        # Divide here, where grad_loss includes the loss scale: 1 / N alone can underflow in float16.
        grad_PH, dz_PN, h_PH = ctx.saved_tensors
        factor = grad_loss / ctx.num_tokens
        grad_NH = None if dz_PN is None else factor * (dz_PN.T @ h_PH.float())
        return (grad_PH * factor).to(grad_PH.dtype), None, None, grad_NH, None, None, None, None


class _ChunkedTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_PH, W_VH, bias, rows_NH, target_P, transform, new):
        losses_P, grad_PH, dz_PN = losses_and_gradients(h_PH, W_VH, bias, target_P, transform, new)
        ctx.save_for_backward(grad_PH, dz_PN, None if new is None else h_PH)
        return losses_P

    @staticmethod
    def backward(ctx, grad_P):
        grad_PH, dz_PN, h_PH = ctx.saved_tensors
        scaled_PH = torch.empty_like(grad_PH)
        for out, rows, factors in zip(*(t.split(ROWS_SCALED) for t in (scaled_PH, grad_PH, grad_P))):
            out.copy_(rows * factors[:, None])  # in float32, for a few rows at a time
        grad_NH = None if dz_PN is None else (dz_PN * grad_P[:, None]).T @ h_PH.float()
        return scaled_PH, None, None, grad_NH, None, None, None


def losses_and_gradients(
    h_PH: Tensor,
    W_VH: Tensor,
    bias: Tensor | None,
    target_P: Tensor,
    transform: LogitTransform,
    new: NewRows | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return each position's cross-entropy, float32 (P,), and its gradients: in that position's row of h, (P, H), and
    in its logits of new rows, float32 (P, N), or None without such rows."""
    num_positions = len(target_P)
    filler = -num_positions % ROW_MULTIPLE
    h_PH, target_P = nn.functional.pad(h_PH, (0, 0, 0, filler)), nn.functional.pad(target_P, (0, filler))
    grad_PH = torch.empty_like(h_PH)
    losses, grads_PN = [], []
    itemsize = h_PH.dtype.itemsize if transform == LogitTransform() else 4
    rows = chunk_rows(len(target_P), W_VH.shape[0], itemsize, h_PH.device)
    for h, grad, target in zip(h_PH.split(rows), grad_PH.split(rows), target_P.split(rows)):
        z = project(h, W_VH, bias)
        if new is not None:
            z = new.extend(z, h)
        if transform != LogitTransform():
            z = transform(z.float())
        dz = z.clone() if transform.softcap is not None else z
        losses.append(ops.cross_entropy_(dz, target))
        dz = transform.backward(dz, z).to(h.dtype)
        if new is None:
            grad.copy_(project_back(dz, W_VH))
        else:
            dz, dz_PN = new.split_(dz)
            grad.copy_(project_back(dz, W_VH) + dz_PN @ new.rounded(h.dtype))
            grads_PN.append(dz_PN.float())
        del z, dz  # before the next chunk allocates its own
    dz_PN = torch.cat(grads_PN)[:num_positions] if grads_PN else None
    return torch.cat(losses)[:num_positions], grad_PH[:num_positions], dz_PN


def chunked_cross_entropy(
    h_PH: Tensor, head: nn.Module, target_P: Tensor, transform: LogitTransform, num_tokens: int
) -> Tensor:
    """Return the summed cross-entropy divided by `num_tokens`, float32 ().

    Args:
        h_PH: hidden states of the supervised positions, in the compute dtype.
        head: the model's output embedding. A frozen linear, also one with rows of new tokens, uses the fast path. Any
            other head (with LoRA, or trained in full) goes through autograd and recomputes its logits.
        target_P: int64, the token that each position must predict.
    """
    own, new = head_parts(head)
    if is_frozen_linear(own):
        rows_NH = None if new is None else new.rows_NH
        return _ChunkedCrossEntropy.apply(h_PH, own.weight, own.bias, rows_NH, target_P, transform, num_tokens, new)  # type: ignore[return-value]
    parts = recomputed_losses(h_PH, head, target_P, transform, "sum")
    return sum(parts, h_PH.new_zeros((), dtype=torch.float32)) / num_tokens


def chunked_token_losses(h_PH: Tensor, head: nn.Module, target_P: Tensor, transform: LogitTransform) -> Tensor:
    """Return the cross-entropy of each position, float32 (P,). The arguments are those of `chunked_cross_entropy`."""
    own, new = head_parts(head)
    if is_frozen_linear(own):
        rows_NH = None if new is None else new.rows_NH
        return _ChunkedTokenLosses.apply(h_PH, own.weight, own.bias, rows_NH, target_P, transform, new)  # type: ignore[return-value]
    return torch.cat(recomputed_losses(h_PH, head, target_P, transform, "none"))


def is_frozen_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(head, nn.Linear) and not any(p.requires_grad for p in head.parameters())


def recomputed_losses(
    h_PH: Tensor, head: nn.Module, target_P: Tensor, transform: LogitTransform, reduction: str
) -> list[Tensor]:
    """Return the cross-entropy of each chunk, for any head. The backward recomputes the logits."""

    def part(h: Tensor, target: Tensor) -> Tensor:
        z = transform(head(h).float())
        return nn.functional.cross_entropy(z, target, reduction=reduction)

    rows = chunk_rows(len(target_P), getattr(head, "out_features", None) or 1 << 16, 4, h_PH.device)
    pairs = zip(h_PH.split(rows), target_P.split(rows))
    return [checkpoint(part, h, target, use_reentrant=False) for h, target in pairs]


def chunk_rows(num_positions: int, vocab_size: int, itemsize: int, device: torch.device) -> int:
    """Return the rows of a chunk of logits, a multiple of ROW_MULTIPLE. Chunks are as equal as possible. A chunk with
    more than ROW_MULTIPLE rows has at most logits_chunk_bytes."""
    multiples = max(logits_chunk_bytes(device.type) // (itemsize * vocab_size * ROW_MULTIPLE), 1)
    needed = -(-num_positions // ROW_MULTIPLE)
    chunks = max(-(-needed // multiples), 1)
    return max(-(-needed // chunks), 1) * ROW_MULTIPLE


def supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions whose next token is supervised, int64 (P,), and those tokens, int64 (P,), from labels (1, T).

    Labels must be on the host. P is a shape, and reading it from a GPU needs a sync.
    """
    position = (labels[0, 1:] != IGNORE).nonzero()[:, 0]
    return position, labels[0, position + 1]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy a micro-batch to the device without a sync. Labels stay on the host (`supervised` says why)."""
    position, target = supervised(batch["labels"])
    tensors = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    moved = {key: upload(tensor, device) for key, tensor in tensors.items()}
    return {**batch, **moved, "supervised": (upload(position, device), upload(target, device))}


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def packed_loss(model: PreTrainedModel, batch: dict[str, Any], num_tokens: int) -> Tensor:
    """Compute the loss of one packed row: the decoder once, then the head on supervised positions only.

    Needs `use_packed_attention`. `model` is transformers' own, with the adapters inside.
    """
    return head_loss(model, decode(model, batch), batch, num_tokens)


def decode(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return the last hidden states of a packed row, (1, T, H). Raises NotPacked if the model's base gives none."""
    found = model.base_model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,
        **{key: batch[key] for key in ("cu_seqlens", "longest") if key in batch},
    )
    if getattr(found, "last_hidden_state", None) is None:
        raise NotPacked("gives no hidden states from its base")
    return found.last_hidden_state


def head_loss(model: PreTrainedModel, hidden: Tensor, batch: dict[str, Any], num_tokens: int) -> Tensor:
    """Compute the loss from a row's hidden states, (1, T or more, H). Positions after the row's own T are ignored."""
    with released_blocks():
        return chunked_cross_entropy(*head_inputs(model, hidden, batch), num_tokens)


def head_token_losses(model: PreTrainedModel, hidden: Tensor, batch: dict[str, Any]) -> Tensor:
    """Same as `head_loss`, for each supervised position: float32 (P,)."""
    with released_blocks():
        return chunked_token_losses(*head_inputs(model, hidden, batch))


@contextmanager
def released_blocks() -> Iterator[None]:
    """Release free blocks of memory before and after the head."""
    allocator.release()  # logits cannot reuse the layers' blocks, which have other sizes
    yield
    allocator.release()  # the logits' blocks would stay unused for the whole backward


def head_inputs(model: PreTrainedModel, hidden: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Any, Tensor, Any]:
    """Return the hidden states of the supervised positions, the head, the tokens to predict, and the transform."""
    position, target = batch["supervised"]
    head: Any = model.get_output_embeddings()
    return hidden[0].index_select(0, position), head, target, LogitTransform.of(model)


def plain_loss(model: PreTrainedModel, batch: dict[str, Any], num_tokens: int) -> Tensor:
    """Same as `packed_loss`, slower but for any model: its own forward, one document at a time, with full logits."""
    total = torch.zeros((), device=batch["input_ids"].device)
    return sum(document_losses(model, batch, "sum"), total) / num_tokens


def plain_token_losses(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Same as `plain_loss`, for each supervised position: float32 (P,)."""
    return torch.cat(list(document_losses(model, batch, "none")))


def document_losses(model: PreTrainedModel, batch: dict[str, Any], reduction: str) -> Iterator[Tensor]:
    """Yield the losses of each document's supervised positions, from the model's own forward."""
    for start, end in zip(batch["cu_seqlens"], batch["cu_seqlens"][1:]):
        position, target = (t.to(batch["input_ids"].device) for t in supervised(batch["labels"][:, start:end]))
        if len(position):
            logits = model(input_ids=batch["input_ids"][:, start:end], use_cache=False).logits[0, position]
            yield nn.functional.cross_entropy(logits.float(), target, reduction=reduction)
