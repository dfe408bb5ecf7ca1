"""GPTQ: weights in 4 bits; later columns compensate each column's error (Frantar et al. 2022, 2210.17323).

The error of a linear on its calibration inputs is tr(D H D^T), D = W - W_hat, H = sum of x x^T. With U the upper
Cholesky factor of H^-1 (algorithm 1 of the paper), columns k in turn:

    W_hat[:, k] = nearest level of W[:, k]    e = (W[:, k] - W_hat[:, k]) / U[k, k]    W[:, k+1:] -= e U[k, k+1:]

A block of columns is one group. Its scales come from weights with all earlier corrections, and the columns after it are
corrected once per block. damp_percent of H's mean diagonal is added to the diagonal. The file format is version 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from onecard.config import CalibrationConfig
from onecard.export.calibrated.calibration import Layer
from onecard.export.calibrated.hessian import damped_cholesky
from onecard.export.calibrated.storage import Calibrated
from onecard.export.folder import Shapes
from onecard.quant.grouped import (
    IN_LAYER,
    Grouped,
    choose_scales,
    encode,
    pack_int32,
    round_to_nearest,
)

FIRST_ZERO = 1  # the files hold zero - 1


def quantize(W_NK: Tensor, H_KK: Tensor, config: CalibrationConfig, dtype: torch.dtype = torch.float16) -> Grouped:
    """Quantize a float32 weight by GPTQ, with H of its calibration inputs. `dtype`: of the scales."""
    N, K, g = *W_NK.shape, config.group_size
    falling = H_KK.diagonal().argsort(descending=True) if config.desc_act else torch.arange(K, device=W_NK.device)
    W_KN = W_NK.T[falling]  # a copy: an input's weights are contiguous
    U_KK = inverse_factor(H_KK[falling[:, None], falling], config.damp_percent)
    codes_KN = torch.empty_like(W_KN, dtype=torch.uint8)
    scales, zeros = (torch.empty(N, K // g, dtype=kind, device=W_KN.device) for kind in (dtype, torch.uint8))
    for start in range(0, K, g):
        block, own = W_KN[start : start + g], U_KK[start : start + g, start : start + g]
        scale, zero = (t[:, 0] for t in choose_scales(block.T, config.sym, FIRST_ZERO, dtype))
        errors = torch.empty_like(block)
        for k in range(g):
            code = encode(block[k], scale, zero)
            errors[k] = (block[k] - (code - zero) * scale.float()) / own[k, k]
            block[k + 1 :].addr_(own[k, k + 1 :], errors[k], alpha=-1)
            codes_KN[falling[start + k]] = code.to(torch.uint8)
        W_KN[start + g :].addmm_(U_KK[start : start + g, start + g :].T, errors, alpha=-1)
        scales[:, start // g], zeros[:, start // g] = scale, zero.to(torch.uint8)
    group_K = torch.empty(K, dtype=torch.int32, device=W_KN.device)
    group_K[falling] = torch.arange(K, device=W_KN.device, dtype=torch.int32) // g
    return Grouped(codes_KN.T, scales, zeros, group_K)


def inverse_factor(H: Tensor, damp_percent: float) -> Tensor:
    """Return the upper U with U^T U = (H + damping)^-1. Overwrites H. Raises UserError, same as `damped_cholesky`."""
    return torch.linalg.cholesky(torch.cholesky_inverse(damped_cholesky(H, damp_percent)), upper=True)


class GPTQ(Calibrated):
    """Scales and zeros of groups, inputs in any order."""

    title = "GPTQ"

    def quantize_layer(
        self, layer: Layer, names: set[str], config: CalibrationConfig, dtype: torch.dtype
    ) -> Iterator[tuple[str, Grouped]]:
        for inputs in layer.inputs:
            for name in inputs.names:
                if name in names:
                    linear: Any = layer.module.get_submodule(name)
                    found = quantize(linear.weight.float(), inputs.H_KK, config, dtype)
                    linear.weight.copy_(found.dequantize())
                    yield name, found

    def quantize(self, W_NK: Tensor, H_KK: Tensor, config: CalibrationConfig, dtype: torch.dtype) -> Grouped:
        return quantize(W_NK, H_KK, config, dtype)

    def nearest(self, W_NK: Tensor, config: CalibrationConfig, dtype: torch.dtype, peak: float = 0.0) -> Grouped:
        return round_to_nearest(W_NK, config.group_size, config.sym, None, FIRST_ZERO, dtype)

    def tensors(self, weight: Grouped) -> dict[str, Tensor]:
        N, K = weight.codes_NK.shape
        zeros = (weight.zeros_NG.T - FIRST_ZERO).contiguous()
        return {
            "qweight": pack_int32(weight.codes_NK.reshape(N, K // 8, 8)).T,
            "qzeros": pack_int32(zeros.view(-1, N // 8, 8)),
            "scales": weight.scales_NG.T,
            "g_idx": weight.group_K,
        }

    def shapes(self, N: int, K: int, config: CalibrationConfig, dtype: str) -> Shapes:
        groups = K // config.group_size
        return {
            "qweight": ("I32", (K // 8, N)),
            "qzeros": ("I32", (groups, N // 8)),
            "scales": (dtype, (groups, N)),
            "g_idx": ("I32", (K,)),
        }

    def config_fields(self, config: CalibrationConfig, linears: list[str], left_out: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": config.group_size,
            "sym": config.sym,
            "desc_act": config.desc_act,
            "damp_percent": config.damp_percent,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "true_sequential": False,
            "static_groups": False,
            "lm_head": False,
        }
        left_out = [name for name in left_out if IN_LAYER.search(name)]
        if left_out:
            found["dynamic"] = {f"-:{name.replace('.', '[.]')}": {} for name in left_out}
            inside = dict.fromkeys(name.split(".layers.")[-1].split(".", 1)[1] for name in linears)
            found["modules_in_block_to_quantize"] = [list(inside)]
        return {"quantization_config": found}
