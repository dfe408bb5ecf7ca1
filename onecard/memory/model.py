"""What a plan knows of a model: its modules without weights, from a folder's, a hub repository's or a table's facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.nn import Linear
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from onecard.adapter.targets import check_targets
from onecard.config import LoraSettings
from onecard.errors import UserError, did_you_mean
from onecard.hf.checkpoint import DTYPE_BITS, Checkpoint, inspect_checkpoint
from onecard.hf.experts import expert_places
from onecard.hf.load import find_checkpoint, first_line, is_hub_id, meta_model, read_config
from onecard.hf.names import stored_names
from onecard.hf.stacks import Stack, stacks_of
from onecard.memory.shapes import KNOWN
from onecard.nn.linears import linears_of


@dataclass(frozen=True, eq=False)
class Model:
    """What a plan needs to know of a model: its modules without weights, and the bytes of each stored value."""

    modules: Any  # transformers' model on the meta device
    itemsize: dict[str, int]  # of a parameter as stored; 2 where it is not named
    stored: dict[str, str] = field(default_factory=dict)  # the checkpoint's name of each parameter that it holds

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """The linears that 4 bits take, by their weight's name."""
        found = linears_of(self.modules)
        turned = {name: Linear(m.nx, m.nf, device="meta") for name, m in found.items() if isinstance(m, Conv1D)}
        return {f"{name}.weight": module for name, module in (found | turned).items()}

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """Experts' stacked weights, by name."""
        return stacks_of(self.modules)

    @cached_property
    def quantized(self) -> dict[str, Any]:
        """All that 4 bits take."""
        return {**self.linears, **self.stacks}

    def check_names(self, lora: LoraSettings) -> None:
        """Raise UserError unless target_modules are linears, modules_to_save modules without 4 bits, and
        target_parameters experts' weights."""
        check_targets(self.modules, lora, bool(self.stacks))
        for name in lora.modules_to_save or ():
            paths = [path for path, _ in self.modules.named_modules() if f".{path}".endswith(f".{name}")]
            if not paths:
                found = f'none is called "{name}"'
                must = "modules_to_save must name modules of the model"
                raise UserError(must, found, "correct it", "modules_to_save")
            if any(f"{weight}.".startswith(f"{path}.") for path in paths for weight in self.quantized):
                found = f'"{name}" is in 4 bits'
                must = "modules_to_save must name modules that are not in 4 bits, like embed_tokens and lm_head"
                raise UserError(must, found, "name it in target_modules instead", "modules_to_save")
        for name in lora.target_parameters or ():
            if not any(f".{path}".endswith(f".{name}") for path in self.stacks):
                found = f'none is called "{name}"; there are {", ".join(sorted(self.stacks)) or "no experts"}'
                must = "target_parameters must name stacked weights of the model's experts"
                raise UserError(must, found[:200], "correct it", "target_parameters")

    def unmerged(self, checkpoint: Checkpoint) -> str | None:
        """What 4 bits take that the checkpoint does not hold by itself, as a weight of the model or as experts'
        matrices: transformers makes it from other tensors, so an update has no place to go to."""
        places = expert_places(self.modules, self.stacks, checkpoint.tensors) if self.stacks else {}
        there = {*self.stored, *(place.stack for place in places.values())}
        return next(iter(sorted(set(self.quantized) - there)), None)

    def check_stored(self, checkpoint: Checkpoint) -> None:
        """Raise UserError unless an adapter of the model can be added to the checkpoint's tensors."""
        missing = self.unmerged(checkpoint)
        if missing:
            found = f"no {missing}, which transformers may make from others as it loads"
            do = "train, generate and serve take it; save_pretrained of load_model's writes it in 4 bits"
            must = "the checkpoint must hold each weight that training has in 4 bits"
            raise UserError(must, found, do, str(checkpoint.folder))

    @cached_property
    def num_weights(self) -> int:
        return sum(p.numel() for p in self.modules.parameters())

    @cached_property
    def head_itemsize(self) -> int:
        head = self.modules.get_output_embeddings()
        name = next((n for n, p in self.modules.named_parameters() if head is not None and p is head.weight), "")
        return self.itemsize.get(name, 2)

    @cached_property
    def text(self) -> Any:
        return self.modules.config.get_text_config()

    @cached_property
    def num_layers(self) -> int:
        return self.text.num_hidden_layers

    @cached_property
    def longest_context(self) -> int:
        return getattr(self.text, "max_position_embeddings", None) or 1 << 30


def known_config(name: str) -> Any:
    """transformers' config of a model of the table."""
    fields = dict(KNOWN[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def read_model(checkpoint: Checkpoint) -> Model:
    """A checkpoint's model from its config and headers."""
    sizes = {name: DTYPE_BITS[info.dtype] // 8 for name, info in checkpoint.tensors.items()}
    where = str(checkpoint.folder / "config.json")
    return named(meta_model(read_config(checkpoint.folder), where, checkpoint), sizes)


def named(modules: Any, sizes: dict[str, int]) -> Model:
    """A model whose checkpoint holds values of these bytes, by tensor."""
    stored = stored_names(modules, sizes)
    return Model(modules, {own: sizes[name] for own, name in stored.items()}, stored)


def find_model(model: str) -> Model:
    """A model by its folder, its name in the table, or its hub id.

    Raises:
        UserError: there is none such, with the nearest name of the table.
    """
    if model.lower() in KNOWN:
        return Model(meta_model(known_config(model.lower()), model), {})
    if is_hub_id(model):
        return read_hub(model)
    try:
        return read_model(inspect_checkpoint(find_checkpoint(model)))
    except UserError as error:
        raise UserError(error.must, f"{error.found}{did_you_mean(model.lower(), KNOWN)}", error.do, model) from None


def read_hub(repository: str) -> Model:
    """A hub repository's model from its config.json and its files' headers alone; no weight is fetched."""
    from huggingface_hub import get_safetensors_metadata

    config: Any = from_hub(lambda: AutoConfig.from_pretrained(repository, trust_remote_code=False), repository)
    headers: Any = from_hub(lambda: get_safetensors_metadata(repository), repository)
    tensors = [item for file in headers.files_metadata.values() for item in file.tensors.items()]
    sizes = {name: DTYPE_BITS.get(info.dtype, 16) // 8 for name, info in tensors}
    return named(meta_model(config, repository), sizes)


def from_hub(fetch: Callable[[], Any], repository: str) -> Any:
    """What the hub's client gives, whatever it raises told as a UserError."""
    try:
        return fetch()
    except Exception as error:
        raise UserError(
            "the model must be a folder, a hub id in reach or a known name",
            f"{first_line(error)}{did_you_mean(repository.lower(), KNOWN)}",
            "check name and network",
            repository,
        ) from None
