"""Save a trained adapter's folder: write it completely, then replace an older one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from peft import LoraConfig

from onecard.adapter.layers import LoraLinear4bit
from onecard.adapter.origin import Origin, write_origin
from onecard.files import sync, sync_folder


def save_plain(model: Any, folder: Path) -> None:
    """Save an adapter by peft. One with a frozen start is saved as the plain LoRA of twice its rank that it computes.

    The config says no more how the adapter started: peft would make the start again, from 4-bit weights, on loading.
    """
    (name,) = model.active_adapters
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LoraLinear4bit) and name in m.starts}
    tensors = model.state_dict()
    for path, layer in layers.items():
        for key, tensor in zip((f"{path}.lora_A.{name}.weight", f"{path}.lora_B.{name}.weight"), layer.factors(name)):
            tensors[key] = tensor.detach()
    model.save_pretrained(folder, state_dict=tensors)
    config: Any = LoraConfig.from_pretrained(str(folder))
    config.init_lora_weights = True
    if config.task_type == "SEQ_CLS":  # peft adds the names that other families have
        config.modules_to_save = sorted(set(config.modules_to_save) - {"classifier"})
    if layers:
        factor = 2**0.5 if config.use_rslora else 2  # so that the scale stays
        config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
        config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
        config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    config.save_pretrained(str(folder))


def save_adapter(model: Any, folder: Path, origin: Origin, tokenizer: Any = None, config: Any = None) -> None:
    """Write peft's adapter folder under a temporary name, sync it, then replace an older folder by renaming.

    Args:
        tokenizer: saved with the adapter, if it is not the checkpoint's.
        config: transformers' config of a model with a classification head, saved with the adapter.

    The older folder is removed after the new one has its name: at each moment the disk holds a complete one.
    """
    temporary, older = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    save_plain(model, temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if config is not None:
        config.save_pretrained(temporary)
    write_origin(temporary, origin)
    for path in temporary.iterdir():
        sync(path)
    sync_folder(temporary)
    if folder.exists():
        shutil.rmtree(older, ignore_errors=True)
        os.rename(folder, older)
    try:
        os.rename(temporary, folder)
    except OSError:
        if older.exists():
            os.rename(older, folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(older, ignore_errors=True)
