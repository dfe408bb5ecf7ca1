"""QuantState: a 4-bit weight's scales, as plain tensors, and its settings. A PackedWeight adds the packed codes. The
module also reads and writes both in bitsandbytes' file format.

A bitsandbytes checkpoint stores a weight NAME of shape (N, K) as NAME (the codes), NAME.absmax, NAME.quant_map and
NAME.quant_state.bitsandbytes__nf4 (or fp4), a uint8 tensor of JSON with the settings. Double quantization adds
NAME.nested_absmax and NAME.nested_quant_map.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from onecard.config import BLOCKSIZES, BNB_TYPES, NESTED_BLOCKSIZE
from onecard.documents import Foreign, hold, parse_json
from onecard.errors import UserError
from onecard.quant.codebook import dynamic_map, quant_map

STATE_KEY = "quant_state.bitsandbytes__"
BNB_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE_KEY}nf4", f"{STATE_KEY}fp4")
MAX_FACTS_BYTES = 4096
DO = "fetch the checkpoint again"


class Facts(Foreign):
    """The JSON of a weight's quant_state."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: int
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: list[Annotated[int, Field(ge=1, lt=2**40)]] = Field(min_length=1, max_length=8)
    nested_blocksize: int | None = None
    nested_offset: float | None = Field(None, gt=-1e30, lt=1e30)

    @model_validator(mode="after")
    def _known_blocks(self) -> Facts:
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, not {self.blocksize}")
        if self.nested_offset is not None and self.nested_blocksize != NESTED_BLOCKSIZE:
            raise ValueError(f"nested_blocksize must be {NESTED_BLOCKSIZE}, not {self.nested_blocksize}")
        return self


@dataclass
class QuantState:
    """The scales of one weight and the meaning of its codes.

    Attributes:
        absmax: one scale for each block: float32 (num_blocks,), or if nested its 8-bit code, uint8 (num_blocks,); for
            mxfp4 its exponent, and for nvfp4 its E4M3 byte, uint8 (num_blocks,), never nested; for uint4_zeros
            float32 (2 num_blocks,) (scales.py).
        shape: shape of the weight.
        dtype: dtype of the weight before quantization, and of dequantize_4bit's result.
        blocksize: weights that share a scale.
        quant_type: "nf4", "fp4", "int4", "mxfp4", or of a checkpoint's own codes "nvfp4", "uint4" or
            "uint4_zeros".
        nested_absmax: float32 (ceil(num_blocks/256),), the scales of the scales; for nvfp4 float32 (256,), the scale of
            each E4M3 byte; else None.
        nested_offset: float32 (), the mean of absmax, subtracted before its quantization; None if not nested.
    """

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        """Whether the scales are themselves quantized (double quantization)."""
        return self.nested_offset is not None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the scales. The codes need another (numel + 1) // 2 bytes."""
        tensors = (self.absmax, self.nested_absmax, self.nested_offset)
        return sum(t.nbytes for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> QuantState:
        """Copy the state to another device. Dtypes do not change."""
        return replace(
            self,
            absmax=self.absmax.to(device),
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.to(device),
            nested_offset=None if self.nested_offset is None else self.nested_offset.to(device),
        )


class PackedWeight(NamedTuple):
    """A 4-bit weight as kernels read it. A torch operator has these fields as arguments, in this order.

    Attributes:
        codes: uint8, two weights a byte, the first in the high nibble; at least (numel + 1) // 2 of them.
        absmax, nested_absmax, nested_offset, quant_type, blocksize: same as in QuantState.
        shape: shape of the weight.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    shape: list[int]

    @classmethod
    def of(cls, packed: Tensor, state: QuantState) -> PackedWeight:
        """Combine the codes of a weight with its state."""
        scales = (state.absmax, state.nested_absmax, state.nested_offset)
        return cls(packed, *scales, state.quant_type, state.blocksize, list(state.shape))


def part_of(packed: Tensor, state: QuantState, index: int) -> tuple[Tensor, QuantState, int]:
    """Return one of a stacked weight's shape[0] parts: views of codes and scales, and how many weights to skip in them.

    A part is whole blocks. But a group of double quantization may begin in the part before. Then codes and scales begin
    with the group, the state's shape is flat, and the weights to skip come before the part's own.
    """
    numel = state.numel // state.shape[0]
    first, last = index * numel // state.blocksize, (index + 1) * numel // state.blocksize
    begin = first - first % NESTED_BLOCKSIZE if state.nested else first
    skip = (first - begin) * state.blocksize
    found = replace(
        state,
        absmax=state.absmax[begin:last],
        shape=torch.Size([skip + numel]) if skip else state.shape[1:],
        nested_absmax=None if state.nested_absmax is None else state.nested_absmax[begin // NESTED_BLOCKSIZE :],
    )
    return packed.view(-1)[begin * state.blocksize // 2 : last * state.blocksize // 2], found, skip


def to_bnb(packed: Tensor, state: QuantState) -> dict[str, Tensor]:
    """Return one weight's tensors in a bitsandbytes checkpoint, by the suffix of their names ("" for the codes).

    Raises:
        UserError: int4 or mxfp4, which bitsandbytes does not have.
    """
    if state.quant_type not in BNB_TYPES:
        raise UserError("bitsandbytes' format holds nf4 and fp4", state.quant_type, "quantize to nf4", "quant_type")
    facts = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    device = packed.device
    found = {"": packed, ".absmax": state.absmax, ".quant_map": quant_map(state.quant_type, device).clone()}
    if state.nested_absmax is not None and state.nested_offset is not None:
        facts |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": state.nested_offset.item(),
        }
        found |= {".nested_absmax": state.nested_absmax, ".nested_quant_map": dynamic_map(device).clone()}
    text = json.dumps(facts).encode()
    found[f".{STATE_KEY}{state.quant_type}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()
    return found


def from_bnb(name: str, tensors: dict[str, Tensor]) -> tuple[Tensor, QuantState]:
    """Invert `to_bnb`; the keys are the same. Raises UserError if the tensors do not fit together."""
    facts = read_facts(name, tensors)
    quant_type, shape, nested = facts.quant_type, torch.Size(facts.shape), facts.nested_offset is not None
    blocks = -(-prod(shape) // facts.blocksize)
    expected: dict[str, tuple[int, torch.dtype]] = {
        "": ((prod(shape) + 1) // 2, torch.uint8),
        ".absmax": (blocks, torch.uint8 if nested else torch.float32),
        ".quant_map": (16, torch.float32),
    }
    if nested:
        expected[".nested_absmax"] = (-(-blocks // NESTED_BLOCKSIZE), torch.float32)
        expected[".nested_quant_map"] = (256, torch.float32)
    for key, (numel, dtype) in expected.items():
        found = tensors.get(key)
        if found is None or found.numel() != numel or found.dtype != dtype:
            what = "none" if found is None else f"{found.numel()} of {found.dtype}"
            raise damaged(name + key, f"{numel} values of {dtype}", what)
    device = tensors[""].device
    maps = {".quant_map": quant_map(quant_type, device)} | (
        {".nested_quant_map": dynamic_map(device)} if nested else {}
    )
    for key, levels in maps.items():
        if not torch.equal(tensors[key].to(device).flatten(), levels):
            raise damaged(name + key, f"the levels of {quant_type} and of the dynamic map", "others")
    for key in (".nested_absmax",) if nested else (".absmax",):
        if not tensors[key].isfinite().all():
            raise damaged(name + key, "finite scales", "NaN or Inf")
    absmax = tensors[".absmax"].flatten()
    state = QuantState(absmax, shape, getattr(torch, facts.dtype), facts.blocksize, quant_type)
    if nested:
        state.nested_absmax = tensors[".nested_absmax"].flatten()
        state.nested_offset = torch.tensor(facts.nested_offset, dtype=torch.float32, device=device)
    return tensors[""].view(-1, 1), state


def read_facts(name: str, tensors: dict[str, Tensor]) -> Facts:
    """Read and check the JSON of a weight's quant_state."""
    kind = next((kind for kind in ("nf4", "fp4") if f".{STATE_KEY}{kind}" in tensors), None)
    if kind is None:
        raise damaged(name, f"its .{STATE_KEY}nf4 (or fp4)", "none")
    key, raw = f"{name}.{STATE_KEY}{kind}", tensors[f".{STATE_KEY}{kind}"]
    if raw.dtype != torch.uint8 or raw.numel() > MAX_FACTS_BYTES:
        raise damaged(key, f"at most {MAX_FACTS_BYTES} bytes of JSON", f"{raw.numel()} values of {raw.dtype}")
    try:
        content = parse_json(bytes(raw.flatten().tolist()))
    except ValueError as error:
        raise damaged(key, "JSON with quant_type, blocksize, dtype and shape", str(error)) from None
    facts = hold(Facts, content, key, DO)
    if facts.quant_type != kind:
        raise damaged(key, f"the quant_type {kind}", facts.quant_type)
    return facts


def damaged(name: str, must: str, found: str) -> UserError:
    return UserError(f"a 4-bit weight must have {must}", found, DO, name)
