"""The transformers quantizer: from_pretrained(..., quantization_config=onecard.BitsAndBytesConfig(...)).

transformers builds the model on the meta device. We replace its linears with Linear4bit. transformers then reads the
checkpoint tensor by tensor. `Quantize4bit` quantizes each linear's weight, and its 16-bit form is freed before the next
is read. Experts become Experts4bit and are quantized one by one. The checkpoint may store them separately or stacked,
and its linears may be in 16 bits or in bitsandbytes' 4 bits. Experts in MXFP4 stay as they are.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from onecard.config import QUANT_TYPES, QuantConfig, make_config
from onecard.errors import UserError
from onecard.hf.convert import (
    NOT_MORE,
    SMALL,
    Deserialize4bit,
    DeserializeMxfp4,
    Quantize4bit,
    check_shape,
    paging,
    release_file_pages,
)
from onecard.hf.experts import GatherExperts, only_stacks
from onecard.hf.fusion import fuse
from onecard.hf.text_only import attach, detach
from onecard.nn.embedding import Head
from onecard.nn.experts import Experts4bit, are_stacked_experts, weights_of
from onecard.nn.linear import Linear4bit
from onecard.nn.linears import beside_text, kept_names, linears_of, skipped_names
from onecard.quant.blockwise import all_finite
from onecard.quant.mxfp4 import BLOCKS, SCALES
from onecard.quant.state import BNB_KEYS, QuantState, to_bnb

MXFP4 = (BLOCKS, SCALES)
METHOD = "onecard"


class BitsAndBytesConfig(QuantizationConfigMixin):
    """transformers' BitsAndBytesConfig for 4 bits, computed by onecard. Arguments and defaults are the same.

    Args:
        load_in_4bit: must be True; 8-bit loading is not offered.
        bnb_4bit_quant_type: "fp4" (also transformers' default), "nf4", "int4", or "mxfp4" with a blocksize of 32.
        bnb_4bit_use_double_quant: store the scales in 8 bits.
        bnb_4bit_compute_dtype: dtype, or its name, that weights are dequantized to. None: float32.
        bnb_4bit_quant_storage: must be uint8.
        bnb_4bit_blocksize: weights that share a scale; onecard's addition.
        llm_int8_skip_modules: names of modules that stay in 16 bits; None: the output head.
    """

    def __init__(
        self,
        load_in_8bit: bool = False,
        load_in_4bit: bool = True,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_quant_type: str = "fp4",
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        bnb_4bit_blocksize: int = 64,
        llm_int8_skip_modules: list[str] | None = None,
        **kwargs: Any,
    ):
        where = "BitsAndBytesConfig"
        if load_in_8bit or not load_in_4bit:
            found = f"load_in_4bit={load_in_4bit}, load_in_8bit={load_in_8bit}"
            raise UserError("onecard loads in 4 bits", found, "pass load_in_4bit=True", where)
        if bnb_4bit_quant_storage not in (None, torch.uint8, "uint8"):
            raise UserError("bnb_4bit_quant_storage must be uint8", str(bnb_4bit_quant_storage), "leave it out", where)
        unknown = [key for key in kwargs if not key.startswith(("llm_int8_", "_")) and key != "quant_method"]
        if unknown:
            raise UserError("arguments must be BitsAndBytesConfig's", ", ".join(unknown), "correct the name", where)
        fields = {
            "quant_type": bnb_4bit_quant_type,
            "double_quant": bnb_4bit_use_double_quant,
            "blocksize": bnb_4bit_blocksize,
        }
        checked = make_config(QuantConfig, fields, where)
        self.quant_method: Any = METHOD
        self.load_in_4bit = True
        self.bnb_4bit_compute_dtype = as_dtype(bnb_4bit_compute_dtype or torch.float32)
        self.bnb_4bit_quant_type = checked.quant_type
        self.bnb_4bit_use_double_quant = checked.double_quant
        self.bnb_4bit_blocksize = checked.blocksize
        self.llm_int8_skip_modules = llm_int8_skip_modules
        self.linears_in_16_bits = bool(kwargs.get("_linears_in_16_bits"))  # of a quantized checkpoint: load.py sets it
        self.text_only = bool(kwargs.get("_text_only"))  # set by load.py, too

    def to_dict(self) -> dict[str, Any]:
        """Return a 4-bit checkpoint's entry in config.json: bitsandbytes' fields, so that it can read our checkpoints.

        The blocksize is not a field; it is in each weight's quant_state.
        """
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": str(self.bnb_4bit_compute_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": self.llm_int8_skip_modules,
        }


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a compute dtype from itself or its name. Raises UserError for another dtype."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError("the compute dtype must be float32, bfloat16 or float16", repr(dtype), "pass one of them")
    return found


class OnecardQuantizer(HfQuantizer):
    """Replaces a model's linears with Linear4bit and quantizes their weights when they are read."""

    requires_calibration = False

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.transposed: set[str] = set()
        self.errors: list[UserError] = []
        self.shapes: dict[str, torch.Size] = {}  # of the parameters that stay in 16 bits
        self.stacks: list[str] = []  # weights of the model's experts, by the end of their names
        self.left_out: dict[str, nn.Module] = {}  # modules that do not load

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise UserError under a launcher that would take the codes apart from their scales, or cannot shard codes."""
        uses_fsdp, at_first = (
            os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")
            for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
        )
        found = {
            "DeepSpeed ZeRO-3": is_deepspeed_zero3_enabled(),
            "fsdp_version 1": uses_fsdp and os.environ.get("FSDP_VERSION", "1") == "1",
            "fsdp_cpu_ram_efficient_loading: true": uses_fsdp and at_first,
        }
        for name in (name for name, holds in found.items() if holds):
            must = "accelerate must train 4-bit weights with DDP, or with FSDP2 on weights that each process loads"
            do = "set fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false, or use `onecard train --parallel fsdp`"
            raise UserError(must, name, do, "accelerate")

    @property
    def quantized_element_size(self) -> float:
        return 0.5

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what save_pretrained writes: linears and stacks as bitsandbytes' tensors, other tensors unchanged.

        Raises:
            UserError: int4 or mxfp4, which that format does not have; a paged base or a part that is not in memory.
        """
        if self.left_out:
            do = "load it without text_only, or use `onecard merge` or `onecard quantize`"
            raise UserError("a model must be in memory to be saved", "its text part", do, next(iter(self.left_out)))
        tensors = model.state_dict()
        for path, module in model.named_modules():
            for name, weight in weights_of(module):
                if weight.fetch is not None:
                    do = "load it without a weights_budget, or use `onecard quantize`"
                    raise UserError("a model must be in memory to be saved", "a paged base", do, path)
                found = to_bnb(weight.weight.detach(), weight.loaded_state)
                tensors |= {f"{path}.{name}{suffix}": tensor for suffix, tensor in found.items()}
        return tensors, {}

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return name in dict(weights_of(module))

    def get_quantize_ops(self) -> Quantize4bit:
        return Quantize4bit(self)

    def get_weight_conversions(self) -> list[Any]:
        """Return the converters that read the linears of a bitsandbytes checkpoint."""
        names = [f"weight{NOT_MORE}", *(f"weight.{key}" for key in BNB_KEYS)]
        return [WeightConverter(names, "weight", [Deserialize4bit(self)])] if self.pre_quantized else []

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Make experts load one by one, also if transformers would stack them or the linears are already in 4 bits.

        transformers passes its model since 5.21. `stacks` are those of the model whose weights load.
        """
        stacks, updated = self.stacks, []
        for converter in weight_conversions:
            if isinstance(converter, WeightConverter) and converter.target_patterns[0].endswith(tuple(stacks)):
                operations: list[Any] = [GatherExperts()] if only_stacks(converter.operations) else converter.operations
                if self.pre_quantized:  # else transformers adds it
                    operations = [*operations, Quantize4bit(self)]
                old, patterns = converter, (converter._original_source_patterns, converter._original_target_patterns)
                converter = WeightConverter(*patterns, operations=operations, force_cpu=old.force_cpu)
                converter.scope_prefix, converter.base_model_prefix = old.scope_prefix, old.base_model_prefix
            updated.append(converter)
        if self.pre_quantized:
            for stack in stacks:
                whole = rf"(?<=\.){stack}"
                names = [f"{whole}{NOT_MORE}", *(f"{whole}.{key}" for key in BNB_KEYS)]
                updated.append(WeightConverter([f"{whole}{end}" for end in MXFP4], stack, [DeserializeMxfp4(self)]))
                updated.append(WeightConverter(names, stack, [Deserialize4bit(self)]))
        return super().update_weight_conversions(updated, *model)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        config: Any = self.quantization_config
        if config.llm_int8_skip_modules is None:
            config.llm_int8_skip_modules = skipped_names(model)
        linears = linears_of(model, config.llm_int8_skip_modules)
        kept = kept_names(model, config.llm_int8_skip_modules) + beside_text(model)
        for name, module in list(model.named_modules()):
            if are_stacked_experts(module) and should_convert_module(name, kept):
                model.set_submodule(name, Experts4bit(module, config.bnb_4bit_compute_dtype).train(module.training))
        for name, module in linears.items():
            out_features, in_features = module.weight.shape
            if isinstance(module, Conv1D):
                self.transposed.add(f"{name}.weight")
                in_features, out_features = out_features, in_features
            has_bias = module.bias is not None
            linear = Linear4bit(in_features, out_features, has_bias, config.bnb_4bit_compute_dtype, "meta")
            # Until set_weight: transformers before 5.21 casts what it reads to the dtype of this parameter.
            linear.weight = nn.Parameter(linear.weight.to(module.weight.dtype), requires_grad=False)
            model.set_submodule(name, linear.train(module.training))
        self.left_out = detach(model) if config.text_only else {}
        named = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts4bit)]
        stored = {f"{path}.{name}" for path, module in model.named_modules() for name, _ in weights_of(module)}
        self.shapes = {name: p.shape for name, p in model.named_parameters() if name not in stored}
        self.stacks = sorted({f"{path.rpartition('.')[2]}.{name}" for path, module in named for name in module.weights})
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.errors:
            raise self.errors[0]
        attach(model, self.left_out)
        check_loaded(model)
        for name, tensor in model.named_parameters():
            if name in self.shapes:  # transformers before 5.21 checks it only without a quantizer
                check_shape(tensor, tuple(self.shapes[name]), name)
        kept = [c for c in getattr(model, "_weight_conversions", ()) if not is_experts(c)]
        model._weight_conversions = kept  # type: ignore[assignment]  # save_pretrained inverts them
        taker = paging.get()
        if taker is not None:
            taker[0].end_load(model)
        self.tell_how_stored(model)
        fuse(model)
        head = model.get_output_embeddings()
        if type(head) is nn.Linear:
            model.set_output_embeddings(Head(head))
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft and accelerate read it
        return model

    def tell_how_stored(self, model: PreTrainedModel) -> None:
        """Write the type, blocksize and nesting of the loaded weights, which a 4-bit checkpoint sets, to the config."""
        state = state_by_settings(model)
        if state is not None:
            config: Any = self.quantization_config
            config.bnb_4bit_quant_type, config.bnb_4bit_blocksize = state.quant_type, state.blocksize
            config.bnb_4bit_use_double_quant = state.nested


register_quantization_config(METHOD)(BitsAndBytesConfig)
register_quantizer(METHOD)(OnecardQuantizer)


def state_by_settings(model: nn.Module) -> QuantState | None:
    """Return the state of a linear that was not kept packed in a form that no setting names; None if there is none."""
    states = (m.loaded_state for m in model.modules() if isinstance(m, Linear4bit))
    return next((state for state in states if state.quant_type in QUANT_TYPES), None)


def quantization_of(model: Any) -> dict[str, Any]:
    """Return how a loaded model's weights in 16 bits were quantized: quant_type, blocksize, double_quant."""
    state, config = state_by_settings(model), model.config.quantization_config
    if state is not None:
        return {"quant_type": state.quant_type, "blocksize": state.blocksize, "double_quant": state.nested}
    return {
        "quant_type": config.bnb_4bit_quant_type,
        "blocksize": config.bnb_4bit_blocksize,
        "double_quant": config.bnb_4bit_use_double_quant,
    }


def is_experts(converter: Any) -> bool:
    """Whether `update_weight_conversions` made a converter for experts, which are saved as stacks."""
    operations = getattr(converter, "operations", ())
    return any(isinstance(operation, GatherExperts) for operation in operations) or (
        any(isinstance(operation, Quantize4bit) for operation in operations) and converter.target_patterns != ["weight"]
    )


def check_loaded(model: nn.Module) -> None:
    """Raise UserError if a linear or experts got no weight, or another parameter holds NaN or Inf."""
    for path, module in model.named_modules():
        for name, weight in weights_of(module):
            if weight.quant_state is None:
                raise UserError(
                    "every linear must have its weight in the checkpoint",
                    "none",
                    "fetch the checkpoint again, or use one of the same architecture",
                    f"{path}.{name}",
                )
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.device.type != "meta":
            check_finite(name, tensor)
            if tensor.nbytes >= SMALL:  # an embedding and a head are large, and not in memory at a time
                release_file_pages(tensor)


def check_finite(name: str, tensor: Tensor, slab: int = 1 << 22) -> None:
    """Raise UserError that names the first NaN or Inf of a tensor. It needs a few MiB of extra memory."""
    for number, piece in enumerate(tensor.detach().reshape(-1).split(slab)):
        if not all_finite(piece):
            first = int((~torch.isfinite(piece)).nonzero()[0])
            raise UserError(
                "every parameter must be finite",
                f"{piece[first].item()} at flat index {number * slab + first} of shape {list(tensor.shape)}",
                "the checkpoint is damaged or its training diverged: fetch it again or use an earlier one",
                name,
            )
