"""Embedding and head in an export: their names, whether they are tied, and their values after training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.adapter.targets import tied
from onecard.adapter.update import Adapter
from onecard.errors import UserError
from onecard.export.folder import Shapes
from onecard.hf.checkpoint import Checkpoint
from onecard.hf.documents import read_model_document
from onecard.hf.head import WEIGHT, causal_head_names, is_headed, with_labels
from onecard.hf.skeleton import Model, meta_model, read_config
from onecard.hf.stored import TensorInfo, read_tensor

HEAD = "lm_head.weight"
TIE = "tie_word_embeddings"
PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Ends:
    """A checkpoint's names for the weights of embedding and head, and what its config.json says of them.

    Attributes:
        is_tied: whether the config ties head and embedding.
        part: the key of config.json that describes the text model; None: the top level.
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
        """Return the checkpoint with ties that agree with its tensors.

        transformers uses a stored head that differs from the embedding, even if the config ties them: the config is
        corrected. A stored head that equals the embedding is left out.
        """
        tensors = checkpoint.tensors
        if not self.is_tied or self.head not in tensors or self.embedding not in tensors:
            return checkpoint
        if same_bytes(tensors[self.head], tensors[self.embedding]):
            return replace(checkpoint, tensors={name: info for name, info in tensors.items() if name != self.head})
        return replace(checkpoint, config=self.changed(checkpoint.config, tie_word_embeddings=False))

    def changed(self, config: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """Return config.json with other values, at the top level and in the text model's part."""
        if self.part is None:
            return {**config, **fields}
        top = {key: value for key, value in fields.items() if key in config or key == TIE}  # all models read TIE there
        return {**config, **top, self.part: {**(config.get(self.part) or {}), **fields}}


def with_head(checkpoint: Checkpoint, ends: Ends, adapter: Path) -> Checkpoint:
    """Return a checkpoint as one of a model with a classification head: without the vocabulary's head, and with the
    labels and the pad token that the adapter's config.json names."""
    where = str(checkpoint.folder / "config.json")
    config = read_config(checkpoint.folder)
    causal = set() if is_headed(config) else causal_head_names(meta_model(config, where))
    config = with_labels(config, checkpoint.labels, where)
    told = read_model_document(adapter) if (adapter / "config.json").is_file() else {}
    text = told.get(ends.part or "", told)
    named = {"architectures": config.architectures, "id2label": config.id2label, "label2id": config.label2id}
    found = {**checkpoint.config, **named}
    if text.get("pad_token_id") is not None:
        found = ends.changed(found, pad_token_id=text["pad_token_id"])
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in causal}
    return replace(checkpoint, tensors=tensors, config=found)


def saved_tensors(
    adapter: Adapter, checkpoint: Checkpoint, shapes: Shapes, ends: Ends
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors that replace the base's, and the result's config.json.

    Training only the head or only the embedding unties them. Tokens added in training change vocab_size.
    """
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    saved = dict(adapter.saved)
    for name, (rows, values) in adapter.tokens.items():
        stored = checkpoint.tensors.get(name if name in shapes else ends.embedding)
        if stored is None or len(rows) != len(values):
            found = f"{len(values)} rows for {len(rows)} tokens of {name}"
            raise UserError("trained tokens must be an embedding's", found, "use their own model", str(adapter.folder))
        saved[name] = with_rows(saved[name] if name in saved else read_tensor(stored), rows, values, adapter)
    for name, bias in adapter.biases.items():
        stored = checkpoint.tensors.get(name)
        if stored is None or stored.shape != tuple(bias.shape):
            found = f"no bias {name} of shape {list(bias.shape)} in the checkpoint"
            do = "use the model that the adapter was trained on; for linears without a bias, train without lora_bias"
            raise UserError("a bias of lora_B must have a bias to be added to", found, do, str(adapter.folder))
        saved[name] = read_tensor(stored).float() + bias
    both = (ends.embedding, ends.head)
    for name in set(saved) - set(shapes) - {WEIGHT if checkpoint.labels else ends.head}:
        raise UserError("a module saved in full must be the model's", name, "use its own model", str(adapter.folder))
    trained = set(both) & {*adapter.saved, *adapter.tokens}
    if set(both) & set(adapter.saved) and ends.is_tied and ends.head not in shapes:
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


def with_rows(W_VH: Tensor, rows: list[int], values: Tensor, adapter: Adapter) -> Tensor:
    """Return an embedding's or head's weight with trained rows; those of new tokens follow the others.

    Raises:
        UserError: they leave a gap.
    """
    num_rows = len(W_VH)
    beyond = sorted(row for row in rows if row >= num_rows)
    if beyond != list(range(num_rows, num_rows + len(beyond))):
        must, found = (
            "trained tokens must follow the base's own without a gap",
            f"{beyond[-1]} behind {num_rows:,} rows",
        )
        raise UserError(must, found, "use the model that the adapter was trained on", str(adapter.folder))
    W_VH = torch.cat([W_VH, W_VH.new_zeros(len(beyond), W_VH.shape[1])])
    W_VH[rows] = values.to(W_VH.dtype)
    return W_VH


def settle_ties(adapter: Adapter, saved: dict[str, Tensor], ends: Ends, checkpoint: Checkpoint) -> bool:
    """Set embedding and head in `saved` where the base has one weight for both. Return whether they stay equal."""
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
    """Whether two stored tensors have the same dtype, shape and bytes. It reads them piece by piece."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.form is not None or other.form is not None:
        return torch.equal(read_tensor(one), read_tensor(other))
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        pieces = [min(PIECE_BYTES, one.nbytes - at) for at in range(0, one.nbytes, PIECE_BYTES)]
        return all(first.read(size) == second.read(size) for size in pieces)
