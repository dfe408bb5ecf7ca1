"""What a decoder layer keeps for its backward, in bytes per token, from the layer's modules.

With d hidden, a = heads x head size, k = key heads x head size, f intermediate, r rank, and an adapter on every one
of n linears, a layer of the Llama kind keeps

    4 d (residual in, norm, residual between, norm) + 2 a + 2 k (query, attention's output, key, value)
    + 3 f (gate, up, their product) + n r (x A^T)

values of the compute dtype. What changes that:

- an input that only linears without an adapter read is not kept: a frozen 4-bit linear needs none;
- with LoRA dropout each adapted linear keeps its own input and a mask, of c bytes a value on a CPU and 1 on a GPU;
- DoRA uses peft's own layers: each adapted linear keeps K more values in float32, and of its two outputs N values in
  the compute dtype and N in float32;
- a norm without a fused form keeps a float32 copy of its input; norms of the query and key keep a + k more;
- an MLP without a fused form keeps the activation's output, f;
- experts (nn/experts.py) keep their input, d, and 2 f, adapted or not; f counts all experts of a token;
- experts that are computed together (nn/slabs.py) also have each token's d once for each of its J experts. Their
  backward works on max(J d + 3 f, 2 J d + 2 f) in place of 2 f: g, h and dh, or du and dx. A product has its LoRA
  term, or the part of a slab, beside it;
- on a GPU, keys and values are repeated for all query heads where torch's attention takes no groups (float32, or a GPU
  before Ampere): 2 a for 2 k;
- attention with capped scores or sinks keeps its scores: (4 + 2 c) bytes per head and pair of a document's tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from onecard.hf.attention import takes_groups
from onecard.hf.fused import FusedGatedMLP, FusedRMSNorm, counterpart, is_silu
from onecard.hf.stacks import stacks_of
from onecard.kernels.elementwise import widest_norm
from onecard.nn.linears import beside_text, is_inside
from onecard.nn.slabs import is_grouped

INNER = ("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "wo", "w2")


@dataclass(frozen=True)
class Activations:
    """Bytes of one layer's activations, on average.

    Attributes:
        kept: bytes per token that its backward needs.
        working: additional bytes per token while its backward runs.
        formula: of `kept`, in values of the compute dtype.
        working_formula: of `working` less 2 d.
        hidden: bytes per token of its input.
        pair, pair_working: bytes per pair of a document's tokens, kept and additional in the backward.
        together: bytes per token in a forward of experts that are computed together; 0 for other MLPs.
        mlp: of `kept` and `working`, bytes per token in gated MLPs, which can compute it in chunks; 0 if a layer has
            something else, too.
    """

    kept: float
    working: float
    formula: str
    working_formula: str
    hidden: int
    pair: float
    pair_working: float
    together: float
    mlp: float


def layer_activations(
    modules: Any,
    adapted: dict[str, Any],
    ranks: dict[str, int],
    r: int,
    dropout: bool,
    dora: bool,
    dtype: torch.dtype,
    device: str,
) -> Activations:
    """Count for transformers' model on the meta device, with LoRA of `ranks` on the linears and stacks `adapted`."""
    text, c = modules.config.get_text_config(), dtype.itemsize
    layers = text.num_hidden_layers
    heads, key_heads, head = heads_of(text)
    experts = getattr(text, "num_experts_per_tok", None) or 1
    width = (getattr(text, "moe_intermediate_size", None) if experts > 1 else None) or intermediate(modules)
    size = {"d": text.hidden_size, "a": heads * head, "k": key_heads * head, "f": experts * width, "r": r}
    count: Counter[str] = Counter()
    takes = takes_groups(torch.device(device), dtype, head)
    count.update({"a": 2 if takes else 4, "k": 2 if takes else 0, "f": 2})
    norm, gated = fused_kinds(modules, device)
    mlps = gated_mlps(modules)
    inside: Counter[str] = Counter({"f": 2})
    copies = 1.0 if norm else 4 / c
    for name, width in norms(modules):
        if width == size["d"]:
            count["d"] += copies / layers
        else:
            count["a" if name.endswith("q_norm") else "k"] += copies / layers
    stacks = stacks_of(modules)
    if stacks:
        count["d"] += 1
    elif not gated:
        count["f"] += 1
        inside["f"] += 1
    shared = set()
    for name in adapted.keys() - stacks.keys():
        parent, leaf = name.removesuffix(".weight").rsplit(".", 1)
        attention, inner = "attn" in parent or "attention" in parent, leaf in INNER
        symbol = "d" if not inner else "a" if attention else "f"
        own: Counter[str] = Counter({"r": ranks[name] / r / layers})
        if dropout:
            own[symbol] += (2 if device == "cpu" else 1 + 1 / c) / layers
        elif (parent, inner) not in shared and not (attention and inner):
            shared.add((parent, inner))
            own[symbol] += 1 / layers
        count.update(own)
        if parent in mlps:  # a chunk's input is a part of one tensor, which stays
            inside.update(own if dropout or inner else {"r": own["r"]})
    if dropout or not any((parent, False) in shared for parent in mlps):
        inside["d"] -= 1  # a whole MLP does not keep its input
    together = bool(stacks) and is_grouped(torch.device(device), dtype)
    Jd = experts * size["d"]
    working = max(workings(experts if together else 0), key=lambda count: valued(count, size))
    linears = {name: m for name, m in adapted.items() if name not in stacks}
    beside = {name: 4 * m.in_features + (c + 4) * m.out_features for name, m in linears.items()} if dora else {}
    in_mlps = sum(size for name, size in beside.items() if name.rsplit(".", 2)[0] in mlps)
    chunked = c * valued(inside, size) + in_mlps / layers
    sinks = any(name.endswith(".sinks") for name, _ in modules.named_parameters())
    capped = sinks or getattr(text, "attn_logit_softcapping", None) is not None
    return Activations(
        kept=c * valued(count, size) + sum(beside.values()) / layers,
        working=c * (valued(working, size) + 2 * size["d"]),
        formula=" + ".join([f"{n:.3g} {symbol}" for symbol, n in count.items() if n] + ["DoRA's"] * dora),
        working_formula=" + ".join(f"{n:.3g} {symbol}" for symbol, n in working.items()),
        hidden=c * size["d"],
        pair=heads * (4 + 2 * c) if capped else 0,
        pair_working=heads * (8 + c) if capped else 0,
        together=c * (max(4 * size["f"] + Jd, 3 * size["f"] + 2 * Jd) + 2 * size["d"]) if together else 0,
        mlp=chunked + c * 2 * size["f"] if len(mlps) == layers and not stacks else 0,
    )


def workings(J: int) -> list[Counter[str]]:
    """Return what an MLP's backward works on, in values per token; with J experts together, at each of its moments."""
    if J == 0:
        return [Counter({"f": 2})]
    return [Counter({"f": 3, "d": J}), Counter({"f": 2, "d": 2 * J})]


def valued(count: Counter[str], size: dict[str, int]) -> float:
    """Return the sum of a count of sizes."""
    return sum(number * size[symbol] for symbol, number in count.items())


def gated_mlps(modules: Any) -> set[str]:
    """Return the paths of the text's MLPs that have a fused form (hf/fused.py)."""
    beside = beside_text(modules)
    found = (name for name, module in modules.named_modules() if counterpart(module) is FusedGatedMLP)
    return {name for name in found if not any(is_inside(name, path) for path in beside)}


def heads_of(text: Any) -> tuple[int, int, int]:
    """Return a config's heads, key heads and head size; one head of size d if it has none."""
    if getattr(text, "per_layer_config", None):  # Gemma 4's layers differ: the plan counts all as the first
        text = text.per_layer_config[0]
    heads = getattr(text, "num_attention_heads", None) or 1
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    return heads, key_heads, getattr(text, "head_dim", None) or text.hidden_size // heads


def intermediate(modules: Any) -> int:
    """Return an MLP's intermediate size: the config's, else the largest dimension of a matrix in the layers."""
    width = getattr(modules.config.get_text_config(), "intermediate_size", None)
    if isinstance(width, int):
        return width
    ends = (modules.get_input_embeddings(), modules.get_output_embeddings())
    matrices = [p for m in modules.modules() if m not in ends for p in m.parameters(recurse=False) if p.ndim == 2]
    return max(max(p.shape) for p in matrices)


def norms(modules: Any) -> list[tuple[str, int]]:
    """List name and width of the norms in the decoder layers."""
    named = [(name, list(module.parameters(recurse=False))) for name, module in modules.named_modules()]
    return [(n, p[0].numel()) for n, p in named if "layers." in n and len(p) in (1, 2) and p[0].ndim == 1]


def fused_kinds(modules: Any, device: str) -> tuple[bool, bool]:
    """Whether the model's norms, and its MLPs, have a fused form (hf/fused.py) on `device`."""
    found: list[tuple[Any, Any]] = [(module, counterpart(module)) for module in modules.modules()]
    widths = [module.weight.shape[0] for module, form in found if form is FusedRMSNorm]
    mlps = [module for module, form in found if form is FusedGatedMLP]
    gated = any(is_silu(mlp.act_fn) for mlp in mlps)
    return 0 < max(widths, default=0) <= widest_norm(device), gated
