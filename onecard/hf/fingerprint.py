"""A hash of a loaded base: of all tensors that it computes with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from onecard.nn.experts import weights_of
from onecard.paging.sharded import Shards
from onecard.paging.weights import SLICE_ROWS, PagedEmbedding, PagedHead


def fingerprint(model: PreTrainedModel) -> str:
    """Return sha256 of a loaded base, paged, sharded or not: of codes, scales and all other tensors."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        for key, tensor in held_tensors(module):
            digest.update(f"{name}.{key}".encode())
            digest.update(as_bytes(tensor))
    return digest.hexdigest()


def held_tensors(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's own tensors; paged ones are paged in, and an embedding is in pieces."""
    stored = dict(weights_of(module))
    for name, weight in stored.items():
        packed, state = weight.stored()
        named = [(name, packed), ("absmax", state.absmax), ("nested_absmax", state.nested_absmax),
                 ("nested_offset", state.nested_offset)]  # fmt: skip
        yield from ((key, tensor) for key, tensor in named if tensor is not None)
    if isinstance(module, PagedEmbedding):
        yield from (("weight", piece) for piece in module.slices())
    elif isinstance(module, PagedHead):
        yield "weight", module.weight
    for key, parameter in module.named_parameters(recurse=False):
        if key in stored or isinstance(module, Shards):  # `stored` of the linears has read these
            continue
        pieces = parameter.split(SLICE_ROWS) if isinstance(module, torch.nn.Embedding) else [parameter]
        yield from ((key, piece) for piece in pieces)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, without a copy if it is contiguous in host memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
