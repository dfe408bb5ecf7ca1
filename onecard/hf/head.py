"""A classification head in place of the vocabulary's: transformers' ...ForSequenceClassification of a decoder.

    logits = score(h),    h: the last hidden state of the document's last token that is not the pad token

The head is the linear `score`. A checkpoint of a causal language model lacks it, and its own head is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from onecard.config import HEAD
from onecard.errors import UserError

SUFFIX = "ForSequenceClassification"
WEIGHT = f"{HEAD}.weight"


def model_class(config: Any, labels: Sequence[str] = ()) -> Any:
    """Return transformers' auto class of a model with a head of these labels; without labels, of causal models, or of
    the whole multimodal model if the family's causal model is its text part alone, or there is none."""
    if labels:
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if is_multimodal(config) and not is_causal(config) else AutoModelForCausalLM


def is_causal(config: Any) -> bool:
    """Whether transformers has a causal language model of all that a config describes."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_text = config.get_text_config() is config
    return kind is not None and (is_text or getattr(kind, "config_class", None) is type(config))


def is_multimodal(config: Any) -> bool:
    """Whether transformers has a model of a config that answers text and images with text."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def is_headed(config: Any) -> bool:
    """Whether a config describes a model with a classification head."""
    return any(name.endswith(SUFFIX) for name in config.architectures or ())


def labels_of(config: Any) -> tuple[str, ...]:
    """Return the names of the head's outputs; empty if the config describes another model."""
    return tuple(str(config.id2label[i]) for i in range(config.num_labels or 0)) if is_headed(config) else ()


def with_labels(config: Any, labels: Sequence[str], where: str) -> Any:
    """Make a config that of a model with a head, in place. Return it.

    Raises:
        UserError: the family has no such model; the config has a head with other labels.
    """
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        must = "the model's family must have a classification head in transformers"
        raise UserError(must, config.model_type, "use a base of another family", where)
    there = labels_of(config)
    if there and there != tuple(labels) and there != tuple(f"LABEL_{i}" for i in range(len(labels))):
        must, found = f"the checkpoint's head must have the labels {listed(labels)}", listed(there)
        raise UserError(must, found, "use rows with its labels, or a base without a head", where)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    config.architectures = [kind.__name__]
    return config


def listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:12]) + ", …" * (len(labels) > 12)


def check_head(model: Any, where: str) -> None:
    """Raise UserError unless a model's head is the linear `score` over the hidden states."""
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.in_features != model.config.get_text_config().hidden_size:
        must, found = f"the model's classification head must be a linear called {HEAD}", type(model).__name__
        raise UserError(must, found, "use a base of another family", where)


def pad_of(tokenizer: Any) -> int:
    """Return the pad token's id, or the EOS token's if there is none, as in trl. Raises UserError without both."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        must, do = "a classification head needs a pad token or an EOS token", "set pad_token in tokenizer_config.json"
        raise UserError(must, "none", do, "tokenizer")
    return found


def set_pad(config: Any, tokenizer: Any, is_trained: bool, where: str) -> None:
    """Set a config's pad token, by which the model finds the token that its head reads, to the tokenizer's.

    Raises:
        UserError: the head of the checkpoint is trained with another pad token.
    """
    text, pad = config.get_text_config(), pad_of(tokenizer)
    if is_trained and text.pad_token_id not in (None, pad):
        must, found = f"pad_token_id must be the tokenizer's, {pad}", str(text.pad_token_id)
        raise UserError(must, found, "set pad_token in tokenizer_config.json as the head was trained", where)
    text.pad_token_id = pad


def pooled_position(ids: Sequence[int], pad: int | None) -> int:
    """Return the index of a document's last token that is not `pad`, which the head reads; 0 if all are."""
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != pad), 0)


def start_head(model: Any, seed: int) -> None:
    """Set the head to random values from a normal distribution of the config's initializer_range, by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in getattr(model, HEAD).named_parameters():
            std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
            values = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
            parameter.copy_(values if name == "weight" else torch.zeros_like(values))


def causal_head_names(model: Any) -> set[str]:
    """Return the names of the parameters of a causal model's head, which a model with a classification head lacks."""
    head = model.get_output_embeddings()
    if head is None:
        return set()
    path = next(path for path, module in model.named_modules() if module is head)
    return {f"{path}.{name}" for name, _ in head.named_parameters()}
