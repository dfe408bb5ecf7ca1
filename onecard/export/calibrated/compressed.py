"""Folders in the formats of compressed-tensors, which vLLM and transformers read.

    w4a16   4-bit integers with a scale for each group: pack-quantized. Codes are chosen by GPTQ if there is data
    fp8     E4M3 with a scale for each row, and activations rounded to E4M3 by the reader, a scale for each token
    nvfp4   E2M1 in blocks of 16, an E4M3 scale for each block and a float32 scale for each tensor. Activations stay

The layouts are those that hf/int4.py, fp8.py and nvfp4.py read. A scale is rounded to its stored dtype before it is
used to choose codes. vLLM runs q, k and v as one matrix, and so gate and up, with one float32 scale: in nvfp4 all
matrices of a module have the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.config import CalibrationConfig
from onecard.export.calibrated.gptq import GPTQ
from onecard.export.calibrated.storage import Storage
from onecard.export.folder import Shapes
from onecard.quant.grouped import Grouped, pack_int32
from onecard.quant.nvfp4 import BLOCK, E4M3, LARGEST, quantize_nvfp4

Tensors = dict[str, Tensor]


class W4A16(GPTQ):
    """Symmetric 4-bit integers in groups of consecutive inputs, rounded as in GPTQ: transformers loads no others of
    compressed-tensors."""

    title = "compressed-tensors W4A16"

    def scale_dtype(self, stored: str) -> str:
        """Return the dtype of scales: the model's, since vLLM casts them to it. It runs float32 models in float16."""
        return stored if stored in ("BF16", "F16") else "F16"

    def tensors(self, weight: Grouped) -> Tensors:
        N, K = weight.codes_NK.shape
        return {
            "weight_packed": pack_int32(weight.codes_NK.reshape(N, K // 8, 8)),
            "weight_scale": weight.scales_NG,
            "weight_shape": torch.tensor([N, K]),
        }

    def shapes(self, N: int, K: int, config: CalibrationConfig, dtype: str) -> Shapes:
        return {
            "weight_packed": ("I32", (N, K // 8)),
            "weight_scale": (dtype, (N, K // config.group_size)),
            "weight_shape": ("I64", (2,)),
        }

    def config_fields(self, config: CalibrationConfig, linears: list[str], left_out: list[str]) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": config.group_size}
        return scheme("pack-quantized", {**weights, "symmetric": True}, None, left_out)


@dataclass
class Scaled:
    """A weight in floats of few bits.

    Attributes:
        codes: E4M3 (N, K), or two codes of E2M1 in a byte, the first in the low half: uint8 (N, K / 2).
        scales: of rows, (N, 1), or of blocks, E4M3 (N, K / 16).
        divisor: float32 (1,), by which scales of blocks are divided; None for scales of rows.
    """

    codes: Tensor
    scales: Tensor
    divisor: Tensor | None = None


class FP8(Storage[Scaled]):
    """E4M3 with a scale for each row."""

    title = "compressed-tensors FP8"

    def nearest(self, W_NK: Tensor, config: CalibrationConfig, dtype: torch.dtype, peak: float = 0.0) -> Scaled:
        largest = W_NK.abs().amax(1, keepdim=True)
        scales = (largest / LARGEST).clamp(min=torch.finfo(dtype).tiny).to(dtype)
        codes = (W_NK / scales.float()).clamp(-LARGEST, LARGEST).to(E4M3)
        return Scaled(codes, scales)

    def tensors(self, weight: Scaled) -> Tensors:
        return {"weight": weight.codes, "weight_scale": weight.scales}

    def shapes(self, N: int, K: int, config: CalibrationConfig, dtype: str) -> Shapes:
        return {"weight": ("F8_E4M3", (N, K)), "weight_scale": (dtype, (N, 1))}

    def config_fields(self, config: CalibrationConfig, linears: list[str], left_out: list[str]) -> dict[str, Any]:
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
        return scheme("float-quantized", weights, inputs, left_out)


class NVFP4(Storage[Scaled]):
    """E2M1 in blocks of 16."""

    title, block, shares_scale = "compressed-tensors NVFP4", BLOCK, True

    def scale_dtype(self, stored: str) -> str:
        return "F8_E4M3"

    def nearest(self, W_NK: Tensor, config: CalibrationConfig, dtype: torch.dtype, peak: float = 0.0) -> Scaled:
        codes, scales, divisor = quantize_nvfp4(W_NK, peak)
        return Scaled(codes[:, 0::2] | codes[:, 1::2] << 4, scales, divisor)

    def tensors(self, weight: Scaled) -> Tensors:
        assert weight.divisor is not None
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        return dict(zip(names, (weight.codes, weight.scales, weight.divisor)))

    def shapes(self, N: int, K: int, config: CalibrationConfig, dtype: str) -> Shapes:
        return {
            "weight_packed": ("U8", (N, K // 2)),
            "weight_scale": ("F8_E4M3", (N, K // BLOCK)),
            "weight_global_scale": ("F32", (1,)),
        }

    def config_fields(self, config: CalibrationConfig, linears: list[str], left_out: list[str]) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK, "symmetric": True}
        return scheme("nvfp4-pack-quantized", weights, None, left_out)


def scheme(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None, left_out: list[str]) -> dict[str, Any]:
    """Return config.json's fields, with one scheme for all linears but `left_out`."""
    group = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}, "input_activations": inputs}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None, "format": format}},
        "ignore": left_out,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return {"quantization_config": quantization}
