"""What kernels there are: every function that a device may have, and which module computes it there.

Modules are the backends: pyright holds each one to the protocols below. Quantization, dequantization, cross-entropy and
AdamW work everywhere (`reference`); a group that a device lacks is None, and torch's operations take its place.

Shape suffixes: M rows of x (tokens), N outputs, K inputs, R the LoRA rank, P positions with a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from onecard.kernels import reference
from onecard.kernels.cpu import native
from onecard.kernels.cpu.library import library
from onecard.kernels.reference import Lora, Rates
from onecard.quant.state import PackedWeight


class Codec(Protocol):
    """What every device has."""

    def quantize_blocks(self, W: Tensor, quant_type: str, blocksize: int, name: str) -> tuple[Tensor, Tensor]:
        """Codes, uint8 (ceil(numel/2), 1), and absmax, float32 (ceil(numel/blocksize),), of W of any shape."""
        ...

    def dequantize_into(self, weight: PackedWeight, out: Tensor) -> None:
        """Fill `out`, contiguous, of the weight's number of elements."""
        ...

    def cross_entropy_(self, z_PV: Tensor, target_P: Tensor) -> Tensor:
        """Losses float32 (P,); z becomes its gradient."""
        ...

    def adamw_8bit_(self, parts: list[tuple[Tensor, ...]], rates: Rates) -> None:
        """Update each part's w in place from its gradient and its states in 8 bits."""
        ...


class CodeProduct(Protocol):
    """x W^T of few rows of x, straight from the codes."""

    def can_multiply(self, x_MK: Tensor, blocksize: int) -> bool:
        """Whether `multiply` takes this x."""
        ...

    def multiply(self, x_MK: Tensor, weight: PackedWeight, lora: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
        """x W^T, and with lora = (x A^T, B, s) s (x A^T) B^T: float32 (M, N)."""
        ...


class FusedLinear(Protocol):
    """A whole linear with its LoRA term and its backward in one kernel each."""

    def can_fuse(self, x_MK: Tensor, num_outputs: int, lora: Lora | None = None) -> bool:
        """Whether `linear` and `linear_backward` take this x and this term."""
        ...

    def linear(
        self,
        x_MK: Tensor,
        weight: PackedWeight | Tensor,
        bias: Tensor | None,
        lora: Lora | None = None,
        x_lora_MK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """y (M, N) of a weight (N, K), and x_lora A^T (M, R); x_lora None is x."""
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
        """grad_x (M, K), grad_x_lora (M, K), grad_A (R, K) and grad_B (N, R), of what the term has taken and xA."""
        ...


class DenseProduct(Protocol):
    """x W^T of few rows of x with a weight in 16 bits."""

    def dense_product(self, x_MK: Tensor, W_NK: Tensor) -> Tensor:
        """float32 (M, N)."""
        ...


class Elementwise(Protocol):
    """Row by row, or element by element: all tensors contiguous and of one float dtype, r and sums float32."""

    def rms_norm(self, x: Tensor, delta: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """t = x + delta, or x itself; y = w * round(t r) like it; and r (rows,)."""
        ...

    def rms_norm_backward(
        self, grad_y: Tensor, x: Tensor, w: Tensor, rstd: Tensor, grad_total: Tensor | None
    ) -> Tensor:
        """The gradient of x, with that of t added."""
        ...

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) up, of one shape."""
        ...

    def swiglu_backward(self, grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up."""
        ...

    def rope(self, x_THD: Tensor, cos_PD: Tensor, sin_PD: Tensor, back: bool) -> Tensor:
        """Each token's heads turned by its angles, those of row t modulo P; or `back`."""
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
        """Fill out and lse, or with `grads` the gradients (native.attention)."""
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


REFERENCE = Backend(reference)
NATIVE = Backend(native, native, native, native, native, native)


def backend(device: torch.device) -> Backend:
    """The kernels for tensors on `device`."""
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
