"""Training on preferences: the log-probability of each answer, the reference's, the loss, and the rewards.

A micro-batch holds whole examples: pairs, whose two answers are neighbouring documents, or for kto single answers. The
sums and counts of the whole accumulation window normalize the loss, so that any split of it is the same update. trl
normalizes each micro-batch by itself. The two agree where a window is one micro-batch, and for equal micro-batches.

The reference is the same model with its adapter off, or the adapter that the run goes on from, as in trl.

kto also needs an estimate of how far the model is from the reference: the mean log-ratio of answers to other prompts,
here the prompt of each example with the answer of the example before it, over the whole window. trl takes the answers
of a micro-batch.

A reward is beta times the log-ratio. Shape suffixes: P scored positions, D documents, E examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.config import ROW_MULTIPLE, TrainConfig
from onecard.data.chat.mask import IGNORE, Example
from onecard.data.loader import Loader
from onecard.data.packing import collate, packed, split
from onecard.train.loss import decode, head_token_losses, plain_token_losses, supervised, to_device, upload
from onecard.train.preference_loss import dpo_losses, kto_losses, mean_losses

NAMES = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "nll_loss",
)  # fmt: skip


@dataclass(frozen=True)
class Totals:
    """What normalizes the loss of a window: its chosen and rejected answers, and the tokens of `nll_loss`.

    Attributes:
        kl: kto's estimate of the divergence from the reference, float64 ().
    """

    num_chosen: int
    num_rejected: int
    num_examples: int
    num_nll_tokens: int
    kl: Tensor | None = None


@dataclass
class Preference:
    """A dataset of preferences, and the model that learns it.

    Attributes:
        model: peft's model.
        packed: whether the model takes packed rows; otherwise one document at a time, with full logits.
        reference: float64 (examples, 2) on the host: the reference's log-probabilities of the chosen and the rejected
            answer; for kto of the answer, and of the answer before it to the same prompt. None: computed in the step.
    """

    config: TrainConfig
    model: Any
    examples: Sequence[Example]
    packed: bool
    reference: Tensor | None = None

    @property
    def base(self) -> Any:
        return self.model.get_base_model()

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Copy a micro-batch to the device, with the number of scored positions of each document.

        Scored are the answers; for orpo, whose nll includes the prompt, all tokens of a chosen document.
        """
        scored = batch["labels"]
        if self.config.loss == "orpo":
            scored = with_prompts(batch)
        ends = batch["cu_seqlens"][: 1 + len(batch["indices"]) * batch["documents_per_example"]]  # without the filler
        counts = [int((scored[0, start:end] != IGNORE).sum()) for start, end in zip(ends, ends[1:])]
        moved = {**to_device({**batch, "labels": scored}, self.device), "counts": counts}
        if self.config.loss == "orpo":
            is_answer = batch["labels"][0, supervised(scored)[0] + 1] != IGNORE
            moved["is_answer"] = upload(is_answer, self.device)
        return moved

    def log_probs(self, batch: dict[str, Any], hidden: Tensor | None = None) -> Tensor:
        """Return the log-probability of each scored token, float64 (P,). `hidden`: the decoder's output, if known."""
        if not self.packed:
            return -plain_token_losses(self.base, batch).double()
        hidden = decode(self.base, batch) if hidden is None else hidden
        return -head_token_losses(self.base, hidden, batch).double()

    def loss(self, batch: dict[str, Any], totals: Totals, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's part of the window's loss, (), and of each of NAMES, float64 (7,).

        Args:
            batch: the result of `to_device`.
        """
        reference = self.reference_of(batch) if self.config.has_reference else None
        log_probs_P = self.log_probs(batch, hidden)
        if self.config.loss == "kto":
            return self.loss_of_answers(batch, totals, sums(log_probs_P, batch["counts"]), reference)
        answers_P = log_probs_P * batch["is_answer"] if "is_answer" in batch else log_probs_P
        c_E, r_E = sums(answers_P, batch["counts"]).view(-1, 2).unbind(1)
        c_len_E, r_len_E = self.answer_lengths(batch)
        nll = log_probs_P.new_zeros(())
        if reference is not None:
            c_ratio_E, r_ratio_E = c_E - reference[:, 0], r_E - reference[:, 1]
            losses_E = dpo_losses(self.config, c_ratio_E, r_ratio_E, c_len_E, r_len_E)
        else:
            c_E, r_E = c_E / c_len_E, r_E / r_len_E
            c_ratio_E, r_ratio_E, losses_E = c_E, r_E, mean_losses(self.config, c_E, r_E)
            nll = -sums(log_probs_P, batch["counts"])[::2].sum() / totals.num_nll_tokens
        weight = 1.0 if self.config.loss == "orpo" else self.config.cpo_alpha
        loss = losses_E.sum() / totals.num_examples + weight * nll
        c, r = (self.config.beta * ratio.detach() for ratio in (c_ratio_E, r_ratio_E))
        parts = torch.stack([each.double().sum() for each in (c, r, c > r, c - r, c_E.detach(), r_E.detach())])
        return loss, torch.cat([parts / totals.num_examples, nll.detach()[None]])

    def loss_of_answers(
        self, batch: dict[str, Any], totals: Totals, log_probs_E: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Same as `loss`, for kto."""
        assert reference is not None and totals.kl is not None
        desirable = [self.examples[index].label for index in batch["indices"]]
        desirable_E = upload(torch.tensor(desirable), self.device)
        ratio_E = log_probs_E - reference[:, 0]
        loss = kto_losses(self.config, ratio_E, desirable_E, totals.kl).sum() / totals.num_examples
        reward_E = self.config.beta * ratio_E.detach()
        each = [(values * (desirable_E == yes)).sum() / max(count, 1)
                for values in (reward_E, log_probs_E.detach())
                for yes, count in ((True, totals.num_chosen), (False, totals.num_rejected))]  # fmt: skip
        none = torch.zeros_like(each[0])
        return loss, torch.stack([*each[:2], none, each[0] - each[1], *each[2:], none])

    def answer_lengths(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the numbers of tokens of the chosen and the rejected answers, float64 (E,) each."""
        counts_D = upload(torch.tensor(batch["counts"], dtype=torch.float64), self.device)
        if "is_answer" in batch:
            counts_D = sums(batch["is_answer"].double(), batch["counts"])
        c_E, r_E = counts_D.view(-1, 2).unbind(1)
        return c_E, r_E

    def reference_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the reference's log-probabilities of a micro-batch's answers, float64 (E, 2); for kto (E, 1)."""
        if self.reference is not None:
            return upload(self.reference[batch["indices"]], self.device)
        return self.compute_reference(batch)

    @torch.no_grad()
    def compute_reference(self, batch: dict[str, Any]) -> Tensor:
        """Same as `reference_of`, by the model itself."""
        with self.as_reference():
            return sums(self.log_probs(batch), batch["counts"]).view(len(batch["indices"]), -1)

    def totals(self, window: list[dict[str, Any]]) -> Totals:
        """Return what normalizes a window's loss. For kto, run the model on the other prompts, without gradients."""
        indices = [index for batch in window for index in batch["indices"]]
        if self.config.loss == "kto":
            num_chosen = sum(self.examples[index].label for index in indices)
            ratios = self.mismatched(indices) - self.mismatched_reference(indices)
            return Totals(num_chosen, len(indices) - num_chosen, len(indices), 0, ratios.mean().clamp(min=0))
        labels = [(with_prompts(batch) if self.config.loss == "orpo" else batch["labels"], batch) for batch in window]
        num_nll = sum(int((scored[0, a:b] != IGNORE).sum()) for scored, batch in labels for a, b in chosen_spans(batch))
        return Totals(len(indices), len(indices), len(indices), num_nll)

    @torch.no_grad()
    def mismatched(self, indices: list[int]) -> Tensor:
        """Return the log-probability of the example before as the answer to each example's prompt, float64 (E,)."""
        documents = [mismatch(self.examples, index, self.config.max_seq_length) for index in indices]
        found = torch.empty(len(documents), dtype=torch.float64, device=self.device)
        for row in packed([len(each.input_ids) for each in documents], self.config.max_seq_length):
            batch = {**collate([documents[i] for i in row], ROW_MULTIPLE), "indices": row}
            batch = self.to_device(batch)
            found[row] = sums(self.log_probs(batch), batch["counts"])
        return found

    def mismatched_reference(self, indices: list[int]) -> Tensor:
        """Same as `mismatched`, of the reference."""
        if self.reference is not None:
            return upload(self.reference[indices, 1], self.device)
        with self.as_reference():
            return self.mismatched(indices)

    def as_reference(self) -> AbstractContextManager:
        """Make the model the reference: the base, its adapter off. In a run that goes on from an adapter, it is that
        adapter, which the model is only before the training."""
        return nullcontext() if self.config.adapter is not None else self.model.disable_adapter()

    def metrics(self, parts: list[float], totals: Totals) -> dict[str, float]:
        """Return a window's metrics by name, without those that it cannot have."""
        found: dict[str, float] = dict(zip(NAMES, parts))
        if self.config.loss != "orpo" and not self.config.cpo_alpha:
            del found["nll_loss"]
        if totals.kl is not None:
            del found["rewards/accuracies"]
            found["kl"] = totals.kl.item()
            counts = {"chosen": totals.num_chosen, "rejected": totals.num_rejected}
            for side in (side for side, count in counts.items() if not count):
                for name in (f"rewards/{side}", f"logps/{side}", "rewards/margins"):
                    found.pop(name, None)
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the loss and the metrics of the whole dataset, by their names with `eval_`."""
        training = self.model.training
        self.model.eval()
        batches = list(batches_of(self.examples, self.config))
        totals = self.totals(batches)
        loss, parts = 0.0, torch.zeros(len(NAMES), dtype=torch.float64, device=self.device)
        for batch in batches:
            part, more = self.loss(self.to_device(batch), totals)
            loss, parts = loss + part.item(), parts + more
        self.model.train(training)
        found = self.metrics(parts.tolist(), totals)
        return {"eval_loss": loss, **{f"eval_{name}": value for name, value in found.items()}}

    def compute_references(self, batches: Iterable[dict[str, Any]], max_tokens: int | None) -> Tensor:
        """Return the table `reference`, with NaN for examples that are in none of the batches."""
        table = torch.full((len(self.examples), 2), float("nan"), dtype=torch.float64)
        for batch in batches:
            for part in split(batch, max_tokens):
                found = self.compute_reference(self.to_device(part))
                table[part["indices"], : found.shape[1]] = found.cpu()
            if self.config.loss == "kto":
                table[batch["indices"], 1] = self.mismatched_reference(batch["indices"]).cpu()
        return table


def batches_of(examples: Sequence[Example], config: TrainConfig) -> Iterable[dict[str, Any]]:
    """Yield packed rows of all examples, once."""
    loader = Loader(examples, config.max_seq_length * config.documents_per_example, True, 1, 0)
    return (loader.next_batch() for _ in range(loader.num_batches(0)))


def sums(values_P: Tensor, counts: list[int]) -> Tensor:
    """Add the values of each document. One sum a document keeps the order of additions, and so the bits, on a GPU."""
    return torch.stack([part.sum() for part in values_P.split(counts)])


def chosen_spans(batch: dict[str, Any]) -> list[tuple[int, int]]:
    """Return start and end of each chosen document of a batch of pairs."""
    ends = batch["cu_seqlens"]
    return [(ends[2 * i], ends[2 * i + 1]) for i in range(len(batch["indices"]))]


def with_prompts(batch: dict[str, Any]) -> Tensor:
    """Return the labels with those of the chosen documents' prompts."""
    labels = batch["labels"].clone()
    for start, end in chosen_spans(batch):
        labels[0, start + 1 : end] = batch["input_ids"][0, start + 1 : end]
    return labels


def mismatch(examples: Sequence[Example], index: int, most: int) -> Example:
    """Return the prompt of an example with the answer of the example before it, cut to `most` tokens."""
    own, other = examples[index], examples[index - 1]
    begin, start = (next(i for i, label in enumerate(each.labels) if label != IGNORE) for each in (own, other))
    ids = own.input_ids[:begin] + other.input_ids[start:]
    labels = [IGNORE] * begin + other.labels[start:]
    return Example(ids[:most], labels[:most], own.where)
