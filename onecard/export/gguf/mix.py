"""Which type each tensor of a GGUF file has: llama.cpp's mixes, so that a file is what its name says elsewhere.

A mix is one type for most matrices and others for those whose errors cost most: the head, values, and the down
projections of some layers. The rules are those of llama-quantize (llama.cpp, src/llama-quant.cpp), for the families
that we export. Blocks of K-quants have 256 weights of a row. Where 256 does not divide a row, llama.cpp takes a type
with blocks of 32 and no fewer bits, and F16 where 32 does not divide it either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import gguf
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType as FileType

from onecard.export.gguf.architecture import Architecture

BASES = {
    "bf16": (Kind.BF16, FileType.MOSTLY_BF16),
    "f16": (Kind.F16, FileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, FileType.MOSTLY_Q8_0),
    "q6_k": (Kind.Q6_K, FileType.MOSTLY_Q6_K),
    "q5_k_m": (Kind.Q5_K, FileType.MOSTLY_Q5_K_M),
    "q5_k_s": (Kind.Q5_K, FileType.MOSTLY_Q5_K_S),
    "q5_1": (Kind.Q5_1, FileType.MOSTLY_Q5_1),
    "q5_0": (Kind.Q5_0, FileType.MOSTLY_Q5_0),
    "q4_k_m": (Kind.Q4_K, FileType.MOSTLY_Q4_K_M),
    "q4_k_s": (Kind.Q4_K, FileType.MOSTLY_Q4_K_S),
    "q4_1": (Kind.Q4_1, FileType.MOSTLY_Q4_1),
    "q4_0": (Kind.Q4_0, FileType.MOSTLY_Q4_0),
    "iq4_nl": (Kind.IQ4_NL, FileType.MOSTLY_IQ4_NL),
    "q3_k_m": (Kind.Q3_K, FileType.MOSTLY_Q3_K_M),
}  # by outtype: the type of most matrices, general.file_type
SMALLER = {Kind.Q3_K: Kind.Q4_0, Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}  # blocks of 32
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
LAYERS_70B = 80  # llama and qwen2; llama.cpp tells them by their layers
NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


class Mix:
    """The types of a model's tensors in one outtype.

    Attributes:
        fallbacks: by (module, wanted type, type, row length): the names of tensors whose rows no block of the wanted
            type fits.
    """

    def __init__(self, outtype: str, arch: Architecture, is_tied: bool, has_importance: bool = False):
        """
        Args:
            is_tied: whether the file has no output.weight, so that the embedding is the head too.
            has_importance: whether scales are chosen with an importance matrix.
        """
        config = arch.config
        self.outtype, self.is_tied, self.has_importance = outtype, is_tied, has_importance
        self.base, self.file_type = BASES[outtype]
        self.layers = config.num_hidden_layers
        self.group = arch.num_heads // arch.num_kv_heads
        self.has_8_experts = arch.num_experts == 8
        is_shared = arch.family == "qwen2" or (arch.name == "llama" and self.group > 1)
        self.is_70b = self.layers == LAYERS_70B and is_shared
        self.fallbacks: dict[tuple[str, Kind, Kind, int], list[str]] = {}

    def kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        """Return the type in which a tensor is stored."""
        if len(shape) < 2 or name.endswith(("_norm.weight", "ffn_gate_inp.weight", ".bias")):
            return Kind.F32
        wanted, K = self.wanted(name, shape[-1]), shape[-1]
        fitting = [kind for kind in (wanted, SMALLER.get(wanted, wanted), Kind.F16) if K % values(kind) == 0]
        if fitting[0] != wanted:
            module = name.removesuffix(".weight").rpartition(".")[2]
            self.fallbacks.setdefault((module, wanted, fitting[0], K), []).append(name)
        return fitting[0]

    def wanted(self, name: str, K: int) -> Kind:
        """Return the type that the mix has for a matrix, if its blocks fit.

        Args:
            K: its row length.
        """
        if self.base in FLOATS:
            return self.base
        if name == "output.weight" or (self.is_tied and name == "token_embd.weight"):
            return Kind.Q8_0 if self.base == Kind.Q8_0 or K % values(self.base) else Kind.Q6_K
        match = NAME.fullmatch(name)
        layer, module = (int(match[1]), match[2]) if match else (0, "")
        if module in ("attn_v", "attn_qkv", "attn_k") and self.has_8_experts:
            return Kind.Q8_0
        if module in ("attn_v", "attn_qkv"):
            found = self.of_values(layer)
            return Kind.Q5_K if self.is_70b and found in (Kind.Q3_K, Kind.Q4_K) else found
        if module in ("ffn_down", "ffn_down_exps"):
            return self.of_down(layer)
        if module == "attn_output" and self.has_8_experts:
            return Kind.Q5_K if self.outtype in ("q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m") else self.base
        return Kind.Q4_K if module == "attn_output" and self.outtype == "q3_k_m" else self.base

    def of_values(self, layer: int) -> Kind:
        """Return the type of a layer's projection to values, alone or with those to queries and keys."""
        if self.outtype in ("q4_k_m", "q5_k_m"):
            return Kind.Q6_K if self.has_more_bits(layer) else self.base
        if self.outtype == "q4_k_s":
            return Kind.Q5_K if layer < 4 else self.base
        if self.outtype == "q3_k_m":
            return Kind.Q5_K if layer < 2 else Kind.Q4_K
        return Kind.Q5_K if self.outtype == "iq4_nl" and self.group >= 4 else self.base

    def of_down(self, layer: int) -> Kind:
        """Return the type of a layer's down projection."""
        if self.outtype in ("q4_k_m", "q5_k_m"):
            return Kind.Q6_K if self.has_more_bits(layer) else self.base
        if self.outtype == "q3_k_m":
            return Kind.Q5_K if layer < self.layers // 16 else Kind.Q4_K
        if layer >= self.layers // 8:
            return self.base
        if self.has_importance:
            return {"q4_0": Kind.Q4_1, "q5_0": Kind.Q5_1, "q4_k_s": Kind.Q5_K}.get(self.outtype, self.base)
        return Kind.Q5_K if self.outtype in ("q4_k_s", "iq4_nl") else self.base

    def has_more_bits(self, layer: int) -> bool:
        """Whether a layer is in the first or last eighth, or every third of those between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2

    def notes(self) -> Iterator[str]:
        """Yield what to tell the user of tensors that have another type than the mix's, by their names."""
        for (module, wanted, kind, K), names in self.fallbacks.items():
            which = names[0] if len(names) == 1 else f"{module} of {len(names)} layers"
            why = f"whose blocks do not fit rows of {K:,}, as in llama.cpp"
            yield f"{which}: {kind.name} instead of {wanted.name}, {why}"


def values(kind: Kind) -> int:
    """Return the number of weights in a block."""
    return gguf.GGML_QUANT_SIZES[kind][0]
