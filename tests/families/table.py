"""`python -m tests.families.table` writes docs/families.md: how every model of transformers that writes text ends."""

from __future__ import annotations

import tempfile
from pathlib import Path

import peft
import transformers

from tests.families.build import families
from tests.families.check import Outcome, check

FILE = Path(__file__).parents[2] / "docs" / "families.md"
NAMES = {"fast": "fast path", "plain": "plain path", "refused": "refused", "unbuilt": "not built"}
HEAD = """# Families

Every model of transformers {transformers} that AutoModelForCausalLM or AutoModelForImageTextToText takes, as a tiny
checkpoint with norms, biases and multipliers that are not neutral (`python -m tests.families.table` writes this file,
with peft {peft}). What trains is held to transformers + peft + AdamW on the same weights in float32: logits, three
training losses and the evaluation loss to 1e-4, the adapter read again, the merged checkpoint and generation to 1e-3.
All tensors that training has not in 4 bits have the same bits in the merged checkpoint.

Multimodal checkpoints train their text part, on rows of text. All other parts stay in 16 bits as they are, and get no
LoRA. `--text-only` leaves them out of memory. The names in the adapter are those of the whole model.

- **fast path**: packed rows with attention of our own, the head on learned tokens only.
- **plain path**: the model's own forward, one document at a time. Models with linear attention, state-space or
  convolution layers are here: transformers' code in plain torch does not keep packed documents apart.
- **refused**: a `UserError` with the reason, before training.
- **not built**: the family cannot be built from a config of this size, or needs another library.

The last columns: whether `merge` takes the adapter, and how `generate`, `chat` and `serve` go on after a prompt: from a
cache, by one token a pass where the model takes no more, or with all tokens again for each new one.

{counts}

| family | class | path | why | merge | generate |
|---|---|---|---|---|---|
"""


def attempt(family: str) -> Outcome:
    """A family's outcome in a folder of its own; one that cannot be built is told so."""
    with tempfile.TemporaryDirectory() as folder:
        return check(family, Path(folder))


def line(outcome: Outcome) -> str:
    """A family's row; numbers and tensors' names in a reason, which are this checkpoint's, are left out."""
    kind = families()[outcome.family]
    merge = "yes" if outcome.path in ("fast", "plain") else "-"
    if outcome.unmerged:
        merge = f"refused: {outcome.unmerged.partition(': ')[0]}"
    if outcome.misread:
        merge += "; plain peft misreads the adapter's names"
    why = outcome.why.partition(" (")[0][:150].strip().replace("|", "/")
    return f"| {outcome.family} | {kind} | {NAMES[outcome.path]} | {why} | {merge} | {outcome.generation} |"


def render(outcomes: list[Outcome]) -> str:
    """The whole file."""
    paths = [outcome.path for outcome in outcomes]
    counts = ", ".join(f"{paths.count(path)} {name}" for path, name in NAMES.items()) + "."
    head = HEAD.format(transformers=transformers.__version__, peft=peft.__version__, counts=counts)
    return head + "".join(line(outcome) + "\n" for outcome in outcomes)


if __name__ == "__main__":
    found = []
    for name in families():
        found.append(attempt(name))
        print(line(found[-1]), flush=True)
    FILE.write_text(render(found), encoding="utf-8")
