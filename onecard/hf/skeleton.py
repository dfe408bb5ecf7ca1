"""A model without weights: its modules on the meta device, and the checkpoint's form of each parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn import Linear
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from onecard.config import QuantConfig
from onecard.errors import UserError, first_line
from onecard.hf.checkpoint import Checkpoint
from onecard.hf.documents import far_more_refused, read_model_document
from onecard.hf.experts import expert_places
from onecard.hf.head import check_head, is_causal, is_headed, is_multimodal, model_class, with_labels
from onecard.hf.names import stored_names
from onecard.hf.stacks import Stack, stacks_of
from onecard.hf.stored import DTYPE_BITS, TensorInfo
from onecard.nn.linears import linears_of
from onecard.nn.slabs import is_grouped
from onecard.quant.mxfp4 import BLOCKS
from onecard.quant.scales import Storage
from onecard.quant.state import BNB_KEYS


@dataclass(frozen=True, eq=False)
class Model:
    """A model's modules, and the bytes of each stored value."""

    modules: Any  # transformers' model on the meta device
    itemsize: dict[str, int]  # of a parameter as stored; 2 if it is not named
    stored: dict[str, str] = field(default_factory=dict)  # the checkpoint's name of each parameter that it holds
    mxfp4: frozenset[str] = frozenset()  # names of the stacks that the checkpoint stores in MXFP4
    kept: dict[str, Storage] = field(default_factory=dict)  # of the linears' weights that stay packed, by name

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """The linears to quantize, by their weight's name."""
        found = linears_of(self.modules)
        turned = {name: Linear(m.nx, m.nf, device="meta") for name, m in found.items() if isinstance(m, Conv1D)}
        return {f"{name}.weight": module for name, module in (found | turned).items()}

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """Experts' stacked weights, by name."""
        return stacks_of(self.modules)

    @cached_property
    def quantized(self) -> dict[str, Any]:
        """All linears and stacks to quantize, by their weight's name."""
        return {**self.linears, **self.stacks}

    def slab_bytes(self, config: QuantConfig, device: torch.device, dtype: torch.dtype) -> int:
        """Return the bytes of the largest slab of experts (nn/slabs.py); 0 if they are computed in turn."""
        if not is_grouped(device, dtype):
            return 0
        kinds = {name: "mxfp4" if name in self.mxfp4 else config.quant_type for name in self.stacks}
        sizes = (stack.slab_bytes(kinds[name], config.blocksize, dtype.itemsize) for name, stack in self.stacks.items())
        return max(sizes, default=0)

    def unmerged(self, checkpoint: Checkpoint) -> str | None:
        """Return a weight to quantize that the checkpoint stores neither as such nor as experts' matrices, or None.
        transformers makes it from other tensors, so the checkpoint has no tensor for its update."""
        places = expert_places(self.modules, self.stacks, checkpoint.weights) if self.stacks else {}
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


def read_model(checkpoint: Checkpoint) -> Model:
    """Make a checkpoint's Model from its config and headers."""
    sizes = {name: DTYPE_BITS[info.dtype] // 8 for name, info in checkpoint.tensors.items()}
    where = str(checkpoint.folder / "config.json")
    found = named(meta_model(read_config(checkpoint.folder), where, checkpoint, checkpoint.labels), sizes)
    kept = {name: info.form.storage for name, info in kept_packed(found.modules, checkpoint).items() if info.form}
    return replace(found, kept=kept)


def kept_packed(modules: Any, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Return the linears' weights that stay in memory as the checkpoint stores them in few bits, by the model's names.
    A Conv1D's do not: its matrix is turned."""
    if not checkpoint.kinds:
        return {}
    stored, linears = stored_names(modules, checkpoint.tensors), linears_of(modules)
    named = {f"{name}.weight": linear for name, linear in linears.items() if not isinstance(linear, Conv1D)}
    infos = {name: checkpoint.tensors[stored[name]] for name in named if name in stored}
    return {name: info for name, info in infos.items() if info.form is not None and info.form.storage is not None}


def named(modules: Any, sizes: dict[str, int]) -> Model:
    """Make a Model. `sizes` has the bytes of each stored value, by the checkpoint's tensor. A parameter that
    transformers makes from several tensors has the most frequent size."""
    stored = stored_names(modules, sizes)
    plain = [size for name, size in sizes.items() if size > 1 and name.rpartition(".")[2] not in BNB_KEYS]
    usual = Counter(plain).most_common(1)
    itemsize = {name: usual[0][0] for name, _ in modules.named_parameters()} if usual else {}
    packed = [name.removesuffix(BLOCKS) for name in sizes if name.endswith(BLOCKS)]
    mxfp4 = expert_places(modules, stacks_of(modules), packed).values() if packed else ()
    itemsize |= {own: sizes[name] for own, name in stored.items()}
    return Model(modules, itemsize, stored, frozenset(place.stack for place in mxfp4))


def meta_model(config: Any, where: str, checkpoint: Checkpoint | None = None, labels: Sequence[str] = ()) -> Any:
    """Build transformers' model of a config without weights.

    Args:
        checkpoint: the checkpoint of the config. It limits the size of the model.
        labels: of a classification head, which the model gets in place of its own; then the config gets them, too.

    Raises:
        UserError: the config contradicts itself, or describes far more than the checkpoint holds; it has a
            classification head, and no labels are given; its family has no such head.
    """
    known = (checkpoint.num_weights, len(checkpoint.tensors)) if checkpoint else None
    if labels:
        with_labels(config, labels, where)
    elif is_headed(config):
        must, do = "the checkpoint must be a causal language model's", "`onecard classify` and `onecard eval` take it"
        raise UserError(must, f"{config.architectures[0]}, with a classification head", do, where)
    try:
        with torch.device("meta"), far_more_refused(known, where):
            model = model_class(config, labels).from_config(config, trust_remote_code=False)
            model.get_input_embeddings()  # which transformers cannot tell of some models of images
    except UserError:
        raise
    except Exception as error:
        raise bad_config(error, where) from None
    if labels:
        check_head(model, where)
    return model


def read_config(folder: Path) -> Any:
    """Read a checkpoint's config with transformers. A model that needs its own code is refused without a question."""
    read_model_document(folder)
    where = str(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise bad_config(error, where) from None
    check_text(config, where)
    return config


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the checkpoint's dtype as config.json states it, or float32 if it states none."""
    dtype = read_config(folder).dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def check_text(config: Any, where: str) -> None:
    """Raise UserError if transformers has no model of the whole of a multimodal checkpoint that writes text."""
    if config.get_text_config() is not config and not is_causal(config) and not is_multimodal(config):
        found = f"{config.model_type}, a checkpoint of text and other parts"
        do = "use a checkpoint of the text model alone, such as the family's text-only release"
        raise UserError("the checkpoint must be a causal language model's", found, do, where)
    if not hasattr(config.get_text_config(), "num_hidden_layers"):
        found = f"{config.model_type}, whose config gives no num_hidden_layers"
        do = "docs/families.md names the families that train"
        raise UserError("the model must be one stack of layers, by which memory is planned", found, do, where)


def bad_config(error: Exception, where: str) -> UserError:
    found = f"{type(error).__name__}: {first_line(error)}"
    do = "correct it, or use a checkpoint that transformers knows; code in a checkpoint is never run"
    return UserError("config.json must describe a causal language model", found, do, where)
