"""Conversion of a checkpoint's tensors for a model: quantizes 16-bit weights, and keeps 4-bit weights unchanged.

These are conversion operations of transformers. It calls them for one weight at a time; they set the module's weight.
"""

from __future__ import annotations

import ctypes
import re
from contextvars import ContextVar
from dataclasses import replace
from itertools import chain
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from onecard.errors import UserError
from onecard.hf.stored import TensorInfo, read_packed
from onecard.kernels import ops
from onecard.nn.experts import StackedWeight, weights_of
from onecard.nn.linear import Linear4bit
from onecard.paging.files import Segment
from onecard.paging.sharded import ShardedBase
from onecard.paging.weights import PagedBase
from onecard.quant.blockwise import check_stack
from onecard.quant.mxfp4 import BLOCKS, SCALES, from_mxfp4
from onecard.quant.state import QuantState, from_bnb

paging: ContextVar[tuple[PagedBase | ShardedBase, dict[str, Segment]] | None] = ContextVar("paging", default=None)
"""While a paged or sharded model loads: who takes its weights, and where the checkpoint's tensors lie."""
kept: ContextVar[dict[str, TensorInfo] | None] = ContextVar("kept", default=None)
"""While a model loads: the linears' weights that stay packed as the checkpoint stores them, by the model's names."""
MADV_DONTNEED = 4  # of Linux
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")  # the first line of each in /proc/self/maps
SMALL = 1 << 20  # bytes of a tensor that is copied out of its file
NOT_MORE = r"(?!\.)"  # after the codes' pattern: transformers before 5.21 would also match their scales


class Quantize4bit(ConversionOps):
    """Converts one weight to its codes, and sets codes and QuantState in the module."""

    def __init__(self, hf_quantizer: Any):
        self.hf_quantizer = hf_quantizer
        self.paging = found = paging.get()
        self.sharded = found[0] if found and isinstance(found[0], ShardedBase) else None
        self.kept = kept.get() or {}

    def __deepcopy__(self, memo: dict) -> Quantize4bit:
        return self  # transformers copies it for every weight, but errors and pages must be shared

    @property
    def reverse_op(self) -> ConversionOps:
        return Keep()

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
                # transformers would log this error and raise its own, so it is raised after the load.
                self.hf_quantizer.errors.append(error)
            module._is_hf_initialized = True
            result[name] = weight.weight
        return result

    def quantize(self, name: str, W: Tensor, linear: Linear4bit) -> None:
        """Quantize W into `linear`, or read its codes. Raises UserError for a wrong shape, NaN or Inf."""
        if name in self.kept:
            packed, state = read_packed(self.kept[name])
            check_shape(torch.empty(state.shape, device="meta"), (linear.out_features, linear.in_features), name)
            self.set(linear, packed.to(W.device), state.to(W.device))
            return
        W = W.T.contiguous() if name in self.hf_quantizer.transposed else W
        check_shape(W, (linear.out_features, linear.in_features), name)
        if self.sharded is None:
            self.set(linear, *ops.quantize_4bit(W, *self.quantization, name))
        else:
            self.sharded.quantize(linear, W.shape, [(0, name, W)], self.quantization)
        release_file_pages(W)

    def quantize_experts(self, name: str, values: Any, weight: StackedWeight) -> None:
        """Quantize experts one by one into `weight`. Raises UserError for a wrong number or shape, NaN or Inf.

        Args:
            values: the stacked tensor, or for each expert the tensors to concatenate along the first dimension.
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

        def expert(number: int) -> Tensor:
            value = values[number]
            pieces = [value] if isinstance(value, Tensor) else value
            for piece in pieces:
                check_shape(piece, (shape[0] // len(pieces), *shape[1:]), f"{name}, expert {number}")
            W = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            return W.mT if weight.turns(self.quantization[0]) else W

        stored_shape = weight.stored_shape(self.quantization[0])
        if self.sharded is None:
            experts = map(expert, range(num_experts))
            self.set(weight, *ops.quantize_stack(experts, stored_shape, *self.quantization, name))
        else:
            blocksize = self.quantization[1]
            numel, own = check_stack(stored_shape, blocksize, name), self.sharded.own(stored_shape.numel(), blocksize)
            first = min(own.start // numel, num_experts - 1)
            numbers = range(first, max(-(-own.stop // numel), first + 1))
            parts = ((number * numel, f"{name}, expert {number}", expert(number)) for number in numbers)
            self.sharded.quantize(weight, stored_shape, parts, self.quantization)
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
    """Converts one weight's tensors of a bitsandbytes checkpoint to its codes. Experts, which bitsandbytes leaves in
    16 bits, are quantized. So are all weights in 16 bits of a checkpoint with experts in MXFP4."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = {
            key.removesuffix(NOT_MORE): value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
        module, leaf = get_module_from_name(model, full_layer_name)
        weight = dict(weights_of(module)).get(leaf)
        first = min(tensors, key=len)
        if weight is None and f"{first}.absmax" in tensors:  # in 4 bits, but the model's code reads this weight
            suffixed = {key.removeprefix(first): tensor for key, tensor in tensors.items()}
            return {full_layer_name: ops.dequantize_4bit(*from_bnb(full_layer_name, suffixed))}
        if weight is None:  # transformers leaves its dtype to a converter
            dtype = getattr(module, leaf).dtype
            return {full_layer_name: tensors[first].to(dtype) if dtype.is_floating_point else tensors[first]}
        in_16_bits = isinstance(weight, StackedWeight) or self.hf_quantizer.quantization_config.linears_in_16_bits
        if tensors[first].is_floating_point() and in_16_bits:
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
        """Set the codes of `weight`: a copy in memory, or if paged, segments of the checkpoint's file."""
        if self.paging is None:
            weight.set_weight(packed.clone(), replace(state, absmax=state.absmax.clone()))
        else:
            base, places = self.paging
            weight.set_weight(packed, state)
            found = [places.get(key) for key in (name, f"{name}.absmax")]
            base.take(weight, (found[0], found[1]) if found[0] and found[1] else None)
        release_file_pages(packed)


class DeserializeMxfp4(Quantize4bit):
    """Converts an experts' stack in MXFP4 to its codes. No value changes, only the order of the nibbles."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        found = {key[-len(BLOCKS) :]: v[0] if isinstance(v, list) else v for key, v in input_dict.items()}
        blocks, scales = found[BLOCKS].to(torch.uint8), found[SCALES].to(torch.uint8)  # inspect_checkpoint saw both
        module, leaf = get_module_from_name(model, full_layer_name)
        weight: Any = dict(weights_of(module))[leaf]
        loaded: Any = module
        try:
            packed, state = from_mxfp4(full_layer_name, blocks, scales)
            check_shape(torch.empty(state.shape, device="meta"), weight.stored_shape("mxfp4"), full_layer_name)
            self.set(weight, packed, state)
            release_file_pages(blocks, scales)
        except UserError as error:
            self.hf_quantizer.errors.append(error)
        loaded._is_hf_initialized = True
        return {full_layer_name: weight.weight}


class Keep(ConversionOps):
    """The inverse of Deserialize4bit. It changes nothing: get_state_dict_and_metadata has made the tensors."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict


def mapped_files(unchanged: bool = False) -> list[tuple[int, int]]:
    """Return the first address and the end of each part of a checkpoint file that is mapped into memory.

    Args:
        unchanged: leave out parts in which the process has written: a written page is lost when it is released.
    """
    maps, found = Path("/proc/self/smaps" if unchanged else "/proc/self/maps"), list[tuple[int, int]]()
    inside = False
    for line in maps.read_text().splitlines() if maps.exists() else []:
        if match := MAPPING.match(line):
            inside = line.endswith(".safetensors")
            found += [(int(match[1], 16), int(match[2], 16))] if inside else []
        elif inside and line.startswith("Anonymous:") and line.split()[1] != "0":
            found.pop()
    return found


def is_mapped(tensor: Tensor, mapped: list[tuple[int, int]]) -> bool:
    begin = tensor.data_ptr()
    return tensor.device.type == "cpu" and any(low <= begin and begin + tensor.nbytes <= high for low, high in mapped)


def release_file_pages(*tensors: Tensor) -> None:
    """Release the memory of tensors that are parts of memory-mapped checkpoint files.

    These pages are unchanged file content, and a later access reads them again. Otherwise they would count as memory of
    the process until the file is closed: the whole checkpoint in 16 bits. Other tensors are not changed.
    """
    mapped = mapped_files()
    for tensor in tensors:
        if is_mapped(tensor, mapped):
            release(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def leave_files(model: nn.Module) -> None:
    """Copy a model's small tensors out of the memory-mapped checkpoint files, and release the files' pages.

    Since Linux 6.18, an access maps all of the file's pages that lie in one block of the page cache, up to 2 MiB. The
    norms, which lie between the linears, would bring most of the checkpoint back into the process's memory.
    """
    mapped = mapped_files()
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.nbytes < SMALL and is_mapped(tensor, mapped):
            tensor.data = tensor.data.clone()
    for low, high in mapped_files(unchanged=True):
        release(low, high)


def release(begin: int, end: int) -> None:
    """Release the whole pages of a range of memory that is mapped from a file."""
    first, last = -(-begin // PAGESIZE) * PAGESIZE, end // PAGESIZE * PAGESIZE
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)


def check_shape(W: Tensor, expected: tuple[int, ...], name: str) -> None:
    """Raise UserError unless W has the shape that follows from config.json."""
    if tuple(W.shape) != expected:
        raise UserError(
            f"the weight must have shape {list(expected)}",
            f"shape {list(W.shape)}",
            "the checkpoint does not fit its config.json: fetch both again",
            name,
        )
