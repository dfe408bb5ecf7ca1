"""Written files as models that compute in float32, to compare them: by onecard's own readers, and by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.head import model_class
from onecard.hf.load import find_checkpoint, load_model, source_of
from onecard.hf.report import check_report
from onecard.hf.skeleton import meta_model, read_config, read_model, stored_dtype
from onecard.nn.embedding import Head, cast_output, device_of


def load_written(path: Path, device: str) -> Any:
    """Load a checkpoint's folder, or a GGUF file, as a model that computes in float32. Linears and embeddings keep the
    16-bit values that the file has, or that are dequantized from it, and are cast at use.

    Raises:
        UserError: a file that its reader refuses; a tensor that is missing or unknown.
    """
    folder = find_checkpoint(str(path))
    checkpoint = inspect_checkpoint(folder)
    if checkpoint.is_4bit:
        return load_model(str(folder), compute_dtype=torch.float32, device=device)
    config = read_config(folder)
    how: dict[str, Any] = {"dtype": "auto"}
    kind: Any = model_class(config)
    if checkpoint.kinds:
        kind = type(meta_model(config, str(folder / "config.json"), checkpoint))
        vars(config).pop("quantization_config", None)
        how = {"config": config, "dtype": stored_dtype(folder)}
    with source_of(checkpoint) as source:
        model, report = kind.from_pretrained(**source, **how, local_files_only=True, output_loading_info=True)
    check_report(report, folder)
    model.eval()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Head(module))
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(cast_output(torch.float32))
    for module in model.modules():
        if not isinstance(module, (Head, nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return model.to(device)


def logits(model: Any, ids: Tensor, positions: Tensor, packed: bool) -> Tensor:
    """Return float32 logits (P, V) at some positions of one document (1, T)."""
    ids = ids.to(device_of(model))
    how = {"cu_seqlens": [0, ids.shape[1]]} if packed else {}
    kept = positions.to(ids.device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=kept, **how).logits[0].float().cpu()


def is_read_by_bitsandbytes(folder: Path) -> bool:
    """Whether bitsandbytes is installed, and reads all 4-bit weights of a checkpoint: it has none of experts."""
    return find_spec("bitsandbytes") is not None and not read_model(inspect_checkpoint(folder)).stacks


def load_in_bitsandbytes(path: Path, device: str) -> Any:
    """Load a 4-bit checkpoint with transformers and bitsandbytes, which onecard has no part in."""
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    kind: Any = model_class(read_config(path))
    model = kind.from_pretrained(path, dtype=torch.float32, device_map={"": device}, local_files_only=True).eval()
    for module in model.modules():
        if isinstance(module, layers.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.train()  # in evaluation mode it repacks its weight on a CPU
    return model
