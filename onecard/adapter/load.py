"""Adapters on a model: load and check them, and switch between them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from safetensors import safe_open

from onecard.documents import Foreign, hold, read_object
from onecard.errors import UserError, first_line
from onecard.hf.checkpoint import FLOATS, read_header
from onecard.hf.head import is_headed
from onecard.hf.load import resize_vocabulary
from onecard.hf.quantizer import check_finite
from onecard.hf.stored import TensorInfo
from onecard.patterns import check_syntax, check_time, first_match, is_plain

WEIGHTS = "adapter_model.safetensors"
OTHER_BASE = "use the base model that the adapter was trained on"
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # peft's initializations that change the base

Rank = Annotated[int, Field(ge=1, le=1 << 16)]  # peft allocates it even for a module without tensors
Index = Annotated[int, Field(ge=0)]


class AdapterDocument(Foreign):
    """The fields of adapter_config.json that onecard reads; peft reads the rest."""

    peft_type: str
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    r: Rank | None = None
    lora_alpha: float | None = None
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    lora_dropout: float | None = Field(None, ge=0, lt=1)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[Index] | Index | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: list[Index] | dict[str, list[Index]] | None = None
    init_lora_weights: bool | str | None = None
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False

    @model_validator(mode="after")
    def _lora_has_a_scale(self) -> AdapterDocument:
        if self.peft_type == "LORA" and (self.r is None or self.lora_alpha is None):
            raise ValueError("LoRA must have r and lora_alpha")
        return self

    @model_validator(mode="after")
    def _patterns(self) -> AdapterDocument:
        check_syntax(self.expressions)
        return self

    @property
    def expressions(self) -> list[str]:
        """Return the regular expressions that peft builds from values that are not plain names."""
        layers = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ()
        whole = [text for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)]
        listed = self.target_modules if isinstance(self.target_modules, list) else ()
        made = {
            "%s": whole,
            r"(.*\.)?(%s)$": [*self.rank_pattern, *self.alpha_pattern],
            r"(?:^|.*?\.)%s\.(?P<idx>\d+)\.": layers,
            r"(^|.*\.)%s($|\..*)": [*(self.modules_to_save or ()), *listed],
        }
        return [form.replace("%s", text) for form, texts in made.items() for text in texts if not is_plain(text)]

    def rank_of(self, module: str) -> int | None:
        return first_match(self.rank_pattern, module, self.r)


def with_adapter(model: Any, adapter: str | None, name: str = "default") -> Any:
    """Return the model with a peft adapter folder loaded, in addition to the adapters that it has.

    Args:
        name: peft's name for the adapter, without dots.

    Raises:
        UserError: a file is missing or damaged; a tensor is missing, unknown, of another shape or not finite; the base
            is not the one that the adapter's onecard.json records.
    """
    if adapter is None:
        return model
    from peft import PeftModel

    from onecard.adapter.origin import check_origin
    from onecard.adapter.tokens import grown

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if (read_config(Path(adapter)).get("task_type") == "SEQ_CLS") != is_headed(base.config):
        must, found = "an adapter and its base must both have a classification head, or neither", "one of them has none"
        raise UserError(must, found, "use the adapter with `onecard classify`, or another adapter", adapter)
    check_origin(base, adapter)
    weights = Path(adapter) / WEIGHTS
    stored, config = stored_tensors(Path(adapter)), peft_config(Path(adapter))
    check_ranks(Path(adapter), stored, [name for name, _ in base.named_modules()])
    embeddings = [key for key in stored if re.search(r"embed_tokens(\.token_adapter\.base_layer)?\.weight$", key)]
    num_rows = max((stored[key].shape[0] for key in embeddings), default=0)
    if num_rows > base.get_input_embeddings().weight.shape[0]:  # tokens that training added
        resize_vocabulary(base, num_rows)
    try:
        with grown(base, config.trainable_token_indices):
            if isinstance(model, PeftModel):
                tuned = model
                tuned.add_adapter(name, config)
                tuned.load_adapter(adapter, name)
            else:
                tuned = PeftModel.from_pretrained(model, adapter, name, config=config)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError("the adapter must fit the model", first_line(error), OTHER_BASE, str(weights)) from None
    fill(tuned, Path(adapter), stored, name)
    return tuned.eval()


def fill(tuned: Any, folder: Path, stored: dict[str, TensorInfo], name: str) -> None:
    """Copy an adapter folder's tensors into a peft model's adapter. Raises UserError unless each has its place."""
    from peft import get_peft_model_state_dict

    weights = folder / WEIGHTS
    loaded = get_peft_model_state_dict(tuned, adapter_name=name)
    wrong = sorted(set(stored) ^ set(loaded))
    if wrong:
        found = f"{len(wrong)} differ, first {wrong[0]}"
        raise UserError("the adapter's tensors must be the model's", found, OTHER_BASE, str(weights))
    with torch.no_grad(), safe_open(weights, "pt") as file:
        for key, tensor in loaded.items():
            if tuple(tensor.shape) != tuple(stored[key].shape):
                found = f"{list(stored[key].shape)}, {list(tensor.shape)} in the model"
                raise UserError("the adapter's tensors must be the model's", found, OTHER_BASE, f"{weights}: {key}")
            tensor.copy_(file.get_tensor(key))  # peft renames keys of some families, and then skips them
            check_finite(f"{weights}: {key}", tensor)


def stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Read an adapter folder's header. Raises UserError for a damaged or missing file and for integers."""
    path = folder / WEIGHTS
    if not path.is_file():
        do = "pass the run's adapter/ folder"
        raise UserError(f"an adapter folder must hold {WEIGHTS}", "no such file", do, str(folder))
    stored = read_header(path)
    for key, info in stored.items():
        if info.dtype not in FLOATS:
            do = "use another copy of the adapter"
            raise UserError("an adapter's tensors must be floats", info.dtype, do, f"{path}: {key}")
    return stored


def read_config(folder: Path, modules: Iterable[str] = ()) -> dict[str, Any]:
    """Read adapter_config.json. Raises UserError for an invalid file, for patterns that take too long on these module
    names, and for an adapter whose initialization changed the base."""
    path = folder / "adapter_config.json"
    do = "save it again with peft"
    found = read_object(path, do, missing="pass the run's adapter/ folder")
    check_time(hold(AdapterDocument, found, str(path), do).expressions, modules, str(path))
    init = str(found.get("init_lora_weights")).lower()
    if init.startswith(CHANGES_BASE):
        raise UserError(
            "an adapter must be for the base as it is",
            f"init_lora_weights {init}, which trains over a changed base",
            "save it as plain LoRA: peft's save_pretrained(path_initial_model_for_weight_conversion=...)",
            str(path),
        )
    return found


def modules_of(stored: Iterable[str]) -> list[str]:
    """Return the names of the modules that an adapter's tensors belong to."""
    return sorted({key.removeprefix("base_model.model.").partition(".lora_")[0] for key in stored})


def check_ranks(folder: Path, stored: dict[str, TensorInfo], modules: Iterable[str] = ()) -> None:
    """Raise UserError unless the config's ranks are those of the tensors, before peft allocates memory for them.

    Args:
        modules: names of the model's modules.
    """
    path = folder / "adapter_config.json"
    config = AdapterDocument.model_validate(read_config(folder, [*modules_of(stored), *modules]))
    for key, info in stored.items():
        module, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
        rank = config.rank_of(module) if found else None
        if rank is not None and info.shape[0] % rank:  # lora_A of E experts has E r rows
            must = f"the config's rank must be that of the tensors, {info.shape[0]} in {key}"
            raise UserError(must, str(rank), "use the config that was saved with them", str(path))


def peft_config(folder: Path) -> Any:
    """Return peft's config of an adapter folder. Raises UserError for an invalid one."""
    from peft import PeftConfig

    from onecard.adapter.layers import register_fused

    read_config(folder)
    try:
        return register_fused(PeftConfig.from_pretrained(str(folder)))
    except Exception as error:  # peft raises many kinds, for settings that we do not read
        found, where = f"{type(error).__name__}: {first_line(error)}", str(folder / "adapter_config.json")
        raise UserError("the file must be an adapter's config of peft", found, "save it again", where) from None


def use_adapter(model: Any, name: str | None) -> None:
    """Make the model compute with that adapter; with None, without any adapter."""
    if name is not None:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name, inference_mode=True)
    elif hasattr(model, "peft_config"):
        model.base_model.disable_adapter_layers()
