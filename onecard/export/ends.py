"""Embedding and head in an export: by which names, whether as one weight, and what training has made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onecard.adapter.targets import tied
from onecard.adapter.update import Adapter
from onecard.errors import UserError
from onecard.export.folder import Shapes, read_tensor
from onecard.hf.checkpoint import Checkpoint, TensorInfo
from onecard.hf.skeleton import Model

HEAD = "lm_head.weight"
TIE = "tie_word_embeddings"
PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Ends:
    """What a checkpoint calls the weights of embedding and head, and how its config.json speaks of them.

    Attributes:
        is_tied: whether head and embedding are one weight, as the config says.
        part: where config.json describes the text model; None: at the top.
    """

    embedding: str
    head: str
    is_tied: bool
    part: str | None

    @classmethod
    def of(cls, known: Model) -> Ends:
        modules = known.modules
        own = {module: f"{name}.weight" for name, module in modules.named_modules()}
        embedding, head = own[modules.get_input_embeddings()], own.get(modules.get_output_embeddings(), HEAD)
        text = modules.config.get_text_config()
        part = next((key for key, value in vars(modules.config).items() if value is text), None)
        stored = known.stored
        return cls(stored.get(embedding, embedding), stored.get(head, head), tied(modules), part)

    def with_true_ties(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint whose config ties its head, as its tensors have it.

        transformers uses a head of the file that differs from the embedding, whatever the config says: the config is
        corrected. A head that is the same is left out.
        """
        tensors = checkpoint.tensors
        if not self.is_tied or self.head not in tensors or self.embedding not in tensors:
            return checkpoint
        if same_bytes(tensors[self.head], tensors[self.embedding]):
            return replace(checkpoint, tensors={name: info for name, info in tensors.items() if name != self.head})
        return replace(checkpoint, config=self.changed(checkpoint.config, tie_word_embeddings=False))

    def changed(self, config: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """config.json with other values, at the top and in the text model's part."""
        if self.part is None:
            return {**config, **fields}
        top = {key: value for key, value in fields.items() if key in config or key == TIE}  # which all models look at
        return {**config, **top, self.part: {**(config.get(self.part) or {}), **fields}}


def saved_tensors(
    adapter: Adapter, checkpoint: Checkpoint, shapes: Shapes, ends: Ends
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors that are not the base's, and config.json for the result.

    A head or an embedding trained on its own unties the two; tokens added in training change the vocabulary's size.
    """
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    saved = dict(adapter.saved)
    for name, (rows, values) in adapter.tokens.items():
        stored = checkpoint.tensors.get(name if name in shapes else ends.embedding)
        if stored is None or len(rows) != len(values):
            found = f"{len(values)} rows for {len(rows)} tokens of {name}"
            raise UserError("trained tokens must be an embedding's", found, "use their own model", str(adapter.folder))
        W = saved[name].clone() if name in saved else read_tensor(stored)
        W[rows] = values.to(W.dtype)
        saved[name] = W
    both = (ends.embedding, ends.head)
    for name in set(saved) - set(shapes) - {ends.head}:
        raise UserError("a module saved in full must be the model's", name, "use its own model", str(adapter.folder))
    trained = set(both) & set(adapter.saved)
    if trained and ends.is_tied and ends.head not in shapes:
        stays = settle_ties(adapter, saved, ends, checkpoint)
        config = ends.changed(config, tie_word_embeddings=stays)
    if trained:
        found = {name: tensor.shape[0] for name, tensor in saved.items() if name in both}
        found = {name: shapes[name][1][0] for name in both if name in shapes} | found
        if len(set(found.values())) > 1:
            do = "train both in full: modules_to_save embed_tokens and lm_head"
            raise UserError("embedding and head must have the same tokens", str(found), do, str(adapter.folder))
        config = ends.changed(config, vocab_size=min(found.values()))
    return saved, config


def settle_ties(adapter: Adapter, saved: dict[str, Tensor], ends: Ends, checkpoint: Checkpoint) -> bool:
    """Give `saved` an embedding and a head where the base has one for both; whether they are still the same."""
    base = read_tensor(checkpoint.tensors[ends.embedding])
    head = saved.pop(ends.head, None)
    if adapter.stays_tied:
        head = saved.get(ends.embedding, head)
        saved[ends.embedding] = base if head is None else head
    head = base if head is None else head
    if torch.equal(head, saved.setdefault(ends.embedding, base)):
        return True
    saved[ends.head] = head
    return False


def same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two stored tensors are the same, read piece by piece."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        pieces = [min(PIECE_BYTES, one.nbytes - at) for at in range(0, one.nbytes, PIECE_BYTES)]
        return all(first.read(size) == second.read(size) for size in pieces)
