"""Growth of a CPU process in addition to its tensors: prepared products, Python's objects, code that is first used.

oneDNN computes products in 16 bits, and prepares each for its shapes. torch keeps the prepared products of up to
`MOST_PRODUCTS` shapes. For M rows, a linear of K inputs and N outputs and an adapter of rank r need

    forward   M K r,  M K N,  M r N added
    backward  M N r,  r M K,  N M r,  M r K,  M N K added

and a head M d V and M V d. Linears of the same K and N share them. So the number follows from the numbers of rows
(workload.py). An expert gets any number of rows up to all, padded (nn/experts.py). In the forward, onecard's own
product computes the smallest numbers of rows, without M K r. Products on tiles (AMX) and in float32 are not prepared,
so that on tiles only M K r of these numbers of rows is left.
"""

from __future__ import annotations

import torch

from onecard.config import REFERENCE_BYTES
from onecard.kernels.cpu.native import LARGEST_M
from onecard.memory.inputs import PlanInputs, Term
from onecard.nn.experts import num_filled_rows

# The bytes are measured on an AVX-512 CPU with torch 2.13 and transformers 5.23 (docs/plan.md explains how).
PRODUCT_BYTES = 650 << 10  # two descriptors of 252 KiB each, oneDNN's and torch's, and the code made for the shapes
MOST_PRODUCTS = 1024
MODULE_BYTES = 40 << 10  # Python's objects of an adapted linear: peft's layer is ten modules
MODEL_BYTES = 4 << 20  # Python's objects of the model: its family's code, the loader's
CODE_BYTES = 19 << 20  # pages of torch's libraries that a step touches first


def process_terms(inputs: PlanInputs, learns: bool) -> list[Term]:
    """Return a CPU process's terms. `learns`: whether it trains, or only answers."""
    number = min(num_products(inputs, learns), MOST_PRODUCTS)
    reference = REFERENCE_BYTES * inputs.workload.referenced
    return [
        *([Term("reference", reference, f"{REFERENCE_BYTES} bytes an example")] if reference else []),
        *([Term("prepared products", number * PRODUCT_BYTES, f"{number} shapes x 650 KiB")] if number else []),
        Term("Python's objects", MODEL_BYTES + len(inputs.adapted) * MODULE_BYTES, "4 MiB + adapted linears x 40 KiB"),
        Term("libraries' code", CODE_BYTES, "pages that a step touches first"),
    ]


def num_products(inputs: PlanInputs, learns: bool) -> int:
    """Count the product shapes that oneDNN prepares."""
    if not goes_to_onednn(inputs.dtype):
        return 0
    load, (forward, backward) = inputs.workload, inputs.num_shapes
    if inputs.on_tiles:
        few = [rows for rows in load.answering if rows <= LARGEST_M[inputs.dtype]]
        return len(few) * inputs.num_adapted_widths
    if not learns:
        return len(load.prefilled) * forward + expert_products(inputs, load.prefilled, frozenset())
    number = len(load.forward) * forward + len(load.trained) * backward + 2 * len(load.heads)
    return number + expert_products(inputs, load.forward, load.trained)


def expert_products(inputs: PlanInputs, run: frozenset[int], trained: frozenset[int]) -> int:
    """Same as `num_products`, for experts. `run` and `trained` are token counts of forwards and of training."""
    forward, backward = inputs.num_expert_shapes

    def sizes(tokens: frozenset[int], least: int) -> int:
        return num_filled_rows(least, max(tokens, default=0))

    return sizes(run, LARGEST_M.get(inputs.dtype, 0) + 1) * forward + sizes(trained, 1) * backward


def goes_to_onednn(dtype: torch.dtype) -> bool:
    """Whether torch uses oneDNN for products in `dtype` on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()
