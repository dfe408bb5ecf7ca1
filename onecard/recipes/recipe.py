"""A training file of another tool: its keys become our fields, are told as without effect here, or are refused.

A key that changes the result is mapped with its meaning, or refused with the reason. The other tool's defaults go into
the fields, too, so that a file that relies on them trains the same. A key that only concerns speed, memory, files or
hardware is told. So is a key that this list does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onecard.config import TrainConfig
from onecard.documents import read_yaml
from onecard.errors import UserError

MOST_SHOWN = 20
TRANSFORMERS: dict[str, tuple[str, Any]] = {  # keys of transformers in both tools -> our field, their default
    "lr_scheduler_kwargs": ("lr_scheduler_kwargs", None),
    "weight_decay": ("weight_decay", 0.0),
    "adam_beta1": ("adam_beta1", 0.9),
    "adam_beta2": ("adam_beta2", 0.999),
    "max_grad_norm": ("max_grad_norm", 1.0),
    "seed": ("seed", 42),
    "save_total_limit": ("save_total_limit", None),
    "load_best_model_at_end": ("load_best_model_at_end", None),
    "metric_for_best_model": ("metric_for_best_model", None),
    "greater_is_better": ("greater_is_better", None),
    "loraplus_lr_ratio": ("loraplus_lr_ratio", None),
    "neftune_noise_alpha": ("neftune_noise_alpha", None),
    "hub_model_id": ("hub_model_id", None),
}


@dataclass
class Recipe:
    """Our fields, and notes about what was read."""

    fields: dict[str, Any]
    notes: list[str]


@dataclass
class Reader:
    """Reads the keys of a file one by one.

    Attributes:
        sources: the file's key of each of our fields, for messages.
    """

    path: str
    raw: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.path).parent

    def take(self, key: str, default: Any = None) -> Any:
        """Return a key's value, or the other tool's default where it is absent or null."""
        self.taken.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def put(self, name: str, key: str, value: Any) -> None:
        """Set one of our fields. None: ours decides."""
        if value is not None:
            self.fields[name], self.sources[name] = value, key

    def rename(self, names: Mapping[str, tuple[str, Any]]) -> None:
        """Set our fields from keys of the same meaning: key -> (our field, the other tool's default)."""
        for key, (name, default) in names.items():
            self.put(name, key, self.take(key, default))

    def refuse(self, key: str, why: str) -> None:
        value = self.raw.get(key)
        self.refused.append(f"{key}: {value!r}: {why}" if value is not None else f"{key}: {why}")

    def refuse_unless(self, reasons: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
        """Refuse keys whose value is none of the harmless ones: key -> (harmless values, reason)."""
        for key, (harmless, why) in reasons.items():
            value = self.take(key)
            if not (value is None or value is False or value in ("", [], {}) or value in harmless):
                self.refuse(key, why)

    def finish(self, without_effect: frozenset[str]) -> Recipe:
        """Return what was read.

        Args:
            without_effect: keys that change nothing that is learned.

        Raises:
            UserError: keys were refused; they are listed.
        """
        for name in [name for name in self.fields if name not in TrainConfig.model_fields]:
            self.refuse(self.sources[name], "onecard does not have it")
        if self.refused:
            lines = "\n".join(["keys that change the result:", *self.refused[:MOST_SHOWN]])
            must = "each key of the file that changes the result must have its like in onecard"
            raise UserError(must, lines, "take these keys out of the file, if the run may differ in them", self.path)
        left = [key for key, value in self.raw.items() if key not in self.taken and value not in (None, "", [], {})]
        unused, unknown = (sorted(key for key in left if (key in without_effect) == known) for known in (True, False))
        if unused:
            self.notes.append(f"without effect here: {', '.join(unused)}")
        if unknown:
            self.notes.append(f"not known and not used: {', '.join(unknown)}")
        return Recipe(self.fields, self.notes)


def open_recipe(path: str) -> Reader:
    """Read a YAML file. Raises UserError if it is no mapping."""
    return Reader(path, read_yaml(path))


def names_of(value: Any) -> list[str]:
    """Return the names in a list, or in a text with commas."""
    return [
        name.strip() for name in (value.split(",") if isinstance(value, str) else map(str, value or ())) if name.strip()
    ]


def as_number(value: Any) -> Any:
    """Return the number in a text such as 5e-5, which YAML reads as a text without a dot."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def put_optim(reader: Reader, key: str, value: str) -> None:
    """Set optim. Names of one method in several implementations become ours."""
    same = {
        "adamw_hf": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_apex_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw": "paged_adamw_32bit",
    }
    reader.put("optim", key, same.get(value, value))


def put_warmup(reader: Reader) -> None:
    """Set the warm-up: steps win over a ratio, as in transformers."""
    steps, ratio = reader.take("warmup_steps", 0), reader.take("warmup_ratio")
    if steps:
        reader.put("warmup_steps", "warmup_steps", steps)
    else:
        reader.put("warmup_ratio", "warmup_ratio", 0.0 if ratio is None else ratio)


def put_interval(reader: Reader, verb: str, default: str, steps: Any) -> None:
    """Set eval_strategy and eval_steps, or those of saving.

    Args:
        default: the strategy where the file has none.
        steps: the other tool's default of the steps.
    """
    strategy = str(reader.take(f"{verb}_strategy", default))
    if strategy == "best":
        reader.notes.append(f"{verb}_strategy best: a new best writes its checkpoint in any case")
        strategy = "epoch" if verb == "save" else strategy
    reader.put(f"{verb}_strategy", f"{verb}_strategy", strategy)
    every = reader.take(f"{verb}_steps", steps)
    if strategy != "steps":
        return
    if isinstance(every, float) and 0 < every < 1:
        reader.refuse(f"{verb}_steps", "a share of the run: give a number of updates")
    else:
        reader.put(f"{verb}_steps", f"{verb}_steps", every)


def put_loggers(reader: Reader, value: Any) -> None:
    known = ("tensorboard", "wandb", "mlflow", "trackio")
    names = [name for name in names_of(value) if name not in ("none", "all")]
    if found := [name for name in names if name in known]:
        reader.put("loggers", "report_to", found)
    if other := [name for name in names if name not in known]:
        reader.notes.append(f"loggers that onecard does not have: {', '.join(other)}")


def put_sources(reader: Reader, key: str, name: str, sources: list[dict[str, Any]]) -> None:
    """Set data or eval_data: one plain file as its path, others as a list of mappings."""
    plain = [source["path"] for source in sources if set(source) == {"path"}]
    if len(sources) == len(plain) == 1:
        reader.put(name, key, plain[0])
    elif sources:
        reader.put(name, key, sources)


def put_split(reader: Reader, key: str, has_eval_data: bool) -> None:
    """Set the share of the data that is held out. Without it and without eval data, nothing is evaluated."""
    size = reader.take(key, 0)
    if size >= 1:
        reader.refuse(key, "a number of rows: give a share below 1")
    elif size:
        reader.put("validation_split", key, size)
    if not has_eval_data and not size:
        reader.fields.pop("eval_steps", None)
        reader.fields["eval_strategy"] = "no"


def put_streaming(reader: Reader, buffer: str, default: int) -> None:
    """Set whether data is streamed, and its buffer, whose key has another name in each tool."""
    rows = reader.take(buffer, default)
    if reader.take("streaming", False):
        reader.put("streaming", "streaming", True)
        reader.put("buffer_size", buffer, rows)
