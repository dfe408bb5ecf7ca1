"""What a run would do, before it starts: the files, the tokens it learns, its memory plan, its command.

The plan is that of `onecard plan`. The model is kept between two plans, so that a slider gets its plan in the time of
the plan alone. The preview is made by the functions of `onecard preview`.
"""

from __future__ import annotations

import json
import os
import shlex
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from onecard.config import TrainConfig, make_config, parse_bytes
from onecard.config.document import value_yaml
from onecard.data.chat.mask import IGNORE, Example
from onecard.data.chat.template import set_template
from onecard.data.load import load_dataset
from onecard.data.packing import pack
from onecard.data.sources import READERS
from onecard.documents import parse_yaml
from onecard.errors import UserError
from onecard.hf.load import find_checkpoint, load_tokenizer
from onecard.hf.skeleton import Model, read_config
from onecard.hf.tokens import add_tokens
from onecard.memory.model import find_model
from onecard.memory.plan import ASSUMED_LABELS, plan_model
from onecard.memory.shapes import KNOWN
from onecard.train.evaluate import model_size

MODELS_KEPT = 4
SHOWN_TOKENS, SHOWN_EXAMPLES, SHOWN_BAD = 400, 5, 50
SHOWN_ENTRIES = 2000  # of a folder
UNFINISHED = "\ufffd"  # the end of a text whose last character needs the next token, too
LONGEST_CHARACTER = 8  # tokens
Kept = OrderedDict[tuple[Any, ...], Model]


def list_folder(folder: str) -> dict[str, Any]:
    """Return a folder's parent, its folders and its data files. Raises UserError if it cannot be read."""
    path = Path(folder).expanduser().absolute()
    path = path if path.is_dir() else path.parent
    entries, is_cut = [], False
    try:
        for each in os.scandir(path):
            if each.name.startswith("."):
                continue
            is_cut = len(entries) == SHOWN_ENTRIES
            if is_cut:
                break
            if each.is_dir():
                entries.append({"name": each.name, "kind": kind_of_folder(Path(each.path))})
            elif Path(each.name).suffix.lower() in (*READERS, ".gguf") or ".jsonl." in each.name:
                kind = "model" if each.name.endswith(".gguf") else "data"
                entries.append({"name": each.name, "kind": kind, "bytes": each.stat().st_size})
    except OSError as error:
        do = "choose another folder"
        raise UserError("a folder must be readable", error.strerror or str(error), do, str(path)) from None
    entries.sort(key=lambda entry: (entry["kind"] == "data", entry["name"].lower()))
    return {"folder": str(path), "parent": str(path.parent), "entries": entries, "is_cut": is_cut}


def kind_of_folder(path: Path) -> str:
    """Return model, adapter or folder."""
    if (path / "adapter_config.json").is_file():
        return "adapter"
    return "model" if (path / "config.json").is_file() else "folder"


def settings() -> list[dict[str, Any]]:
    """Return name, description and default of each setting of a run."""
    return [
        {
            "name": name,
            "description": info.description or "",
            "default": None if info.is_required() else info.get_default(call_default_factory=True),
        }
        for name, info in TrainConfig.model_fields.items()
    ]


def check_fields(fields: dict[str, Any]) -> TrainConfig:
    """Make the settings of a run. Raises UserError for the first that is wrong, which `where` names."""
    for name in ("model", "data"):
        if not fields.get(name):
            raise UserError(f"{name} must be given", "nothing", "choose one", name)
    return make_config(TrainConfig, fields, "page")


class Planner:
    """Makes plans of few models, which it keeps."""

    def __init__(self) -> None:
        self.models: Kept = OrderedDict()

    def model(self, config: TrainConfig) -> Model:
        """Return a model. It is read again if one of its files has changed."""
        labels = ASSUMED_LABELS.get(config.task, ())
        stamps: tuple[Any, ...] = ()
        if config.model.lower() not in KNOWN and Path(config.model).exists():
            path = Path(config.model)
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
        key = (config.model, labels, stamps)
        if key not in self.models:
            self.models[key] = find_model(config.model, labels)
            while len(self.models) > MODELS_KEPT:
                self.models.popitem(last=False)
        self.models.move_to_end(key)
        return self.models[key]

    def plan(self, fields: dict[str, Any], device_memory: str | None, searches: bool) -> dict[str, Any]:
        """Return the plan of `onecard plan` with these settings. Raises UserError, same as `plan`."""
        if not fields.get("model"):
            raise UserError("model must be given", "nothing", "choose one", "model")
        config = make_config(TrainConfig, {"data": "-", "output": "-", **fields}, "page")
        limit = parse_bytes(device_memory) if device_memory else None
        if limit is not None and limit <= 0:
            raise UserError("there must be some memory", f"{limit} bytes", "correct it", "device_memory")
        model = self.model(config)
        if config.max_seq_length > model.longest_context:
            found = f"{config.max_seq_length:,} tokens; it has {model.longest_context:,}"
            do = f"give at most {model.longest_context}"
            raise UserError("the context must be within the model's", found, do, "max_seq_length")
        plan = plan_model(model, config, "qlora", limit, searches)
        facts = {"longest_context": model.longest_context, "num_layers": model.num_layers}
        return {**asdict(plan), "total_bytes": plan.total_bytes, "fits": plan.fits, **facts}


def preview(fields: dict[str, Any], num_examples: int = SHOWN_EXAMPLES) -> dict[str, Any]:
    """Read, check and tokenize the data as a run would. Return the counts and the first examples' tokens.

    Raises:
        UserError: same as `load_dataset`; a token outside the model's vocabulary.
    """
    config = check_fields(fields)
    tokenizer = load_tokenizer(config.model, config.tokenizer)
    set_template(tokenizer, config.chat_template, config.template_variables)
    add_tokens(tokenizer, config.add_tokens, config.add_special_tokens)
    dataset = load_dataset(config.data, tokenizer, config, config.objective)
    if not (config.add_tokens or config.add_special_tokens):
        dataset.check_fits(*model_size(read_config(find_checkpoint(config.model))))
    rows = int(pack(dataset.stored.lengths, dataset.row_tokens).max()) + 1 if config.packing else len(dataset.examples)
    return {
        "counts": dataset.summary(),
        "share_supervised": dataset.num_supervised_tokens / dataset.num_tokens,
        "share_truncated": dataset.num_truncated / (len(dataset.examples) + dataset.num_unsupervised),
        "rows": rows,
        "share_filled": dataset.num_tokens / (rows * dataset.row_tokens),
        "sources": [share.cells() for share in dataset.shares],
        "notices": dataset.notices,
        "examples": [shown_example(example, tokenizer) for example in dataset.first(num_examples)],
        "bad": [as_dict(error) for error in dataset.bad[:SHOWN_BAD]],
        "num_bad": len(dataset.bad),
    }


def shown_example(example: Example, tokenizer: Any) -> dict[str, Any]:
    """Return an example's parts: one, or the chosen and the rejected one."""
    cut = example.second
    parts = {"chosen": slice(cut), "rejected": slice(cut, None)} if cut else {"": slice(None)}
    return {
        "where": example.where,
        "parts": [
            {
                "name": name,
                "tokens": list(
                    islice(tokens_of(example.input_ids[part], example.labels[part], tokenizer), SHOWN_TOKENS)
                ),
                "count": len(example.input_ids[part]),
            }
            for name, part in parts.items()
        ],
    }


def tokens_of(input_ids: list[int], labels: list[int], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yield the text of each token, and whether it is learned. Tokens that together are one character stay together."""
    begin = done = 0
    for end in range(1, len(input_ids) + 1):
        before = tokenizer.decode(input_ids[begin:done], skip_special_tokens=False)
        text = tokenizer.decode(input_ids[begin:end], skip_special_tokens=False)
        if text.endswith(UNFINISHED) and end < len(input_ids) and end - done < LONGEST_CHARACTER:
            continue
        yield text[len(before) :], labels[end - 1] != IGNORE
        begin, done = done, end


def as_dict(error: UserError) -> dict[str, Any]:
    return {"must": error.must, "found": error.found, "do": error.do, "where": error.where}


def command_of(fields: dict[str, Any]) -> list[str] | None:
    """Return the words of `onecard train` with these settings; None if only a file can give them."""
    words = ["train"]
    for name, value in fields.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, list):
            if not value or not all(isinstance(each, str | int | float) for each in value):
                return None
            words += [f"{flag}={each}" for each in value]
        elif isinstance(value, bool):
            words.append(f"{flag}={str(value).lower()}")
        elif isinstance(value, dict):
            if name == "chat_template_kwargs":
                words.append(f"{flag}={json.dumps(value)}")
            else:
                return None
        else:
            words.append(f"{flag}={value}")
    return words


def written(fields: dict[str, Any]) -> dict[str, str | None]:
    """Return the command line and the YAML file with these settings, to copy."""
    words = command_of(fields)
    return {
        "command": None if words is None else shlex.join(["onecard", *words]),
        "yaml": "".join(f"{value_yaml(name, value)}\n" for name, value in fields.items() if value is not None),
    }


def parsed(text: str) -> dict[str, Any]:
    """Parse settings in YAML. Raises UserError for anything but a mapping."""
    try:
        found = parse_yaml(text.encode())
    except ValueError as error:
        raise UserError("the settings must be YAML", str(error), "correct it", "more settings") from None
    if not isinstance(found, dict | None):
        do = "write lines such as `lora_alpha: 32`"
        raise UserError("the settings must be a mapping of name: value", type(found).__name__, do, "more settings")
    return found or {}
