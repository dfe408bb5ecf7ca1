"""Unsloth beside onecard: the same shape, rank and rows, in a process of its own.

python -m benchmarks.gpu runs it; `--sections unsloth` alone. Unsloth patches transformers when it is imported, so
nothing else runs in its process. It reads a checkpoint with random weights, which the first call writes to a folder. Of
its checkpointing modes, rows that keep their activations use none; recomputed rows use "unsloth" and torch's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_steps import RANK, SHAPES, Row, attempt, measured, plain_step

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODES: dict[bool, tuple[Any, ...]] = {False: (False,), True: ("unsloth", True)}  # of use_gradient_checkpointing


def child(shape: str, rows: list[Row], device: torch.device) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield what is found of each row and checkpointing mode, or the one reason why Unsloth does not run."""
    if find_spec("unsloth") is None:
        yield "all", {"failed": "unsloth is not installed"}
        return
    if device.type != "cuda":
        yield "all", {"failed": "unsloth needs a GPU"}
        return
    with tempfile.TemporaryDirectory() as folder:
        written = attempt(lambda: write_checkpoint(shape, Path(folder), max(row.tokens for row in rows)))
        if "failed" in written:
            yield "all", written
            return
        for mode in ("unsloth", False, True):
            chosen = [row for row in rows if row.documents == 1 and mode in MODES[row.recompute]]
            yield from of_mode(Path(folder), mode, chosen, device)


def of_mode(folder: Path, mode: Any, rows: list[Row], device: torch.device) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield what is found of each row in a checkpointing mode, on a model that is loaded for it."""
    made: dict[str, Any] = attempt(lambda: {"model": load(folder, mode)})
    for row in rows:
        if "failed" in made:
            yield str(row), {"mode": str(mode), **made}
            continue
        found = attempt(lambda row=row: measured(plain_step(made["model"], row, device), row, device))
        yield str(row), {"mode": str(mode), **found}
        made["model"].zero_grad(set_to_none=True)


def load(folder: Path, mode: Any) -> Any:
    """Return Unsloth's model of a checkpoint in 4 bits, with adapters on all linears, as its users make it."""
    import unsloth  # type: ignore

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=16384, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    tuned = unsloth.FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=2 * RANK, lora_dropout=0, bias="none", target_modules=LINEARS,
        use_gradient_checkpointing=mode,
    )  # fmt: skip
    return tuned.train()


def write_checkpoint(shape: str, folder: Path, length: int) -> dict[str, Any]:
    """Write a checkpoint with random weights in 16 bits, and the demo's tokenizer."""
    import unsloth  # type: ignore  # noqa: F401  before transformers, as it asks
    from transformers import AutoModelForCausalLM, LlamaConfig

    from benchmarks.shapes import TOKENIZER
    from onecard.hf.load import load_tokenizer

    sizes: dict[str, Any] = {**SHAPES[shape]}
    config = LlamaConfig(max_position_embeddings=max(length, 16384), tie_word_embeddings=False, **sizes)
    config.dtype = torch.bfloat16
    with torch.device("cuda"):
        random = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    random.save_pretrained(folder)
    load_tokenizer(str(TOKENIZER)).save_pretrained(folder)
    del random
    torch.cuda.empty_cache()
    return {}
