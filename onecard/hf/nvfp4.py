"""Linears stored in NVFP4: codes of E2M1 in blocks of 16 of a row, an E4M3 scale a block, a float32 scale a tensor.

    W[n, k] = float32(E2M1[code[n, k]]) * s[n, k // 16],    s = float32(scale) * tensor_scale      (ModelOpt)
                                                            s = float32(scale) / tensor_scale      (compressed-tensors)

s is rounded to float32, and so is the product, which is then rounded once to the checkpoint's 16-bit dtype, as in
compressed-tensors. A linear keeps these codes and scales in memory. Two codes are in a byte, the first in the low half:

    ModelOpt            weight (N, K / 2), weight_scale (N, K / 16), weight_scale_2 (one value)
    compressed-tensors  weight_packed (N, K / 2), weight_scale (N, K / 16), weight_global_scale (one value)

The scales of activations and of a KV cache are not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from onecard.documents import Foreign, hold
from onecard.hf.fp8 import DO, UNUSED, WHERE, model_dtype, refused
from onecard.hf.stored import Form, TensorInfo, computed, damaged, read_rows, read_tensor
from onecard.quant.blockwise import all_finite
from onecard.quant.codebook import MXFP4 as E2M1
from onecard.quant.nvfp4 import BLOCK, from_nvfp4, scale_map
from onecard.quant.scales import Storage
from onecard.quant.state import QuantState

SUFFIXES = {  # of codes, scales and the tensor's scale
    "modelopt": (".weight", ".weight_scale", ".weight_scale_2"),
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_global_scale"),
}


class ModelOpt(Foreign):
    """The quantization_config of ModelOpt's NVFP4 checkpoints."""

    quant_method: Literal["modelopt"]
    quant_algo: Literal["NVFP4"]


class WeightArgs(Foreign):
    """How compressed-tensors stores the weights of a group of linears."""

    num_bits: Literal[4]
    type: Literal["float"]
    strategy: Literal["tensor_group"]
    group_size: Literal[16]


class Group(Foreign):
    """A group of linears of compressed-tensors."""

    weights: WeightArgs


class PackQuantized(Foreign):
    """The quantization_config of compressed-tensors' NVFP4 checkpoints."""

    quant_method: Literal["compressed-tensors"]
    format: Literal["nvfp4-pack-quantized"]
    config_groups: dict[str, Group] = Field(min_length=1)


@dataclass(frozen=True)
class NVFP4(Form):
    """A matrix (N, K) of E2M1 codes. `divides`: the blocks' scales are divided by the tensor's."""

    name: str
    codes: TensorInfo
    scales: TensorInfo
    tensor_scale: TensorInfo
    divides: bool

    @property
    def kind(self) -> str:
        return "NVFP4"

    @property
    def storage(self) -> Storage:
        return Storage("nvfp4", BLOCK)

    def packed(self, first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, QuantState]:
        """Return codes and state. Raises UserError for a scale of NaN or Inf, also after the tensor's."""
        scales = read_rows(self.scales, first, count).view(torch.uint8)
        table = scale_map(read_tensor(self.tensor_scale).reshape(()), self.divides)
        self.check(table[scales.unique().long()])
        return from_nvfp4(read_rows(self.codes, first, count), scales, table, dtype)

    def check(self, scales: Tensor) -> None:
        if not all_finite(scales):
            raise damaged("scales of NVFP4 must be finite", "a scale that is NaN or Inf", self.codes, self.name)

    def rows(self, first: int, count: int) -> Tensor:
        """Return rows in float32, (count, K). Raises UserError for a scale of NaN or Inf, also after the tensor's."""
        codes = read_rows(self.codes, first, count)
        scales, whole = read_rows(self.scales, first, count).float(), read_tensor(self.tensor_scale).reshape(())
        scales = scales / whole if self.divides else scales * whole
        self.check(scales)
        W = torch.tensor(E2M1)[torch.stack([codes & 15, codes >> 4], dim=-1).int()]
        return W.view(*scales.shape, BLOCK).mul_(scales[..., None]).flatten(1)


def without_nvfp4(
    tensors: dict[str, TensorInfo], config: dict[str, Any]
) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Return a checkpoint's tensors and config.json as if its NVFP4 weights were in 16 bits. Others are unchanged.

    Raises:
        UserError: another form of 4-bit floats; a weight without its scales, or one of a wrong shape or dtype.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method != "modelopt" and quantization.get("format") != "nvfp4-pack-quantized":
        return tensors, config
    layout = hold(ModelOpt if method == "modelopt" else PackQuantized, quantization, WHERE, DO).quant_method
    end, *others = SUFFIXES[layout]
    dtype, found, used = model_dtype(config), {}, set()
    for name, info in tensors.items():
        if name.endswith(end) and info.dtype == "U8":
            module = name.removesuffix(end)
            scales, whole = (tensors.get(module + suffix) for suffix in others)
            form = nvfp4_form(f"{module}.weight", info, scales, whole, layout)
            used |= {name, *(module + suffix for suffix in others)}
            found[f"{module}.weight"] = computed((info.shape[0], 2 * info.shape[1]), dtype, info.file, form)
    for name, info in tensors.items():
        if name in used or name.endswith((*UNUSED, ".input_global_scale")):
            continue
        if name in found:
            raise refused("a weight must be stored once", "also in 16 bits", info, name)
        found[name] = info
    return found, {key: value for key, value in config.items() if key != "quantization_config"}


def nvfp4_form(
    name: str, codes: TensorInfo, scales: TensorInfo | None, tensor_scale: TensorInfo | None, layout: str
) -> NVFP4:
    """Return the form of one weight. Raises UserError for a part that is missing or of a wrong dtype or shape."""
    if scales is None or tensor_scale is None:
        raise refused("a weight in NVFP4 must have its scales", "not both of them", codes, name)
    if len(codes.shape) != 2 or codes.shape[1] % (BLOCK // 2) or 0 in codes.shape:
        must = f"codes of NVFP4 must be a matrix whose rows are blocks of {BLOCK}"
        raise refused(must, f"{list(codes.shape)} bytes", codes, name)
    expected = (codes.shape[0], codes.shape[1] * 2 // BLOCK)
    if scales.dtype != "F8_E4M3" or scales.shape != expected:
        must = f"scales of a weight in NVFP4 must be F8_E4M3 {list(expected)}"
        raise refused(must, f"{scales.dtype} {list(scales.shape)}", scales, name)
    if tensor_scale.dtype != "F32" or prod(tensor_scale.shape) != 1:
        found = f"{tensor_scale.dtype} {list(tensor_scale.shape)}"
        raise refused("the scale of a tensor in NVFP4 must be one F32", found, tensor_scale, name)
    return NVFP4(name, codes, scales, tensor_scale, layout == "compressed-tensors")
