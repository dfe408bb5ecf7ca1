"""Tokens a second of 1, 4 and 8 clients whose answers share forward passes, against one answer after the other.

`python -m benchmarks.serve MODEL` prints both, from the same 4-bit codes and the same prompts. `--answers N` also asks
for N answers that match a JSON schema, and counts the valid ones.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from typing import Any

import torch

from onecard.config import SamplingConfig
from onecard.hf.load import load_model, load_tokenizer
from onecard.infer.decoding import end_tokens
from onecard.infer.engine import Engine, GenerationRequest, TextChunk
from onecard.infer.grammar import Grammar, check_schema

PROMPT = "Describe a person who lives in a town by the sea. Number {}:"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "job": {"enum": ["baker", "nurse", "pilot", "clerk"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "age", "job", "tags"],
    "additionalProperties": False,
}


class Client:
    """A request, and its end."""

    def __init__(self, tokenizer: Any, ids: list[int], num_tokens: int, sampling: SamplingConfig, **more: Any):
        self.text, self.last, self.ended = "", TextChunk("", 0), threading.Event()
        self.work = GenerationRequest(ids, num_tokens, sampling, None, tokenizer, self.emit, **more)

    def emit(self, piece: TextChunk) -> None:
        self.text, self.last = self.text + piece.text, piece
        if piece.finish_reason or piece.error:
            self.ended.set()


def run_all(engine: Engine, clients: list[Client]) -> tuple[int, float]:
    """Answer all clients. Return the number of tokens, and the seconds."""
    begun = time.perf_counter()
    for client in clients:
        assert engine.submit(client.work)
    for client in clients:
        client.ended.wait()
        assert client.last.error is None, client.last.error
    return sum(client.last.num_tokens for client in clients), time.perf_counter() - begun


def compare(engine: Engine, tokenizer: Any, no_end: dict[int, float], num_tokens: int) -> None:
    """Print the speeds, each the best of two turns that alternate."""
    sampling, together = SamplingConfig(logit_bias=no_end), engine.most_together

    def clients(count: int) -> list[Client]:
        prompts = [tokenizer(PROMPT.format(i))["input_ids"] for i in range(count)]
        return [Client(tokenizer, ids, num_tokens, sampling) for ids in prompts]

    run_all(engine, clients(2))
    for count in (1, 4, 8):
        best = {1: 0.0, together: 0.0}
        for _ in range(2):
            for most in best:
                engine.most_together = most
                tokens, seconds = run_all(engine, clients(count))
                best[most] = max(best[most], tokens / seconds)
        alone, shared = best[1], best[together]
        print(f"{count} clients: {shared:.1f} tok/s, in turn {alone:.1f} tok/s, ratio {shared / alone:.2f}", flush=True)
    engine.most_together = together


def count_valid(engine: Engine, model: Any, tokenizer: Any, count: int) -> None:
    """Print how many answers match the schema. Each is drawn at temperature 1 with its own seed."""
    check_schema(SCHEMA)
    ends = tuple(end_tokens(model.generation_config.eos_token_id, tokenizer))
    vocab_size, clients = model.config.get_text_config().vocab_size, []
    for seed in range(count):
        grammar = Grammar(tokenizer, SCHEMA, ends, vocab_size)
        ids = tokenizer(PROMPT.format(seed))["input_ids"]
        clients.append(Client(tokenizer, ids, 256, SamplingConfig(temperature=1, seed=seed), grammar=grammar))
    tokens, seconds = run_all(engine, clients)
    valid = sum(is_valid(client.text) for client in clients)
    print(f"{valid} of {count} answers match the schema, {len({c.text for c in clients})} different, "
          f"{tokens / seconds:.1f} tok/s")  # fmt: skip


def is_valid(text: str) -> bool:
    """Whether a text is JSON of the schema; checked by hand, not by the grammar."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    properties = SCHEMA["properties"]
    return (
        isinstance(found, dict)
        and list(found) == list(properties)
        and isinstance(found["name"], str)
        and len(found["name"]) <= 16
        and type(found["age"]) is int
        and 0 <= found["age"] <= 120
        and found["job"] in properties["job"]["enum"]
        and isinstance(found["tags"], list)
        and len(found["tags"]) <= 3
        and all(isinstance(tag, str) and len(tag) <= 8 for tag in found["tags"])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--num-tokens", type=int, default=32)
    parser.add_argument("--answers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compute-dtype", default=None, choices=["float32", "bfloat16"])
    given = parser.parse_args()
    dtype = {"compute_dtype": getattr(torch, given.compute_dtype)} if given.compute_dtype else {}
    model, tokenizer = load_model(given.model, device=given.device, **dtype), load_tokenizer(given.model)
    engine = Engine(model, 8, 1000)
    try:
        print(f"{given.model}, {torch.get_num_threads()} threads, {given.num_tokens} tokens an answer", flush=True)
        if given.num_tokens:
            ends = end_tokens(model.generation_config.eos_token_id, tokenizer)
            compare(engine, tokenizer, {token: -100.0 for token in ends}, given.num_tokens)
        if given.answers:
            count_valid(engine, model, tokenizer, given.answers)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
