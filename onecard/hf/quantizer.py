"""The transformers quantizer: from_pretrained(..., quantization_config=onecard.BitsAndBytesConfig(...)).

transformers builds the model on the meta device, asks us to put Linear4bit where its linears are, then reads the
checkpoint tensor by tensor; each linear's weight passes through `Quantize4bit` and its 16-bit form is dropped
before the next is read.
"""

from __future__ import annotations

import ctypes
from contextvars import ContextVar
from dataclasses import replace
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from onecard.config import QuantConfig, make_config
from onecard.errors import UserError
from onecard.kernels import ops
from onecard.nn.embedding import Head
from onecard.nn.fused import fuse
from onecard.nn.linear import Linear4bit
from onecard.paging.files import Segment
from onecard.paging.weights import PagedBase
from onecard.quant.state import BNB_KEYS, QuantState, from_bnb, to_bnb

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
        """What config.json says of a checkpoint in 4 bits: bitsandbytes' own fields, so that it reads ours.

        The blocksize is not among them; each weight's own tensors tell it.
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
    """A float compute dtype from itself or its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError("the compute dtype must be float32, bfloat16 or float16", repr(dtype), "pass one of them")
    return found


class Quantize4bit(ConversionOps):
    """One linear's weight in, its codes out; the QuantState goes to the module."""

    def __init__(self, hf_quantizer: OnecardQuantizer):
        self.hf_quantizer: Any = hf_quantizer
        self.paging = paging.get()

    def convert(
        self, input_dict: dict[str, Any], full_layer_name=None, model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        result = {}
        for name, values in input_dict.items():
            module, _ = get_module_from_name(model, name)
            try:
                self.quantize(name, values[0] if isinstance(values, list) else values, module)
            except UserError as error:
                # transformers would log an error raised here and end in one of its own: raised after loading.
                self.hf_quantizer.errors.append(error)
            module._is_hf_initialized = True
            result[name] = module.weight
        return result

    def quantize(self, name: str, W: Tensor, module: Any) -> None:
        """Give `module` its weight. Raises UserError for a wrong shape, NaN or Inf."""
        config: Any = self.hf_quantizer.quantization_config
        W = W.T.contiguous() if name in self.hf_quantizer.transposed else W
        check_shape(W, (module.out_features, module.in_features), name)
        packed, state = ops.quantize_4bit(
            W,
            config.bnb_4bit_quant_type,
            config.bnb_4bit_blocksize,
            config.bnb_4bit_use_double_quant,
            name,
        )
        module.set_weight(packed, state)
        if self.paging is not None:
            self.paging[0].take(module)
        release_file_pages(W)


class Deserialize4bit(ConversionOps):
    """One linear's tensors of a bitsandbytes checkpoint in, its codes out; the QuantState goes to the module."""

    def __init__(self, hf_quantizer: OnecardQuantizer):
        self.hf_quantizer: Any = hf_quantizer
        self.paging = paging.get()

    def __deepcopy__(self, memo: dict) -> Deserialize4bit:
        return self  # transformers copies it for every weight; errors and pages are shared

    @property
    def reverse_op(self) -> ConversionOps:
        return Keep()

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        module, name = get_module_from_name(model, full_layer_name)
        if not isinstance(module, Linear4bit) or name != "weight":
            return tensors
        loaded: Any = module
        try:
            packed, state = from_bnb(full_layer_name, {key.removeprefix("weight"): t for key, t in tensors.items()})
            check_shape(
                torch.empty(state.shape, device="meta"), (module.out_features, module.in_features), full_layer_name
            )
            self.set(module, full_layer_name, packed, state)
        except UserError as error:
            self.hf_quantizer.errors.append(error)
        loaded._is_hf_initialized = True
        return {"weight": module.weight}

    def set(self, module: Linear4bit, name: str, packed: Tensor, state: QuantState) -> None:
        """Give `module` its weight: in memory of its own, or as a page of the checkpoint's file."""
        if self.paging is None:
            module.set_weight(packed.clone(), replace(state, absmax=state.absmax.clone()))
        else:
            base, places = self.paging
            module.set_weight(packed, state)
            found = [places.get(key) for key in (name, f"{name}.absmax")]
            base.take(module, (found[0], found[1]) if found[0] and found[1] else None)
        release_file_pages(packed)


class Keep(ConversionOps):
    """The way back of Deserialize4bit: get_state_dict_and_metadata has made a weight's tensors already."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict


def release_file_pages(W: Tensor) -> None:
    """Let go of the memory that holds a tensor's part of a memory-mapped checkpoint file.

    The pages are the file's, unwritten: who needs them again reads them again. Without this they would count as the
    process's until the file is closed, the whole checkpoint in 16 bits. Anything but such a mapping is left alone.
    """
    maps = Path("/proc/self/maps")
    if W.device.type != "cpu" or not maps.exists():
        return
    begin, end = W.data_ptr(), W.data_ptr() + W.nbytes
    for line in maps.read_text().splitlines():
        if line.endswith(".safetensors"):
            low, high = (int(edge, 16) for edge in line.split(" ", 1)[0].split("-"))
            if low <= begin and end <= high:
                first, last = -(-begin // PAGESIZE) * PAGESIZE, end // PAGESIZE * PAGESIZE
                if first < last:
                    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)
                return


def check_shape(W: Tensor, expected: tuple[int, int], name: str) -> None:
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
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes: each linear as bitsandbytes' tensors, all else as it is.

        Raises:
            UserError: int4, which that format lacks; a paged base, which is in no memory.
        """
        tensors = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                if module.fetch is not None:
                    do = "load it without a weights_budget, or use `onecard quantize`"
                    raise UserError("a model must be in memory to be saved", "a paged base", do, name)
                found = to_bnb(module.weight.detach(), module.loaded_state)
                tensors |= {f"{name}.weight{suffix}": tensor for suffix, tensor in found.items()}
        return tensors, {}

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def get_quantize_ops(self) -> Quantize4bit:
        return Quantize4bit(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": Deserialize4bit}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        config: Any = self.quantization_config
        kept: Any = model._keep_in_fp32_modules
        skip = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules, kept)
        for name, module in list(model.named_modules()):
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
        self.tell_how_stored(model)
        fuse(model)
        head = model.get_output_embeddings()
        if type(head) is nn.Linear:
            model.set_output_embeddings(Head(head))
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft and accelerate ask for it
        return model

    def tell_how_stored(self, model: PreTrainedModel) -> None:
        """A checkpoint in 4 bits keeps its own type, blocks and nesting: let the model's config say so."""
        state = next((m.loaded_state for m in model.modules() if isinstance(m, Linear4bit)), None)
        if state is not None:
            config: Any = self.quantization_config
            config.bnb_4bit_quant_type, config.bnb_4bit_blocksize = state.quant_type, state.blocksize
            config.bnb_4bit_use_double_quant = state.nested


register_quantization_config(METHOD)(BitsAndBytesConfig)
register_quantizer(METHOD)(OnecardQuantizer)


def check_loaded(model: nn.Module) -> None:
    """Raise UserError if a linear got no weight, or another parameter holds NaN or Inf."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.quant_state is None:
            raise UserError(
                "every linear must have its weight in the checkpoint",
                "none",
                "fetch the checkpoint again, or use one of the same architecture",
                f"{name}.weight",
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
