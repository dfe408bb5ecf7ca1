"""The kernels of each device: protocols for groups of functions, and the module that implements each group.

A backend is a module; pyright checks it against the protocols below. Quantization, dequantization, cross-entropy, AdamW
and rounding work on every device (`reference`, `rounding`). Another group is None if a device lacks it; torch's
operations replace it.

Shape suffixes: M rows of x (tokens), N outputs, K inputs, R the LoRA rank, P positions with a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from onecard.kernels import reference, rounding
from onecard.kernels.cpu import native
from onecard.kernels.cpu.library import library
from onecard.kernels.reference import Lora, Rates
from onecard.quant.state import PackedWeight


class Codec(Protocol):
    """The functions that every device has."""

    def quantize_blocks(self, W: Tensor, quant_type: str, blocksize: int, name: str) -> tuple[Tensor, Tensor]:
        """Return codes, uint8 (ceil(numel/2), 1), and absmax, float32 (ceil(numel/blocksize),), of W of any shape."""
        ...

    def dequantize_into(self, weight: PackedWeight, out: Tensor) -> None:
        """Dequantize into `out`, which is contiguous and has the weight's number of elements."""
        ...

    def cross_entropy_(self, z_PV: Tensor, target_P: Tensor) -> Tensor:
        """Return the losses, float32 (P,), and replace z with its gradient."""
        ...

    def adamw_8bit_(self, parts: list[tuple[Tensor, ...]], rates: Rates) -> None:
        """Update each part's w and 8-bit states in place with its gradient."""
        ...


class CodeProduct(Protocol):
    """x W^T for few rows of x, directly from the codes."""

    def can_multiply(self, x_MK: Tensor, blocksize: int) -> bool:
        """Whether `multiply` accepts this x."""
        ...

    def multiply(self, x_MK: Tensor, weight: PackedWeight, lora: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
        """Return x W^T, float32 (M, N). With lora = (x A^T, B, s), add s (x A^T) B^T."""
        ...


class FusedLinear(Protocol):
    """A linear with its LoRA term in one kernel, and its backward in another."""

    def can_fuse(self, x_MK: Tensor, num_outputs: int, lora: Lora | None = None) -> bool:
        """Whether `linear` and `linear_backward` accept this x and this LoRA term."""
        ...

    def linear(
        self,
        x_MK: Tensor,
        weight: PackedWeight | Tensor,
        bias: Tensor | None,
        lora: Lora | None = None,
        x_lora_MK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return y (M, N) for a weight (N, K), and x_lora A^T (M, R). x_lora None: x."""
        ...

    def linear_backward(
        self,
        grad_y_MN: Tensor,
        weight: PackedWeight | Tensor,
        needed_grads: list[bool],
        lora: Lora | None = None,
        lora_input_MK: Tensor | None = None,
        xA_MR: Tensor | None = None,
        has_own_lora_input: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return grad_x (M, K), grad_x_lora (M, K), grad_A (R, K) and grad_B (N, R), from the LoRA input and xA."""
        ...


class DenseProduct(Protocol):
    """x W^T for few rows of x and a weight that is not quantized."""

    def dense_product(self, x_MK: Tensor, W_NK: Tensor) -> Tensor:
        """Return x W^T, float32 (M, N)."""
        ...


class Elementwise(Protocol):
    """Operations by row or by element. Tensors are contiguous and of one float dtype; r and sums are float32."""

    def rms_norm(self, x: Tensor, delta: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return t = x + delta (x without a delta), y = w * round(t r), of t's shape, and r (rows,)."""
        ...

    def rms_norm_backward(
        self, grad_y: Tensor, x: Tensor, w: Tensor, rstd: Tensor, grad_total: Tensor | None
    ) -> Tensor:
        """Return the gradient of x, with grad_total, the gradient of t, added."""
        ...

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) up; both have one shape."""
        ...

    def swiglu_backward(self, grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up."""
        ...

    def rope(self, x_THD: Tensor, cos_PD: Tensor, sin_PD: Tensor, back: bool) -> Tensor:
        """Rotate each token's heads by its angles, in row t modulo P; with `back`, apply the transpose."""
        ...


class Attention(Protocol):
    """Causal attention over the documents of a packed row."""

    def attention(
        self,
        q_HTD: Tensor,
        k_HTD: Tensor,
        v_HTD: Tensor,
        cu_seqlens: list[int],
        scale: float,
        window: int,
        out_THD: Tensor,
        lse_HT: Tensor,
        grads: tuple[Tensor, ...] | None = None,
    ) -> None:
        """Fill out and lse; with `grads`, fill the gradients instead (native.attention)."""
        ...


class Rounding(Protocol):
    """Weights rounded to levels with the least error: kernels/rounding.py."""

    def round_columns_(
        self,
        target_PN: Tensor,
        W_PN: Tensor,
        scale_PN: Tensor,
        U_PP: Tensor,
        levels: Tensor,
        D_PN: Tensor,
        index_PN: Tensor,
    ) -> None:
        """Fill D and index with the errors and the levels of P columns, the last one first."""
        ...

    def choose_scales(self, values: Tensor, weights: Tensor, quant_type: str, shares: Tensor) -> Tensor:
        """Return the scale of each block (num_blocks,): the best share of its largest absolute value."""
        ...


@dataclass(frozen=True)
class Backend:
    """The kernels of a device."""

    codec: Codec
    code_product: CodeProduct | None = None
    fused_linear: FusedLinear | None = None
    dense_product: DenseProduct | None = None
    elementwise: Elementwise | None = None
    attention: Attention | None = None
    rounding: Rounding = rounding


REFERENCE = Backend(reference)
NATIVE = Backend(native, native, native, native, native, native, native)


def backend(device: torch.device) -> Backend:
    """Return the kernels for tensors on `device`."""
    if device.type == "cpu" and library() is not None:
        return NATIVE
    return _triton() if device.type == "cuda" else REFERENCE


@cache
def _triton() -> Backend:
    try:
        from onecard.kernels.triton import codec, elementwise, product
    except ImportError:  # a torch without Triton
        return REFERENCE
    return Backend(codec, product, elementwise=elementwise)
