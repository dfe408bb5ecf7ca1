"""Training of a classification head and its adapter: the outputs for each document, the loss, and the metrics.

With z the outputs of a document, the head's product with the last hidden state at the token that has a label:

    classification    -log softmax(z)[class]
    reward            -log s(z_chosen - z_rejected) + center_rewards_coefficient (z_chosen + z_rejected)^2

s is the sigmoid, and a reward has one output (arXiv 2203.02155; the second term: arXiv 2312.09244). The loss is a mean
over the examples of the whole accumulation window. The equations are those of transformers and of trl's RewardTrainer.

Shape suffixes: D documents, C outputs, H hidden size, E examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel

from onecard.adapter.origin import Form
from onecard.config import LOSS_PROBE_TOKENS
from onecard.data.chat.pooled import encode_pooled
from onecard.data.dataset import Dataset
from onecard.data.loader import Loader
from onecard.data.packing import collate
from onecard.data.records import Record
from onecard.errors import UserError
from onecard.hf.attention import NotPacked, supports_packing, use_packed_attention
from onecard.hf.fused import unfuse, unfused
from onecard.hf.head import listed, pooled_position
from onecard.infer.check import agree, bound_of, check_computes
from onecard.kernels.cpu.contention import sharing_cores
from onecard.train.evaluate import attention_of, inner, model_size
from onecard.train.loss import IGNORE, decode, packed_loss, plain_loss, to_device, upload
from onecard.train.run import LossFunction

REWARD = ("reward",)  # the label of the one output that scores answers


@dataclass
class SequenceHead:
    """A dataset of documents, and the model that learns their classes or rewards.

    Attributes:
        model: peft's model, or transformers' own.
        labels: names of the outputs; one output is a reward.
        packed: whether the model takes packed rows; otherwise one document at a time.
        center: center_rewards_coefficient.
    """

    model: Any
    dataset: Dataset
    labels: tuple[str, ...]
    packed: bool
    center: float = 0.0

    @property
    def base(self) -> Any:
        return inner(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def is_reward(self) -> bool:
        return len(self.labels) == 1

    @cached_property
    def targets(self) -> Tensor:
        """The index of each example's class, int64 (examples,), on the host."""
        index = {name: i for i, name in enumerate(self.labels)}
        names = self.dataset.stored.column("class_name").to_pylist()
        return torch.tensor([index[name] for name in names])

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Copy a micro-batch to the device, with the position of each document's output, int64 (D,)."""
        position = (batch["labels"][0] != IGNORE).nonzero()[:, 0]
        return {**to_device(batch, self.device), "read_at": upload(position, self.device)}

    def outputs(self, batch: dict[str, Any], hidden: Tensor | None = None) -> Tensor:
        """Return each document's outputs, float32 (D, C). `hidden`: the decoder's output, if known."""
        if not self.packed:
            return own_outputs(self.base, batch)
        hidden = decode(self.base, batch) if hidden is None else hidden
        return self.base.score(hidden[0].index_select(0, batch["read_at"])).float()

    def loss(self, batch: dict[str, Any], totals: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's part of the window's loss, (), and of its metrics, float32 (2,).

        Args:
            batch: the result of `to_device`.
            totals: the result of `totals` for the window.
        """
        z_DC = self.outputs(batch, hidden)
        if self.is_reward:
            losses_E, *each = reward_losses(z_DC, self.center)
        else:
            target_D = upload(self.targets[batch["indices"]], self.device)
            losses_E, correct_D = cross_entropy(z_DC, target_D, reduction="none"), z_DC.argmax(1) == target_D
            each = [correct_D, torch.zeros_like(correct_D)]
        parts = torch.stack([values.detach().float().sum() for values in each])
        return losses_E.sum() / totals, parts / totals

    def totals(self, window: list[dict[str, Any]]) -> int:
        """Return what normalizes a window's loss: its number of examples."""
        return sum(len(batch["indices"]) for batch in window)

    def metrics(self, parts: list[float], totals: int) -> dict[str, float]:
        """Return a window's metrics by name."""
        return dict(zip(("accuracy", "margin") if self.is_reward else ("accuracy",), parts))

    @torch.no_grad()
    def all_outputs(self) -> Tensor:
        """Return the outputs for the whole dataset, float32 (documents, C) on the host, in the order of the examples.
        The caller sets the attention."""
        training, width = self.model.training, 2 if self.is_reward else 1
        self.model.eval()
        found = torch.empty(len(self.dataset.examples), width, len(self.labels))
        loader = Loader(self.dataset.examples, self.dataset.row_tokens, True, 1, 0)
        for _ in range(loader.num_batches(0)):
            batch = self.to_device(loader.next_batch())
            found[batch["indices"]] = self.outputs(batch).cpu().view(-1, width, len(self.labels))
        self.model.train(training)
        return found.flatten(0, 1)

    def evaluate(self) -> dict[str, float]:
        """Return the mean loss and the metrics of the whole dataset, by their names with `eval_`."""
        z_DC = self.all_outputs().double()
        if self.is_reward:
            losses_E, correct_E, margin_E = reward_losses(z_DC, self.center)
            found = {"accuracy": correct_E.double().mean().item(), "margin": margin_E.mean().item()}
        else:
            losses_E, said = cross_entropy(z_DC, self.targets, reduction="none"), z_DC.argmax(1)
            found = {"accuracy": (said == self.targets).double().mean().item(), "f1": macro_f1(said, self.targets)}
        return {f"eval_{name}": value for name, value in {"loss": losses_E.mean().item(), **found}.items()}


def reward_losses(z_DC: Tensor, center: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return each pair's loss, (E,), whether its chosen answer has the larger reward, and by how much. The documents
    are chosen and rejected answers in turn."""
    c_E, r_E = z_DC.view(-1, 2).unbind(1)
    losses_E = -logsigmoid(c_E - r_E)
    if center:
        losses_E = losses_E + center * (c_E + r_E) ** 2
    return losses_E, c_E > r_E, c_E - r_E


def macro_f1(said_D: Tensor, target_D: Tensor) -> float:
    """Return the mean F1 of the classes that are said or true, as scikit-learn's f1_score with average="macro"."""
    found = []
    for each in torch.cat([said_D, target_D]).unique():
        hits = ((said_D == each) & (target_D == each)).sum().item()
        found.append(2 * hits / ((said_D == each).sum().item() + (target_D == each).sum().item()))
    return sum(found) / len(found)


def own_outputs(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return each document's outputs by the model's own forward, float32 (D, C)."""
    ends = batch["cu_seqlens"]
    spans = [(a, b) for a, b in zip(ends, ends[1:]) if (batch["labels"][0, a:b] != IGNORE).any()]  # not the filler
    return torch.cat([model(input_ids=batch["input_ids"][:, a:b], use_cache=False).logits for a, b in spans]).float()


def choose_outputs(model: Any, dataset: Dataset) -> tuple[LossFunction, str | None]:
    """Same as `choose_loss`, for a model with a head: packed rows if the hidden states and outputs of two short
    documents equal those of the model's own modules. The loss functions only stand for the two ways."""
    base = inner(model)
    device = base.get_input_embeddings().weight.device
    batch = probe_batch(dataset, base.config.get_text_config().pad_token_id)
    head = SequenceHead(base, dataset, (), True)
    batch, training = head.to_device(batch), model.training
    check_computes(base, batch["input_ids"][:, :LOSS_PROBE_TOKENS])
    model.eval()
    try:
        with torch.no_grad():
            with unfused():
                expected_DH, z_DC = alone(base, batch), own_outputs(base, batch)
            why = f"{base.config.model_type} has attention of its own kind"
            if not same_outputs(base, expected_DH, z_DC):
                why = f"{type(base).__name__} has a head of its own kind"
            elif supports_packing(base):
                try:
                    with use_packed_attention(base):
                        hidden = decode(base, batch)[0].index_select(0, batch["read_at"].to(device))
                    if agree(hidden, expected_DH, bound_of(base)):
                        return packed_loss, None
                    why = "packed documents have other hidden states than the model's own"
                except NotPacked as reason:
                    why = f"{base.config.model_type} {reason}"
            if not agree(alone(base, batch), expected_DH, bound_of(base)):
                unfuse(base)
            return plain_loss, why
    finally:
        model.train(training)


def probe_batch(dataset: Dataset, pad: int | None) -> dict[str, Any]:
    """Build a row of the beginnings of two documents, each with a label at the token that its head reads."""
    batch = collate([*dataset.examples[:2], dataset.examples[0]][:2])
    ends = batch["cu_seqlens"]
    pieces = [batch["input_ids"][0, a : min(b, a + LOSS_PROBE_TOKENS)] for a, b in zip(ends[:2], ends[1:])]
    labels = [torch.full_like(piece, IGNORE) for piece in pieces]
    for piece, label in zip(pieces, labels):
        label[pooled_position(piece.tolist(), pad)] = 1
    lengths = [len(piece) for piece in pieces]
    return {
        "input_ids": torch.cat(pieces)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": [0, lengths[0], sum(lengths)],
    }


def alone(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return the hidden state that the head reads of each document, (D, H), by the model's own forward."""
    spans = zip(batch["cu_seqlens"], batch["cu_seqlens"][1:])
    own = [model.base_model(input_ids=batch["input_ids"][:, a:b], use_cache=False).last_hidden_state for a, b in spans]
    return torch.cat(own, 1)[0].index_select(0, batch["read_at"])


def same_outputs(model: Any, h_DH: Tensor, z_DC: Tensor) -> bool:
    """Whether the head's product with these hidden states is the model's own result, up to the rounding of the result.

    The outputs of another token's hidden state differ by about |h| |w| / sqrt(H).
    """
    found = model.score(h_DH).float()
    weight = model.score.weight.float()
    usual = h_DH.float().norm(dim=1)[:, None] * weight.norm(dim=1)[None] / weight.shape[1] ** 0.5
    eps = torch.finfo(h_DH.dtype).eps
    return bool(((found - z_DC).abs() <= 2 * eps * (z_DC.abs() + usual)).all())


def labels_for(dataset: Dataset, task: str, trained: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the labels of a task's head. Raises UserError if all rows are of one class.

    Args:
        trained: of the head that the checkpoint has, whose order stays.
    """
    if task == "reward":
        return REWARD
    found = tuple(dataset.classes)
    if trained and set(found) <= set(trained):
        return trained
    if len(found) < 2:
        must, do = "the rows must have two classes or more", "add rows of other classes, or name another label column"
        raise UserError(must, f"only {listed(found)}", do, dataset.examples[0].where)
    return found


def check_classes(dataset: Dataset, labels: Sequence[str]) -> None:
    """Raise UserError if a row is of a class that the head does not have."""
    unknown = [name for name in dataset.classes if name not in labels]
    if unknown and len(labels) > 1:
        names = dataset.stored.column("class_name").to_pylist()
        must, do = f"each row must be of a class that is trained: {listed(labels)}", "correct the label, or train on it"
        raise UserError(must, unknown[0], do, dataset.examples[names.index(unknown[0])].where)


def task_of(labels: Sequence[str]) -> str:
    return "reward" if len(labels) == 1 else "classification"


@torch.no_grad()
def classify(model: Any, tokenizer: Any, text: str, form: Form | None) -> Tensor:
    """Return the outputs for a text, float32 (C,) on the host, by the model's own forward.

    Args:
        form: of the adapter's training rows: plain text, or a chat, of which the text is the user's message.
    """
    messages = ({"role": "user", "content": text},) if form is not None and form.prompt == "chat" else None
    record = Record("text", 1, messages=messages, text=None if messages else text, is_pooled=True)
    ids = torch.tensor([encode_pooled(record, tokenizer, 1 << 30).input_ids])
    return model(input_ids=ids.to(inner(model).get_input_embeddings().weight.device)).logits[0].float().cpu()


def evaluate_head(model: Any, dataset: Dataset, labels: tuple[str, ...]) -> dict[str, float]:
    """Return `SequenceHead.evaluate` of a loaded model, with or without an adapter."""
    base = inner(model)
    dataset.check_fits(*model_size(base.config))
    check_classes(dataset, labels)
    way, _ = choose_outputs(model, dataset)
    with attention_of(base, way), sharing_cores():
        return SequenceHead(model, dataset, labels, way is packed_loss).evaluate()
