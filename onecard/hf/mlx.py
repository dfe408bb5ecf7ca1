"""Matrices in MLX's 4-bit groups, as mlx-lm writes them: linears, and in most checkpoints embedding and head.

    W[n, k] = float32(scale[n, k // g]) * code[n, k] + bias[n, k // g]

The product and the sum are rounded to float32, and the sum once more to the checkpoint's 16-bit dtype. `weight` is
uint32 (N, K / 8), eight codes in each, the first in the lowest four bits; `scales` and `biases` are (N, K / g).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from onecard.documents import Foreign, hold
from onecard.errors import UserError
from onecard.hf.fp8 import DO, model_dtype, refused
from onecard.hf.int4 import nibbles
from onecard.hf.stored import FLOAT_DTYPES, Form, TensorInfo, computed, damaged, read_rows
from onecard.quant.blockwise import all_finite

WHERE = "config.json: quantization"


class Quantization(Foreign):
    """The quantization of an MLX checkpoint."""

    bits: Literal[4]
    group_size: Literal[32, 64, 128]
    mode: Literal["affine"] = "affine"


@dataclass(frozen=True)
class MLX(Form):
    """A matrix (N, K) of 4-bit codes."""

    name: str
    codes: TensorInfo
    scales: TensorInfo
    biases: TensorInfo

    @property
    def kind(self) -> str:
        return "MLX (4 bits)"

    def rows(self, first: int, count: int) -> Tensor:
        """Return rows in float32, (count, K). Raises UserError for a scale or bias of NaN or Inf."""
        codes = nibbles(read_rows(self.codes, first, count)).float()
        scales, biases = (read_rows(info, first, count).float() for info in (self.scales, self.biases))
        if not all_finite(scales) or not all_finite(biases):
            raise damaged("scales and biases must be finite", "NaN or Inf", self.codes, self.name)
        return codes.view(*scales.shape, -1).mul_(scales[..., None]).add_(biases[..., None]).flatten(1)


def without_mlx(tensors: dict[str, TensorInfo], config: dict[str, Any]) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Return a checkpoint's tensors and config.json as if MLX's weights were in 16 bits. Others are unchanged.

    Raises:
        UserError: other bits, or bits of a module of its own; a weight without scales and biases, or of a wrong shape.
    """
    quantization = config.get("quantization")
    if not isinstance(quantization, dict) or "group_size" not in quantization:
        return tensors, config
    size = hold(Quantization, quantization, WHERE, DO).group_size
    own = next((name for name, value in quantization.items() if isinstance(value, (dict, bool))), None)
    if own is not None:
        raise UserError("all matrices must have the same bits", f"settings of {own}", DO, WHERE)
    dtype, found, used = model_dtype(config), {}, set()
    for name, info in tensors.items():
        if info.dtype == "U32":
            module = name.removesuffix(".weight")
            parts = [tensors.get(f"{module}.{key}") for key in ("scales", "biases")]
            found[name] = mlx_info(name, info, parts, size, dtype)
            used |= {name, f"{module}.scales", f"{module}.biases"}
    found |= {name: info for name, info in tensors.items() if name not in used}
    return found, {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}


def mlx_info(name: str, codes: TensorInfo, parts: list[TensorInfo | None], size: int, dtype: str) -> TensorInfo:
    """Return the entry of one weight. Raises UserError for a part that is missing or of a wrong dtype or shape."""
    scales, biases = parts
    if scales is None or biases is None:
        raise refused("a weight of MLX must have its scales and biases", "not both of them", codes, name)
    if len(codes.shape) != 2 or 0 in codes.shape or codes.shape[1] * 8 % size:
        must = f"codes must be a matrix whose rows are groups of {size}"
        raise refused(must, f"{list(codes.shape)} words", codes, name)
    N, K = codes.shape[0], 8 * codes.shape[1]
    for info in (scales, biases):
        if info.dtype not in FLOAT_DTYPES or info.shape != (N, K // size):
            must = f"scales and biases of a weight of shape {[N, K]} must be floats {[N, K // size]}"
            raise refused(must, f"{info.dtype} {list(info.shape)}", info, name)
    return computed((N, K), dtype, codes.file, MLX(name, codes, scales, biases))
