"""Embeddings by sentence-transformers on a 4-bit model: train an adapter on pairs of texts, and compare texts.

    pip install onecard sentence-transformers datasets accelerate
    python examples/embeddings.py --model MODEL --data pairs.jsonl --output embeddings

A row of the data is {"anchor": text, "positive": text}. The positives of the other rows of a batch are the negatives
(MultipleNegativesRankingLoss). An embedding is the last hidden state of the text's last token, of length 1.

sentence-transformers loads the model itself. onecard's quantization config is all that it needs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from onecard import BitsAndBytesConfig

# Without this, sentence-transformers writes each text with the tokenizer's chat template, if it has one.
PLAIN_TEXT: Any = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


def load_embedder(model: str, adapter: str | None = None, dtype: str = "bfloat16", device: str = "cpu") -> Any:
    """Load a decoder's layers in 4 bits, with an adapter if one is given, as a SentenceTransformer."""
    quantization = BitsAndBytesConfig(
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    how = {"quantization_config": quantization, "dtype": dtype, "device_map": device}
    decoder = Transformer(model, model_kwargs=how, modality_config=PLAIN_TEXT, module_output_name="token_embeddings")
    if decoder.tokenizer.pad_token is None:
        decoder.tokenizer.pad_token = decoder.tokenizer.eos_token
    pooling = Pooling(decoder.get_embedding_dimension(), "lasttoken")
    embedder = SentenceTransformer(modules=[decoder, pooling, Normalize()], device=device)
    if adapter is not None:
        embedder.load_adapter(adapter)
    return embedder


def train(embedder: Any, pairs: list[dict[str, str]], output: str, **settings: Any) -> list[float]:
    """Train a new LoRA adapter on the pairs and save it in output/adapter, in peft's format. Return the losses.

    Args:
        settings: fields of SentenceTransformerTrainingArguments.
    """
    embedder.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="FEATURE_EXTRACTION"))
    arguments = SentenceTransformerTrainingArguments(
        output, save_strategy="no", report_to=[], logging_steps=1, **settings
    )
    rows = Dataset.from_list([{"anchor": row["anchor"], "positive": row["positive"]} for row in pairs])
    trainer = SentenceTransformerTrainer(embedder, arguments, rows, loss=MultipleNegativesRankingLoss(embedder))
    trainer.train()
    embedder[0].auto_model.save_pretrained(Path(output) / "adapter")  # the adapter alone
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def share_first(embedder: Any, pairs: list[dict[str, str]]) -> float:
    """Return the share of anchors whose own positive is the most similar of all."""
    anchors, positives = (embedder.encode([row[key] for row in pairs]) for key in ("anchor", "positive"))
    similar = embedder.similarity(anchors, positives)
    return (similar.argmax(1) == similar.diagonal().new_tensor(range(len(pairs)))).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="embeddings")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=float, default=1.0)
    given = parser.parse_args()
    pairs = [json.loads(line) for line in Path(given.data).read_text(encoding="utf-8").splitlines() if line.strip()]
    embedder = load_embedder(given.model, device=given.device)
    before = share_first(embedder, pairs)
    how = {"num_train_epochs": given.epochs, "per_device_train_batch_size": 16, "learning_rate": 1e-4}
    train(embedder, pairs, given.output, use_cpu=given.device == "cpu", **how)
    print(f"own positive is the most similar: {before:.1%} before, {share_first(embedder, pairs):.1%} after")
    print(f"adapter  {Path(given.output) / 'adapter'}")


if __name__ == "__main__":
    main()
