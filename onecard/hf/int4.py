"""Linears stored in 4-bit integers with a scale and a zero for each group of a row: GPTQ, AWQ and compressed-tensors.

    W[n, k] = float32(scale[n, g]) * (code[n, k] - zero[n, g])        g: the group of input k

The product is exact in float32 and is rounded once to the checkpoint's 16-bit dtype. A linear keeps its codes and
scales in memory, and zeros other than 8, if its groups are blocks of memory (`obstacle`). The layouts, with eight codes
in an int32 (the lowest bits first):

    GPTQ                qweight (K / 8, N), qzeros (G, N / 8) of zero - 1 (version 2: of zero), scales (G, N), g_idx (K)
    AWQ, gemm           qweight (K, N / 8) and qzeros (G, N / 8) in the order 0 2 4 6 1 3 5 7, scales (G, N)
    compressed-tensors  weight_packed (N, K / 8), weight_scale (N, G), weight_zero_point (N / 8, G), weight_g_idx (K)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from onecard.config import BLOCKSIZES
from onecard.documents import Foreign, hold
from onecard.errors import UserError
from onecard.hf.fp8 import DO, UNUSED, WHERE, model_dtype, refused
from onecard.hf.stored import (
    FLOAT_DTYPES,
    SLAB_VALUES,
    Form,
    TensorInfo,
    computed,
    damaged,
    read_columns,
    read_rows,
    read_tensor,
)
from onecard.quant.blockwise import pack
from onecard.quant.scales import Storage
from onecard.quant.state import QuantState

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MIDDLE = 8  # the zero of symmetric codes
LEAST_PARTS = 16  # a weight whose rows are columns of the file is read in at most so many parts
SUFFIXES = {  # of codes, scales, zeros and groups
    "gptq": (".qweight", ".scales", ".qzeros", ".g_idx"),
    "awq": (".qweight", ".scales", ".qzeros", ""),
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx"),
}
Layout = Literal["gptq", "awq", "compressed-tensors"]


class GPTQ(Foreign):
    """The quantization_config of a GPTQ checkpoint."""

    quant_method: Literal["gptq"]
    bits: Literal[4]
    group_size: int = Field(ge=-1)
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    pack_dtype: Literal["int32"] = "int32"
    dynamic: dict[str, dict[str, Any]] | None = None


class AWQ(Foreign):
    """The quantization_config of an AWQ checkpoint."""

    quant_method: Literal["awq"]
    bits: Literal[4]
    group_size: int = Field(ge=-1)
    zero_point: Literal[True]
    version: Literal["gemm", "GEMM"]


class PackedArgs(Foreign):
    """How compressed-tensors stores the weights of a group of linears."""

    num_bits: Literal[4]
    type: Literal["int"]
    strategy: Literal["group", "channel"]
    group_size: int | None = Field(None, ge=-1)


class PackedGroup(Foreign):
    """A group of linears of compressed-tensors."""

    weights: PackedArgs


class PackQuantized(Foreign):
    """The quantization_config of compressed-tensors' 4-bit integers."""

    quant_method: Literal["compressed-tensors"]
    format: Literal["pack-quantized"]
    config_groups: dict[str, PackedGroup] = Field(min_length=1)


@dataclass(frozen=True)
class Int4(Form):
    """A matrix (N, K) of 4-bit integers.

    Attributes:
        zeros: None: MIDDLE.
        groups: the group of each input; None: consecutive groups of group_size.
        first_zero: what to add to stored zeros.
    """

    name: str
    layout: Layout
    codes: TensorInfo
    scales: TensorInfo
    zeros: TensorInfo | None
    groups: TensorInfo | None
    group_size: int
    first_zero: int

    @property
    def kind(self) -> str:
        return {"gptq": "GPTQ", "awq": "AWQ"}.get(self.layout, "compressed-tensors") + " (4 bits)"

    @property
    def least_rows(self) -> int:
        return 1 if self.layout == "compressed-tensors" else -(-self.shape[0] // LEAST_PARTS)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        rows, columns = self.codes.shape
        wide = {"gptq": (columns, 8 * rows), "awq": (8 * columns, rows)}
        return wide.get(self.layout, (rows, 8 * columns))

    @property
    def storage(self) -> Storage | None:
        return None if self.obstacle else Storage("uint4" if self.is_symmetric else "uint4_zeros", self.group_size)

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether all zeros are MIDDLE. Reads them. Raises UserError for one out of range."""
        return self.zeros is None or not bool((self.read_zeros() != MIDDLE).any())

    @cached_property
    def obstacle(self) -> str | None:
        """Why the codes cannot stay. Reads the groups. Raises UserError for one out of range."""
        K = self.shape[1]
        if self.group_size not in BLOCKSIZES or K % self.group_size:
            return (
                f"groups of {self.group_size} inputs of {K}: they must divide a row, and be a power of two from 32 on"
            )
        if self.scales.dtype not in ("F16", "BF16"):
            return f"scales in {self.scales.dtype}"
        in_order = torch.arange(K) // self.group_size
        if self.groups is not None and not torch.equal(self.index(K // self.group_size), in_order):
            return "groups of inputs that are not consecutive (desc_act)"
        return None

    def packed(self, first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, QuantState]:
        """Return codes and state. Raises UserError for a scale of NaN or Inf."""
        K, scales = self.shape[1], self.read_scales(first, count)
        packed, step = torch.empty(count, K // 2, dtype=torch.uint8), max(SLAB_VALUES // K, self.least_rows)
        for start in range(0, count, step):
            size = min(step, count - start)
            codes = self.read_codes(first + start, size).to(torch.uint8)
            packed[start : start + size] = pack(codes.reshape(-1)).view(size, -1)
        if not self.is_symmetric:
            zeros = self.read_zeros()[first : first + count]
            scales = torch.stack([scales, (MIDDLE - zeros) * scales], dim=-1)
        storage = self.storage
        assert storage is not None
        state = QuantState(scales.reshape(-1), torch.Size([count, K]), dtype, storage.blocksize, storage.quant_type)
        return packed.view(-1, 1), state

    def rows(self, first: int, count: int) -> Tensor:
        """Return rows in float32, (count, K). Raises UserError for a scale of NaN or Inf, and a group out of range."""
        codes, scales = self.read_codes(first, count), self.read_scales(first, count)
        index = self.index(scales.shape[1])
        zeros = torch.full_like(scales, MIDDLE) if self.zeros is None else self.read_zeros()[first : first + count]
        return codes.float().sub_(zeros.float()[:, index]).mul_(scales[:, index])

    def read_codes(self, first: int, count: int) -> Tensor:
        """Return codes (count, K)."""
        if self.layout == "compressed-tensors":
            return nibbles(read_rows(self.codes, first, count)).reshape(count, -1)
        return self.columns(first, count)

    def read_scales(self, first: int, count: int) -> Tensor:
        """Return scales, float32 (count, G). Raises UserError for NaN or Inf."""
        rows = self.layout == "compressed-tensors"
        found = read_rows(self.scales, first, count) if rows else read_tensor(self.scales).T[first : first + count]
        if not found.isfinite().all():
            raise self.damaged("a scale that is NaN or Inf")
        return found.float()

    def columns(self, first: int, count: int) -> Tensor:
        """Return codes (count, K) of a layout whose outputs are columns."""
        if self.layout == "gptq":
            return nibbles(read_columns(self.codes, first, count)).transpose(1, 2).reshape(-1, count).T
        start, end = first // 8, -(-(first + count) // 8)
        found = nibbles(read_columns(self.codes, start, end - start), AWQ_ORDER).flatten(1)
        return found[:, first - 8 * start : first - 8 * start + count].T

    def index(self, num_groups: int) -> Tensor:
        """Return the group of each input, (K,)."""
        if self.groups is None:
            return torch.arange(self.shape[1]) // self.group_size
        found = read_tensor(self.groups).long()
        if found.min() < 0 or found.max() >= num_groups:
            raise self.damaged(f"a group of {int(found.max())} of {num_groups}")
        return found

    def read_zeros(self) -> Tensor:
        """Return the zeros, (N, G)."""
        assert self.zeros is not None
        stored = read_tensor(self.zeros)
        if self.layout == "compressed-tensors":
            return nibbles(stored).transpose(1, 2).flatten(0, 1)
        found = nibbles(stored, AWQ_ORDER if self.layout == "awq" else None).flatten(1).T + self.first_zero
        if found.max() > 15:
            raise self.damaged("a zero of 0 or 16, which readers of version 1 understand differently")
        return found

    def damaged(self, found: str) -> UserError:
        return damaged("scales and groups must be whole", found, self.codes, self.name)


def nibbles(packed: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
    """Return the eight codes of each int32, (..., 8). `order` has the number of the code in each place."""
    found = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return found if order is None else found[..., torch.tensor(order).argsort()]


def without_int4(
    tensors: dict[str, TensorInfo], config: dict[str, Any]
) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Return a checkpoint's tensors and config.json as if its 4-bit integers were in 16 bits. Others are unchanged.

    Raises:
        UserError: other bits or another layout; a weight without its scales or zeros, or one of a wrong shape or dtype.
    """
    quantization = config.get("quantization_config") or {}
    layout: Any = str(quantization.get("quant_method"))
    is_packed = layout in ("gptq", "awq") or quantization.get("format") == "pack-quantized"
    if layout not in SUFFIXES or not is_packed:
        return tensors, config
    group_size, first_zero = read_settings(layout, quantization)
    end, *others = SUFFIXES[layout]
    dtype, found, used = model_dtype(config), {}, set()
    for name in (name for name in tensors if name.endswith(end)):
        module = name.removesuffix(end)
        parts = [tensors.get(module + suffix) if suffix else None for suffix in others]
        used |= {module + suffix for suffix in (end, *others, ".weight_shape")}
        form = int4_form(f"{module}.weight", layout, tensors[name], parts, group_size, first_zero)
        found[f"{module}.weight"] = computed(form.shape, dtype, tensors[name].file, form)
    for name, info in tensors.items():
        if name in found:
            raise refused("a weight must be stored once", "also in 16 bits", info, name)
        if name not in used and not name.endswith(UNUSED):
            found[name] = info
    return found, {key: value for key, value in config.items() if key != "quantization_config"}


def read_settings(layout: Layout, quantization: dict[str, Any]) -> tuple[int, int]:
    """Return the size of a group (-1: a row) and what to add to stored zeros."""
    if layout == "gptq":
        stated = hold(GPTQ, quantization, WHERE, DO)
        changed = [rule for rule, values in (stated.dynamic or {}).items() if values and not rule.startswith("-")]
        if changed:
            raise UserError("all linears must have the same bits", f"dynamic {changed[0]}", DO, WHERE)
        return stated.group_size, 1 if stated.checkpoint_format == "gptq" else 0
    if layout == "awq":
        return hold(AWQ, quantization, WHERE, DO).group_size, 0
    groups = hold(PackQuantized, quantization, WHERE, DO).config_groups.values()
    sizes = {-1 if g.weights.strategy == "channel" else g.weights.group_size for g in groups}
    size = sizes.pop()
    if sizes or size is None:
        raise UserError("all linears must have groups of one size", "several, or none", DO, WHERE)
    return size, 0


def int4_form(
    name: str, layout: Layout, codes: TensorInfo, parts: list[TensorInfo | None], group_size: int, first_zero: int
) -> Int4:
    """Return the form of one weight. Raises UserError for a part that is missing or of a wrong dtype or shape."""
    scales, zeros, groups = parts
    if scales is None or (zeros is None and layout != "compressed-tensors"):
        raise refused("a weight in 4 bits must have its scales and zeros", "not all of them", codes, name)
    if codes.dtype != "I32" or len(codes.shape) != 2 or 0 in codes.shape:
        raise refused("codes must be a matrix of I32", f"{codes.dtype} {list(codes.shape)}", codes, name)
    form = Int4(name, layout, codes, scales, zeros, groups, group_size, first_zero)
    N, K = form.shape
    size = K if group_size in (-1, 0) else group_size
    G = -(-K // size)
    form = Int4(name, layout, codes, scales, zeros, groups, size, first_zero)
    turned = layout != "compressed-tensors"
    expected: list[tuple[TensorInfo | None, tuple[str, ...], tuple[int, ...]]] = [
        (scales, tuple(FLOAT_DTYPES), (G, N) if turned else (N, G)),
        (zeros, ("I32",), (G, -(-N // 8)) if turned else (-(-N // 8), G)),
        (groups, ("I32", "I64"), (K,)),
    ]
    for info, dtypes, shape in expected:
        if info is not None and (info.dtype not in dtypes or info.shape != shape):
            must = f"scales, zeros and groups of a weight of shape {[N, K]} must fit it, one of {list(shape)}"
            raise refused(must, f"{info.dtype} {list(info.shape)}", info, name)
    return form
