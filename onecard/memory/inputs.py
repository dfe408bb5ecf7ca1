"""A model with its settings, and the choices that save memory: the inputs of a plan's terms. Letters: see terms.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from onecard.adapter.layers import adapted_linears
from onecard.adapter.targets import tied
from onecard.config import NESTED_BLOCKSIZE, TrainConfig, parse_bytes
from onecard.errors import UserError
from onecard.hf.load import pick_device
from onecard.hf.skeleton import Model
from onecard.kernels.cpu import native
from onecard.memory.activations import Activations, gated_mlps, intermediate, layer_activations
from onecard.memory.workload import Workload, assumed, multiple
from onecard.nn.grid import SLAB_VALUES, merged_bytes
from onecard.optim.make import largest_share, state_bytes
from onecard.paging.files import ALIGNMENT
from onecard.paging.weights import layer_of
from onecard.quant.mxfp4 import BLOCKSIZE


@dataclass(frozen=True)
class Term:
    """One term of a plan."""

    name: str
    num_bytes: int
    formula: str


@dataclass(frozen=True)
class MemoryStrategy:
    """The choices that save memory and cost time.

    Attributes:
        num_recomputed: decoder layers, the first ones, whose activations are recomputed in the backward.
        weights_budget: bytes of a paged base; None for a resident one.
        offload_optimizer_states: whether the optimizer's states are offloaded between updates.
        num_offloaded: recomputed layers, the first ones, whose inputs are offloaded.
        max_forward_tokens: most tokens in one forward; None for the whole micro-batch.
        keep_dequantized_weights: whether a recomputed layer keeps its dequantized weights for its backward.
        mlp_chunk: most tokens that the gated MLPs of recomputed layers compute at a time; None for all.
    """

    num_recomputed: int = 0
    weights_budget: int | None = None
    offload_optimizer_states: bool = False
    num_offloaded: int = 0
    max_forward_tokens: int | None = None
    keep_dequantized_weights: bool = False
    mlp_chunk: int | None = None


@dataclass(frozen=True, eq=False)
class PlanInputs:
    """A model with its settings: the inputs of every MemoryStrategy's terms, computed once."""

    model: Model
    config: TrainConfig
    dtype: torch.dtype
    known: Workload | None = None  # from the data; None if there is none: workload.py assumes one
    num_new_tokens: int = 0  # that the run adds
    num_processes: int = 1
    prefix_cache_bytes: int | None = None  # of a server

    @cached_property
    def workload(self) -> Workload:
        return self.known or assumed(self.config, self.length)

    @property
    def c(self) -> int:
        return self.dtype.itemsize

    @cached_property
    def device(self) -> str:
        """ "cuda" or "cpu". This machine may lack the device of a plan."""
        named = self.config.device
        return pick_device("auto").type if named == "auto" else named.partition(":")[0]

    @cached_property
    def length(self) -> int:
        return min(self.config.max_seq_length, self.model.longest_context)

    @cached_property
    def row_tokens(self) -> int:
        """Tokens of a row. A row of preferences has room for the two answers of a pair."""
        return self.length * self.config.documents_per_example

    @cached_property
    def batch_tokens(self) -> int:
        """Tokens of a micro-batch, with the loader's padding."""
        return multiple(self.row_tokens * self.config.per_device_train_batch_size)

    def tokens(self, strategy: MemoryStrategy) -> int:
        """Return the most tokens in one forward."""
        return min(self.batch_tokens, multiple(strategy.max_forward_tokens or self.batch_tokens))

    @cached_property
    def adapted(self) -> dict[str, Any]:
        """The linears and stacks that get an adapter, by their weight's name."""
        ends = tuple(self.config.target_parameters or ())
        stacks = {path: stack for path, stack in self.model.stacks.items() if path.endswith(ends)}
        linears = self.model.linears
        names = adapted_linears(self.config, (path.removesuffix(".weight") for path in linears))
        return {f"{name}.weight": linears[f"{name}.weight"] for name in names} | stacks

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each adapter, by its weight's name."""
        return {path: self.config.rank_of(path.removesuffix(".weight")) for path in self.adapted}

    @cached_property
    def lora_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each LoRA matrix, and of each bias of a lora_B and each magnitude vector of DoRA."""
        shapes: list[tuple[int, ...]] = []
        for path, m in self.adapted.items():
            r, experts = self.ranks[path], getattr(m, "num_experts", 1)
            shapes += [(r * experts, m.in_features // experts), (m.out_features // experts, r * experts)]
            shapes += [(m.out_features,)] * (self.config.lora_bias + self.config.use_dora)
        return shapes

    @cached_property
    def lora_sizes(self) -> list[int]:
        """Number of weights of each LoRA matrix, and of each bias of a lora_B."""
        return [prod(shape) for shape in self.lora_shapes]

    @cached_property
    def num_shapes(self) -> tuple[int, int]:
        """Numbers of product shapes in the forward and in the backward, for each number of rows (process.py)."""
        return self.shapes_of({name: (m.in_features, m.out_features) for name, m in self.model.linears.items()})

    @cached_property
    def num_adapted_widths(self) -> int:
        """Count the different numbers of inputs of adapted linears."""
        return len({m.in_features for name, m in self.model.linears.items() if name in self.adapted})

    @cached_property
    def num_expert_shapes(self) -> tuple[int, int]:
        """Same as `num_shapes`, for an expert's products."""
        stacks = self.model.stacks.items()
        return self.shapes_of(
            {name: (m.in_features // m.num_experts, m.out_features // m.num_experts) for name, m in stacks}
        )

    def shapes_of(self, matrices: dict[str, tuple[int, int]]) -> tuple[int, int]:
        """Count the product shapes of matrices in forward and backward. `matrices` is (K, N) by weight name."""
        adapted = {shape for name, shape in matrices.items() if name in self.adapted}
        ins, outs, all_shapes = {K for K, _ in adapted}, {N for _, N in adapted}, set(matrices.values())
        return len(all_shapes) + len(ins) + len(outs), len(all_shapes) + 2 * len(ins) + 2 * len(outs)

    @cached_property
    def intermediate(self) -> int:
        return intermediate(self.model.modules)

    @cached_property
    def num_lora(self) -> int:
        return sum(self.lora_sizes)

    @property
    def saves_ends(self) -> bool:
        """Whether embedding and head are in modules_to_save."""
        embedding = self.model.modules.get_input_embeddings()
        name = next(name for name, module in self.model.modules.named_modules() if module is embedding)
        return f".{name}".endswith(tuple(f".{saved}" for saved in self.config.modules_to_save or ()))

    @cached_property
    def row_shapes(self) -> list[tuple[int, ...]]:
        """Shape of the trained rows of new tokens: those of the embedding, and of a head that is not tied to it."""
        if not self.num_new_tokens or self.saves_ends:
            return []
        return [(self.num_new_tokens, self.model.text.hidden_size)] * (1 if tied(self.model.modules) else 2)

    @cached_property
    def num_row_weights(self) -> int:
        return sum(map(prod, self.row_shapes))

    @cached_property
    def saved_sizes(self) -> list[int]:
        """Number of weights of each parameter in modules_to_save."""
        names = tuple(f".{name}." for name in self.config.modules_to_save or ())
        found = [p for path, p in self.model.modules.named_parameters() if any(name in f".{path}" for name in names)]
        ends = (self.model.modules.get_input_embeddings(), self.model.modules.get_output_embeddings())
        grown = {id(m.weight): self.num_new_tokens * m.weight.shape[1] for m in ends if m is not None}
        return [p.numel() + grown.get(id(p), 0) for p in found]

    @cached_property
    def num_saved(self) -> int:
        return sum(self.saved_sizes)

    @cached_property
    def expert_factors(self) -> int:
        """Bytes of a layer's LoRA on experts during its backward: weights and gradients in the compute dtype."""
        stacked = [(self.ranks[name], m) for name, m in self.adapted.items() if name in self.model.stacks]
        num_weights = sum(rank * (m.in_features + m.out_features) for rank, m in stacked)
        return 2 * self.c * num_weights // self.model.num_layers

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each linear and stack in 4 bits, by its weight's name."""
        return {name: linear.weight.numel() for name, linear in self.model.quantized.items()}

    @cached_property
    def num_mlp_weights(self) -> int:
        """Number of quantized weights in MLPs that can be computed in chunks."""
        mlps = tuple(f"{path}." for path in gated_mlps(self.model.modules))
        return sum(size for name, size in self.sizes.items() if name.startswith(mlps)) if self.layer.mlp else 0

    @cached_property
    def num_quantized(self) -> int:
        """Number of weights in 4 bits."""
        return sum(self.sizes.values())

    @cached_property
    def num_linear_weights(self) -> int:
        """Number of weights of all linears."""
        return sum(linear.weight.numel() for linear in self.model.linears.values())

    def scale_bytes(self, name: str) -> tuple[int, int]:
        """Return the bytes of a weight's scales, and of double quantization's own scales and offset."""
        if storage := self.model.kept.get(name):
            return storage.scale_bytes(self.sizes[name])
        if name in self.model.mxfp4 or self.config.quant_type == "mxfp4":
            return -(-self.sizes[name] // BLOCKSIZE), 0
        blocks = -(-self.sizes[name] // self.config.blocksize)
        return (blocks, 4 * -(-blocks // NESTED_BLOCKSIZE) + 4) if self.config.double_quant else (4 * blocks, 0)

    @cached_property
    def num_met(self) -> tuple[float, float]:
        """Quantized weights, and LoRA weights, that a token uses. Of the experts, only its own ones count."""
        per_token = getattr(self.model.text, "num_experts_per_tok", None) or 1
        share = {name: per_token / stack.num_experts for name, stack in self.model.stacks.items()}
        frozen = sum(m.weight.numel() * share.get(name, 1) for name, m in self.model.quantized.items())
        pairs = ((name, self.ranks[name] * (m.in_features + m.out_features)) for name, m in self.adapted.items())
        return frozen, sum(num_weights * share.get(name, 1) for name, num_weights in pairs)

    @property
    def is_sharded(self) -> bool:
        return self.config.parallel == "fsdp" and self.num_processes > 1

    @cached_property
    def layer_pages(self) -> list[int]:
        """Bytes of each decoder layer's codes and scales, in a page or gathered."""
        pages: dict[str, int] = {}
        for name, linear in self.model.quantized.items():
            numel, layer = linear.weight.numel(), layer_of(name)
            parts = ((numel + 1) // 2, self.scale_bytes(name)[0])
            pages[layer] = pages.get(layer, 0) + sum(-(-part // ALIGNMENT) * ALIGNMENT for part in parts)
        return list(pages.values())

    @cached_property
    def pages(self) -> list[int]:
        """Bytes of each page of a paged base: a decoder layer's codes and scales, or the head's weight."""
        head = self.model.modules.get_output_embeddings()
        return self.layer_pages + ([] if head is None else [head.weight.numel() * self.model.head_itemsize])

    @cached_property
    def paged_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(self.pages)

    @cached_property
    def counted(self) -> dict[Any, int]:
        """Sums that strategy.py has made."""
        return {}

    @cached_property
    def budget(self) -> int | None:
        """Bytes of weights_budget, if it is set. Raises UserError if the two largest pages exceed it."""
        if self.config.weights_budget is None:
            return None
        given = parse_bytes(self.config.weights_budget)
        if given < self.smallest_budget:
            raise UserError(
                "the weights' budget must hold the two largest pages",
                f"{given:,} bytes; they take {self.smallest_budget:,}",
                "give it more",
                "weights_budget",
            )
        return given

    @cached_property
    def smallest_budget(self) -> int:
        """Bytes of the two largest pages: the least that a pager accepts."""
        return sum(sorted(self.pages)[-2:])

    @cached_property
    def state_sizes(self) -> list[int]:
        """Bytes of the optimizer's states: of each LoRA matrix, of new tokens' rows, and of each saved parameter with
        its float32 master weight."""
        saved = [(8 if self.c == 4 else 12) * n for n in self.saved_sizes]
        optim = self.config.optim
        rows = [state_bytes("adamw" if optim == "muon" else optim, shape) for shape in self.row_shapes]
        return [*(state_bytes(optim, shape) for shape in self.lora_shapes), *rows, *saved]

    @cached_property
    def whole_states_bytes(self) -> tuple[int, int]:
        """Bytes of all the optimizer's states that a process has, and of the largest one."""
        numbers = [*self.lora_sizes, *map(prod, self.row_shapes), *self.saved_sizes]
        count = self.num_processes if self.config.shard_optimizer else 1
        return largest_share(numbers, self.state_sizes, count), max(self.state_sizes, default=0)

    def states_bytes(self, offloaded: bool) -> int:
        """Bytes of the optimizer's states on the device."""
        return self.whole_states_bytes[offloaded]

    @cached_property
    def layer(self) -> Activations:
        config = self.config
        return layer_activations(
            self.model.modules,
            self.adapted,
            {path: (2 if config.has_frozen_start else 1) * rank for path, rank in self.ranks.items()},
            config.r,
            config.lora_dropout > 0,
            config.use_dora,
            self.dtype,
            self.device,
        )

    @cached_property
    def resident(self) -> list[Term]:
        """The terms of a resident base."""
        model = self.model
        others = [
            p.numel() * min(self.c, model.itemsize.get(name, 2))
            for name, p in model.modules.named_parameters()
            if name not in model.quantized
        ]
        numel, experts = sum(self.sizes.values()), sum(self.sizes[name] for name in model.stacks)
        beside = f"P_e / 2; {2 * experts / 2**30:,.1f} GiB in 16 bits, as bitsandbytes leaves them"
        return [
            Term("base, 4-bit codes", (numel - experts) // 2, "(P_q - P_e) / 2" if experts else "P_q / 2"),
            *([Term("experts, 4-bit codes", experts // 2, beside)] if experts else []),
            Term("base, scales", sum(sum(self.scale_bytes(name)) for name in self.sizes), self.scale_formula),
            Term("embeddings, norms, head", sum(others), "P_o x bytes of its dtype, at most c"),
            self.scratch,
        ]

    @cached_property
    def on_tiles(self) -> bool:
        """Whether products read the codes directly, without a dequantized weight (AMX)."""
        return self.device == "cpu" and self.dtype == torch.bfloat16 and native.has_tiles()

    @cached_property
    def scratch(self) -> Term:
        """Scratch buffers of products: a dequantized weight, a slab of experts, or on tiles (AMX) the input rows."""
        slab = self.model.slab_bytes(self.config, torch.device(self.device), self.dtype)
        if self.config.use_dora:  # its norm needs the weight, B A and their sum
            largest = max((m.weight.numel() for m in self.model.linears.values()), default=0)
            return Term("scratch", max((self.c + 8) * largest, slab), "(c + 8) x the largest matrix")
        weights = self.model.stacks if self.on_tiles else self.model.quantized
        matrices = [m.weight.numel() // getattr(m, "num_experts", 1) for m in weights.values()]
        # CUDA graphs are recorded on a stream of their own.
        buffers = 2 if self.device == "cuda" and self.config.cuda_graphs and not self.model.stacks else 1
        weight = buffers * self.c * max(matrices, default=0)
        if slab > weight:
            return Term("scratch", slab, "a slab of experts, its codes and scales")
        if not self.on_tiles:
            return Term("scratch", weight, "c x the largest matrix")
        widest = max((n for m in self.model.linears.values() for n in m.weight.shape), default=0)
        tiled_rows = native.tiled_rows()
        rows = self.c * min(self.batch_tokens, tiled_rows) * widest
        return Term("scratch", rows + weight, f"c min(T, {tiled_rows}) x the widest matrix")

    @cached_property
    def merged(self) -> list[Term]:
        """The term of training for a file: the merged weight of one linear, and what it is made from (nn/grid.py)."""
        if self.config.train_for is None:
            return []
        shapes = (m.weight.shape for m in self.model.linears.values())
        sizes = (merged_bytes(self.config.train_for, shape, self.c, self.device) for shape in shapes)
        copies = "(c + 2.5)" if self.config.train_for == "nf4" else "c"
        return [Term("merged weight", max(sizes), f"{copies} x the largest matrix + 8 x {SLAB_VALUES >> 20} Mi of it")]

    @cached_property
    def unpaged_bytes(self) -> int:
        """Bytes of a paged base that stay resident: norms, biases, routers, and double quantization's own scales."""
        ends = (self.model.modules.get_input_embeddings(), self.model.modules.get_output_embeddings())
        paged = {id(module.weight) for module in ends if module is not None}
        named = self.model.modules.named_parameters()
        others = sum(p.numel() for name, p in named if name not in self.model.quantized and id(p) not in paged)
        return self.c * others + sum(self.scale_bytes(name)[1] for name in self.sizes)

    @property
    def scale_formula(self) -> str:
        """The formula of the scales' bytes. Experts in MXFP4 have one byte for 32 weights."""
        if self.model.kept:
            return "as the checkpoint stores them, and by the settings where it has 16 bits"
        blocksize, P = self.config.blocksize, "(P_q - P_e)" if self.model.mxfp4 else "P_q"
        if self.config.quant_type == "mxfp4":
            return f"P_q / {BLOCKSIZE}"
        nested = f"{P} / {blocksize} + 4 {P} / ({blocksize} x {NESTED_BLOCKSIZE})"
        own = nested if self.config.double_quant else f"4 {P} / {blocksize}"
        return f"{own} + P_e / {BLOCKSIZE} (MXFP4)" if self.model.mxfp4 else own
