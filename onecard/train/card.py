"""The adapter's model card: README.md in its folder, with the metadata that the hub and peft read.

It names files, and leaves their folders out, as a card may be published.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from onecard.config import HEAD, TrainConfig
from onecard.data.sources import name_of
from onecard.documents import MAX_YAML_BYTES, parse_yaml, read_object
from onecard.hf.head import model_class
from onecard.hf.load import is_hub_id
from onecard.hf.skeleton import read_config
from onecard.train.report import Report, versions

PATHS = ("model", "data", "eval_data", "adapter", "output", "chat_template")  # settings that hold paths
LEFT_OUT = ("output", "sample_prompts", "hub_model_id", "hub_private_repo", "push_to_hub")


def write_card(folder: Path, config: TrainConfig, base: Path, report: Report) -> None:
    """Write the card into an adapter's folder, as a whole.

    Args:
        base: the checkpoint's folder, whose README.md and config.json may tell its licence and its hub id.
        report: the finished report.
    """
    temporary = folder / ".README.md.tmp"
    temporary.write_text(card_text(config, base, report), encoding="utf-8")
    os.replace(temporary, folder / "README.md")


def card_text(config: TrainConfig, base: Path, report: Report) -> str:
    """Return the card's text."""
    from huggingface_hub import ModelCardData

    known = base_metadata(base)
    name = config.model if is_hub_id(config.model) else known.get("base_model")
    licence = {key: known[key] for key in ("license", "license_name", "license_link") if key in known}
    tags = ["lora", "onecard", *([f"base_model:adapter:{name}"] if name else [])]
    use = "text-classification" if config.has_head else "text-generation"
    data = ModelCardData(base_model=name, library_name="peft", pipeline_tag=use, tags=sorted(tags), **licence)
    shown = name or Path(config.model).name
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in LEFT_OUT}
    defaults = {key: info.get_default(call_default_factory=True) for key, info in TrainConfig.model_fields.items()}
    chosen = {key: value for key, value in settings.items() if value != defaults[key]}
    chosen = {key: file_names(value) if key in PATHS else value for key, value in chosen.items()}
    results = [("updates", f"{report.num_steps:,}"), *scores_of(report), *report.facts.items()]
    results = [(key, value) for key, value in results if key != "went on from"]
    stored = f"{config.quant_type}, blocks of {config.blocksize}{', double quantization' * config.double_quant}"
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {Path(config.output).name}\n",
        f"A LoRA adapter for {shown}, trained with onecard over a frozen 4-bit base ({stored}).\n",
        f"The licence of the base is {known.get('license', 'not known: see the base')}.\n",
        "## Use\n",
        use_of(config, shown, model_class(read_config(base), [HEAD] * config.has_head).__name__),
        "## Results\n",
        table(results),
        "## Data\n",
        table([("file", name_of(config.data)), *report.data.items()]),
        "## Settings\n",
        "Those that differ from the defaults; seed and rank in any case.\n",
        table([(key, settings[key]) for key in ("r", "lora_alpha", "seed") if key not in chosen] + [*chosen.items()]),
        "## Versions\n",
        table(list(versions().items())),
    ]
    return "\n".join(parts)


def use_of(config: TrainConfig, base: str, kind: str) -> str:
    """Return the code that loads the adapter with peft. A classification head also needs the config beside it."""
    names, given = ("AutoConfig, ", ", config=config") if config.has_head else ("", "")
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {names}{kind}\n\n"
        + 'config = AutoConfig.from_pretrained("this folder or repository")\n' * config.has_head
        + f'model = {kind}.from_pretrained("{base}"{given})\n'
        + 'model = PeftModel.from_pretrained(model, "this folder or repository")\n```\n'
    )


def scores_of(report: Report) -> list[tuple[str, str]]:
    """Return each metric of the evaluation, before and after."""
    both = [name for name in report.after if name in report.before]
    return [(name, f"{report.before[name]:.4f} before, {report.after[name]:.4f} after") for name in both]


def table(rows: list[tuple[str, Any]]) -> str:
    """Return a Markdown table of two columns."""
    cells = [tuple(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in cells)


def file_names(value: Any) -> Any:
    """Return a path, or each of several, without its folders. Names, such as those of eval files, stay."""
    if isinstance(value, dict):
        return {key: file_names(each) if isinstance(each, str | dict | list) else each for key, each in value.items()}
    if isinstance(value, list):
        return [file_names(each) for each in value]
    if not isinstance(value, str):
        return value
    return value if is_hub_id(value) else Path(value).name


def base_metadata(base: Path) -> dict[str, Any]:
    """Return licence and hub id of a checkpoint, from its README.md's metadata and its config.json, if they tell."""
    found: dict[str, Any] = {}
    text = read_head(base / "README.md")
    if text.startswith("---\n") and "\n---" in text[4:]:
        try:
            metadata = parse_yaml(text[4 : text.index("\n---", 4)].encode())
        except ValueError:  # another's file: the card can do without
            metadata = None
        metadata = metadata if isinstance(metadata, dict) else {}
        for key in ("license", "license_name", "license_link"):
            if isinstance(metadata.get(key), str):
                found[key] = metadata[key]
    name = read_object(base / "config.json").get("_name_or_path")
    if isinstance(name, str) and is_hub_id(name):
        found["base_model"] = name
    return found


def read_head(path: Path) -> str:
    """Return the beginning of a text file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_YAML_BYTES).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return ""
