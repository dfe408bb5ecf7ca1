"""The transformers quantizer: from_pretrained(..., quantization_config=onecard.BitsAndBytesConfig(...)).

transformers builds the model on the meta device, asks us to put Linear4bit where its linears are, then reads the
checkpoint tensor by tensor; each linear's weight passes through `Quantize4bit` and its 16-bit form is dropped
before the next is read. Experts become Experts4bit and are quantized one by one, whether the checkpoint has them in
tensors of their own or stacked, and whether its linears are in 16 bits or, by bitsandbytes, in 4.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from onecard.config import QuantConfig, make_config
from onecard.errors import UserError
from onecard.hf.experts import GatherExperts, only_stacks
from onecard.kernels import ops
from onecard.nn.embedding import Head
from onecard.nn.experts import Experts4bit, StackedWeight, are_stacked_experts, weights_of
from onecard.nn.fused import fuse
from onecard.nn.linear import Linear4bit
from onecard.paging.files import Segment
from onecard.paging.weights import PagedBase
from onecard.quant.state import BNB_KEYS, QuantState, from_bnb

METHOD = "onecard"
paging: ContextVar[tuple[PagedBase, dict[str, Segment]] | None] = ContextVar("paging", default=None)
"""While a paged model loads: who takes its weights, and where the checkpoint's tensors lie."""
MADV_DONTNEED = 4  # of Linux


class BitsAndBytesConfig(QuantizationConfigMixin):
    """transformers' BitsAndBytesConfig for 4 bits, computed by onecard; the arguments and defaults are its own.

    Args:
        load_in_4bit: must be True; 8-bit loading is not offered.
        bnb_4bit_quant_type: "fp4" (the default there, too), "nf4" or "int4".
        bnb_4bit_use_double_quant: keep the scales in 8 bits.
        bnb_4bit_compute_dtype: dtype or its name; what a weight is dequantized to. None: float32.
        bnb_4bit_quant_storage: must be uint8.
        bnb_4bit_blocksize: weights a scale; onecard's addition.
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

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "bnb_4bit_compute_dtype": str(self.bnb_4bit_compute_dtype)[len("torch.") :]}


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A float compute dtype from itself or its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError("the compute dtype must be float32, bfloat16 or float16", repr(dtype), "pass one of them")
    return found


class Quantize4bit(ConversionOps):
    """One weight in, its codes out; the QuantState goes to the module."""

    def __init__(self, hf_quantizer: OnecardQuantizer):
        self.hf_quantizer: Any = hf_quantizer
        self.paging = paging.get()

    def __deepcopy__(self, memo: dict) -> Quantize4bit:
        return self  # transformers copies it for every weight; errors and pages are shared

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        result = {}
        for key, values in input_dict.items():
            name = full_layer_name if len(input_dict) == 1 else key  # a key may be a pattern
            module, leaf = get_module_from_name(model, name)
            weight = dict(weights_of(module))[leaf]
            try:
                if isinstance(weight, StackedWeight):
                    self.quantize_experts(name, values, weight)
                else:
                    self.quantize(name, values[0] if isinstance(values, list) else values, weight)
            except UserError as error:
                # transformers would log an error raised here and end in one of its own: raised after loading.
                self.hf_quantizer.errors.append(error)
            module._is_hf_initialized = True
            result[name] = weight.weight
        return result

    def quantize(self, name: str, W: Tensor, linear: Linear4bit) -> None:
        """Give `linear` its weight. Raises UserError for a wrong shape, NaN or Inf."""
        W = W.T.contiguous() if name in self.hf_quantizer.transposed else W
        check_shape(W, (linear.out_features, linear.in_features), name)
        self.set(linear, *ops.quantize_4bit(W, *self.quantization, name))
        release_file_pages(W)

    def quantize_experts(self, name: str, values: Any, weight: StackedWeight) -> None:
        """Give `weight` its experts, one by one. Raises UserError for a wrong number or shape, NaN or Inf.

        Args:
            values: the stacked tensor, or for each expert the tensors that lie one below the other in it.
        """
        num_experts, *shape = weight.shape
        values = values[0] if isinstance(values, list) and values and isinstance(values[0], Tensor) else values
        if len(values) != num_experts:
            raise UserError(
                f"the checkpoint must have {num_experts} experts",
                f"{len(values) or 'not the same number of each tensor'}",
                "fetch the checkpoint again, or correct its config.json",
                name,
            )

        def experts() -> Iterator[Tensor]:
            for number, value in enumerate(values):
                pieces = [value] if isinstance(value, Tensor) else value
                for piece in pieces:
                    check_shape(piece, (shape[0] // len(pieces), *shape[1:]), f"{name}, expert {number}")
                yield pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        self.set(weight, *ops.quantize_stack(experts(), weight.shape, *self.quantization, name))
        release_file_pages(*[piece for value in values for piece in ([value] if isinstance(value, Tensor) else value)])

    @property
    def quantization(self) -> tuple[str, int, bool]:
        config: Any = self.hf_quantizer.quantization_config
        return config.bnb_4bit_quant_type, config.bnb_4bit_blocksize, config.bnb_4bit_use_double_quant

    def set(self, weight: Any, packed: Tensor, state: QuantState) -> None:
        weight.set_weight(packed, state)
        if self.paging is not None:
            self.paging[0].take(weight)


class Deserialize4bit(Quantize4bit):
    """One weight's tensors of a bitsandbytes checkpoint in, its codes out; experts that are in 16 bits there, as
    bitsandbytes leaves them, are quantized."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        module, leaf = get_module_from_name(model, full_layer_name)
        weight = dict(weights_of(module)).get(leaf)
        if weight is None:
            return tensors
        first = min(tensors, key=len)
        if tensors[first].is_floating_point() and isinstance(weight, StackedWeight):
            return super().convert({full_layer_name: tensors[first]}, full_layer_name, model)
        loaded: Any = module
        try:
            packed, state = from_bnb(full_layer_name, {key.removeprefix(first): t for key, t in tensors.items()})
            expected = weight.shape if isinstance(weight, StackedWeight) else (weight.out_features, weight.in_features)
            check_shape(torch.empty(state.shape, device="meta"), tuple(expected), full_layer_name)
            self.set_stored(weight, full_layer_name, packed, state)
        except UserError as error:
            self.hf_quantizer.errors.append(error)
        loaded._is_hf_initialized = True
        return {full_layer_name: weight.weight}

    def set_stored(self, weight: Any, name: str, packed: Tensor, state: QuantState) -> None:
        """Give `weight` its codes: in memory of its own, or as a page of the checkpoint's file."""
        if self.paging is None:
            weight.set_weight(packed.clone(), replace(state, absmax=state.absmax.clone()))
        else:
            base, places = self.paging
            weight.set_weight(packed, state)
            found = [places.get(key) for key in (name, f"{name}.absmax")]
            base.take(weight, (found[0], found[1]) if found[0] and found[1] else None)
        release_file_pages(packed)


def release_file_pages(*tensors: Tensor) -> None:
    """Let go of the memory that holds tensors' parts of memory-mapped checkpoint files.

    The pages are the file's, unwritten: who needs them again reads them again. Without this they would count as the
    process's until the file is closed, the whole checkpoint in 16 bits. Anything but such a mapping is left alone.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    lines = [line for line in maps.read_text().splitlines() if line.endswith(".safetensors")]
    mapped = [tuple(int(edge, 16) for edge in line.split(" ", 1)[0].split("-")) for line in lines]
    for tensor in tensors:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if tensor.device.type == "cpu" and any(low <= begin and end <= high for low, high in mapped):
            first, last = -(-begin // PAGESIZE) * PAGESIZE, end // PAGESIZE * PAGESIZE
            if first < last:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)


def check_shape(W: Tensor, expected: tuple[int, ...], name: str) -> None:
    """Raise UserError unless W has the shape that config.json promises."""
    if tuple(W.shape) != expected:
        raise UserError(
            f"the weight must have shape {list(expected)}",
            f"shape {list(W.shape)}",
            "the checkpoint does not fit its config.json: fetch both again",
            name,
        )


class OnecardQuantizer(HfQuantizer):
    """Puts Linear4bit in place of a model's linears and quantizes their weights as they are read."""

    requires_calibration = False
    serialized_names: ClassVar[dict[str, list[str]]] = {"weight": ["weight", *(f"weight.{key}" for key in BNB_KEYS)]}

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.transposed: set[str] = set()
        self.errors: list[UserError] = []

    @property
    def quantized_element_size(self) -> float:
        return 0.5

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return name in dict(weights_of(module))

    def get_quantize_ops(self) -> Quantize4bit:
        return Quantize4bit(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": Deserialize4bit}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Experts come one by one: where transformers would stack them, and where linears are in 4 bits already."""
        named = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts4bit)]
        stacks = sorted({f"{path.rpartition('.')[2]}.{name}" for path, module in named for name in module.weights})
        updated = []
        for converter in weight_conversions:
            if isinstance(converter, WeightConverter) and converter.target_patterns[0].endswith(tuple(stacks)):
                operations = [GatherExperts()] if only_stacks(converter.operations) else converter.operations
                if self.pre_quantized:  # else transformers adds it
                    operations = [*operations, Quantize4bit(self)]
                sources, targets = converter._original_source_patterns, converter._original_target_patterns
                converter = converter.copy(sources, targets, operations=operations)
            updated.append(converter)
        if self.pre_quantized:
            for stack in stacks:
                whole = rf"(?<=\.){stack}"
                names = [whole, *(f"{whole}.{key}" for key in BNB_KEYS)]
                updated.append(WeightConverter(names, stack, [Deserialize4bit(self)]))
        return super().update_weight_conversions(updated, model)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        config: Any = self.quantization_config
        kept: Any = model._keep_in_fp32_modules
        skip = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules, kept)
        for name, module in list(model.named_modules()):
            if are_stacked_experts(module) and should_convert_module(name, skip):
                model.set_submodule(name, Experts4bit(module, config.bnb_4bit_compute_dtype).train(module.training))
            if not isinstance(module, (nn.Linear, Conv1D)) or not should_convert_module(name, skip):
                continue
            out_features, in_features = module.weight.shape
            if isinstance(module, Conv1D):
                self.transposed.add(f"{name}.weight")
                in_features, out_features = out_features, in_features
            has_bias = module.bias is not None
            linear = Linear4bit(in_features, out_features, has_bias, config.bnb_4bit_compute_dtype, "meta")
            model.set_submodule(name, linear.train(module.training))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.errors:
            raise self.errors[0]
        check_loaded(model)
        fuse(model)
        head = model.get_output_embeddings()
        if type(head) is nn.Linear:
            model.set_output_embeddings(Head(head))
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft and accelerate ask for it
        return model


register_quantization_config(METHOD)(BitsAndBytesConfig)
register_quantizer(METHOD)(OnecardQuantizer)


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


def check_finite(name: str, tensor: Tensor, slab: int = 1 << 22) -> None:
    """Raise UserError naming the first NaN or Inf of a tensor; takes a few MiB of extra memory."""
    for number, piece in enumerate(tensor.detach().reshape(-1).split(slab)):
        finite = torch.isfinite(piece)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise UserError(
                "every parameter must be finite",
                f"{piece[first].item()} at flat index {number * slab + first} of shape {list(tensor.shape)}",
                "the checkpoint is damaged or its training diverged: fetch it again or use an earlier one",
                name,
            )
