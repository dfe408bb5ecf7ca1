"""Linears stored in FP8: codes of E4M3 (arXiv 2209.05433) times a scale for a block, a row or the whole matrix.

    W[n, k] = float32(code[n, k]) * float32(scale[n // block_rows, k // block_columns])

The product is exact to float32 and is rounded once to the checkpoint's 16-bit dtype, as in transformers'
FineGrainedFP8Config(dequantize=True) and in compressed-tensors. The last blocks may be smaller than the others.

Two formats are read: DeepSeek's and Qwen's (quant_method "fp8", `weight_scale_inv`, blocks of 128 x 128 or one scale)
and compressed-tensors' "float-quantized" (`weight_scale`, one scale a tensor, a row or a block). The scales of
activations and of a KV cache in 8 bits have no part in the weights and are not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from onecard.documents import Foreign, brief, hold
from onecard.errors import UserError
from onecard.hf.stored import FLOAT_DTYPES, Form, TensorInfo, computed, damaged, read_rows, read_tensor
from onecard.quant.blockwise import all_finite

SCALE = {"fp8": "_scale_inv", "compressed-tensors": "_scale"}
UNUSED = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in FLOAT_DTYPES.items()}
WHERE = "config.json: quantization_config"
DO = "use the original 16-bit checkpoint"


class BlockScaled(Foreign):
    """The quantization_config of DeepSeek's and Qwen's FP8 checkpoints."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    weight_block_size: list[int] | None = Field([128, 128], min_length=2, max_length=2)


class WeightArgs(Foreign):
    """How compressed-tensors stores the weights of a group of linears."""

    num_bits: Literal[8]
    type: Literal["float"]
    strategy: Literal["tensor", "channel", "block"]
    symmetric: Literal[True] = True
    block_structure: list[int] | None = Field(None, min_length=2, max_length=2)


class Group(Foreign):
    """A group of linears of compressed-tensors."""

    weights: WeightArgs


class FloatQuantized(Foreign):
    """The quantization_config of compressed-tensors' FP8 checkpoints."""

    quant_method: Literal["compressed-tensors"]
    format: Literal["float-quantized", "naive-quantized"]
    config_groups: dict[str, Group] = Field(min_length=1)


@dataclass(frozen=True)
class FP8(Form):
    """A matrix of E4M3 codes (N, K) with scales for blocks of rows and columns."""

    name: str
    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]

    @property
    def kind(self) -> str:
        return "FP8 (E4M3)"

    def rows(self, first: int, count: int) -> Tensor:
        """Return rows in float32, (count, K). Raises UserError for a code or scale of NaN, and a scale of Inf."""
        rows, columns = self.block
        W = read_rows(self.codes, first, count).float()
        at, last = first // rows, -(-(first + count) // rows)
        scales = read_tensor(self.scales).float().reshape(-(-self.codes.shape[0] // rows), -1)[at:last]
        if not all_finite(scales) or not all_finite(W):
            what = "a code" if all_finite(scales) else "a scale"
            must = "codes and scales of FP8 must be finite"
            raise damaged(must, f"{what} that is NaN or Inf", self.codes, self.name)
        each = torch.arange(first, first + count) // rows - at
        for start in range(0, W.shape[1], columns):
            W[:, start : start + columns] *= scales[each, start // columns, None]
        return W


def without_fp8(tensors: dict[str, TensorInfo], config: dict[str, Any]) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Return a checkpoint's tensors and config.json as if its FP8 weights were in 16 bits. Others are unchanged.

    Raises:
        UserError: another form of FP8; a weight without a scale, a scale without a weight, or one of a wrong shape.
    """
    quantization = config.get("quantization_config") or {}
    method = str(quantization.get("quant_method"))
    is_float = method == "fp8" or quantization.get("format") in ("float-quantized", "naive-quantized")
    if method not in SCALE or not is_float:
        return tensors, config
    size = block_size(quantization)
    dtype, suffix, found = model_dtype(config), SCALE[method], {}
    for name, info in tensors.items():
        scales = tensors.get(name + suffix)
        if info.dtype == "F8_E4M3":
            found[name] = computed(info.shape, dtype, info.file, fp8_form(name, info, scales, size))
        elif name.endswith(suffix) and name.removesuffix(suffix) in tensors:
            if tensors[name.removesuffix(suffix)].dtype != "F8_E4M3":
                raise refused("a scale must be of an FP8 weight", f"one of {info.dtype} values", info, name)
        elif not name.endswith(UNUSED):
            found[name] = info
    return found, {key: value for key, value in config.items() if key != "quantization_config"}


def block_size(quantization: dict[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None if a row or the whole weight has one."""
    if quantization["quant_method"] == "fp8":
        blocks = [hold(BlockScaled, quantization, WHERE, DO).weight_block_size]
    else:
        groups = hold(FloatQuantized, quantization, WHERE, DO).config_groups.values()
        blocks = [g.weights.block_structure if g.weights.strategy == "block" else None for g in groups]
        if any(g.weights.strategy == "block" and g.weights.block_structure is None for g in groups):
            raise UserError("blocks must have a size", "no block_structure", DO, WHERE)
    if len({tuple(block or ()) for block in blocks}) > 1:
        raise UserError("all groups must have blocks of one size", brief(blocks), DO, WHERE)
    if blocks[0] is not None and min(blocks[0]) < 1:
        raise UserError("a block must have rows and columns", brief(blocks[0]), DO, WHERE)
    return None if blocks[0] is None else (blocks[0][0], blocks[0][1])


def fp8_form(name: str, info: TensorInfo, scales: TensorInfo | None, size: tuple[int, int] | None) -> FP8:
    """Return the form of one weight. Raises UserError for scales that are missing or of a wrong dtype or shape."""
    if scales is None:
        raise refused("an FP8 weight must have its scale", "none", info, name)
    if len(info.shape) != 2 or 0 in info.shape:
        raise refused("an FP8 weight must be a matrix", f"shape {list(info.shape)}", info, name)
    if scales.dtype not in FLOAT_DTYPES:
        raise refused("scales must be floats", scales.dtype, scales, name)
    N, K = info.shape
    if size is not None:
        expected, block = [(-(-N // size[0]), -(-K // size[1]))], size
    elif prod(scales.shape) == 1:
        expected, block = [(), (1,), (1, 1)], (N, K)
    else:
        expected, block = [(N, 1), (N,)], (1, K)
    if scales.shape not in expected:
        must = f"the scales of a weight of shape {[N, K]} must have shape {list(expected[0])}"
        raise refused(must, f"{list(scales.shape)}", scales, name)
    return FP8(name, info, scales, block)


def model_dtype(config: dict[str, Any]) -> str:
    """Return the 16-bit dtype that a config.json states for the model, in safetensors' spelling; BF16 if none."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    stated = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    return next((NAMES[name] for name in stated if isinstance(name, str) and name in NAMES), "BF16")


def refused(must: str, found: str, info: TensorInfo, name: str) -> UserError:
    return UserError(must, found, DO, f"{info.file}: {name}")
