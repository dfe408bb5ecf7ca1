"""The frozen base sharded over the processes of a run, by decoder layer, with PyTorch's FSDP2 (`fully_shard`).

Each process keeps an equal number of blocks of every 4-bit weight: their codes and their scales, as uint8 parameters
of the decoder layer. FSDP2 gathers a layer's before its forward and before its backward, on a GPU the next layer's at
the same time, and drops them afterwards. At most three gathered layers exist: in use, in FSDP2's buffer, and its copy.
LoRA, norms, biases, the head and the scales of double quantization's scales are whole in each process. The embedding
is read row by row from its file.

All processes must make the same forwards and backwards in the same order. `before_forward` and `gather_once` are for
callers that have more of them in one process than in another. So a forward must run each layer once and in order, which
the first one checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from onecard.errors import UserError
from onecard.paging.files import Segment, Spill
from onecard.paging.weights import Holder, PagedEmbedding, weights_by_layer
from onecard.quant.state import QuantState


class Shards(nn.Module):
    """The 4-bit weights of a decoder layer: `codes_I` and `absmax_I`, uint8 (blocks, bytes of a block), for weight I.
    Between uses they are DTensors, of which each process holds its part. FSDP2 replaces them by whole tensors."""

    def hold(self, name: str, part: Tensor) -> None:
        """Add a weight's part."""
        self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    def whole(self, name: str) -> Tensor:
        """Return the bytes of a weight's part, gathered if FSDP2 has not gathered the layer."""
        stored = getattr(self, name)
        return (stored.full_tensor() if isinstance(stored, DTensor) else stored).view(-1)


@dataclass
class ShardedWeight:
    """A 4-bit weight in `shards`. `state.absmax` is empty."""

    shards: Shards
    number: int
    num_codes: int
    num_absmax_bytes: int
    state: QuantState

    def __call__(self) -> tuple[Tensor, QuantState]:
        """Return codes and state."""
        codes = self.shards.whole(f"codes_{self.number}")[: self.num_codes].view(-1, 1)
        absmax = self.shards.whole(f"absmax_{self.number}")[: self.num_absmax_bytes]
        return codes, replace(self.state, absmax=absmax.view(self.state.absmax.dtype))


class ShardedBase:
    """Keeps this process's part of a model's 4-bit weights while it loads, and has FSDP2 gather them afterwards.

    Attributes:
        before_forward: called before each forward of the decoder.
    """

    def __init__(self, folder: Path, device: torch.device):
        """Args: folder: for an unnamed file with an embedding that no checkpoint contains as it is."""
        self.folder, self.device = folder, device
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.spill: Spill | None = None
        self.mesh = init_device_mesh(device.type, (self.count,))
        self.taken: dict[Holder, ShardedWeight] = {}
        self.layers: list[FSDPModule] = []
        self.ran: list[int] | None = None  # numbers of the layers that the current forward has run
        self.before_forward: Callable[[], Any] | None = None
        self.open: list[Any] = []

    def write(self, tensor: Tensor) -> Segment:
        """Write a tensor's bytes to the unnamed file."""
        self.spill = self.spill or Spill(self.folder)
        return self.spill.write(tensor)

    def take(self, weight: Holder, segments: tuple[Segment, Segment] | None = None) -> None:
        """Keep this process's blocks of a weight, and free the others. `segments`: where a file has them."""
        packed, state = weight.weight, weight.loaded_state
        blocks = len(state.absmax)
        shards = Shards()
        shards.hold("codes_0", self.part(packed, -(-state.blocksize // 2), blocks))
        shards.hold("absmax_0", self.part(state.absmax, state.absmax.itemsize, blocks))
        weight.weight = nn.Parameter(packed.new_empty(0, 1), requires_grad=False)
        weight.quant_state = replace(state, absmax=state.absmax.new_empty(0))
        weight.fetch = ShardedWeight(shards, 0, packed.numel(), state.absmax.nbytes, weight.quant_state)
        self.taken[weight] = weight.fetch

    def part(self, tensor: Tensor, block_bytes: int, blocks: int) -> DTensor:
        """Copy this process's blocks of uint8 (blocks, block_bytes). Zeros make the parts of all processes equal."""
        rows = -(-blocks // self.count)
        found = torch.zeros(rows * block_bytes, dtype=torch.uint8, device=self.device)
        flat, begin = tensor.detach().view(-1).view(torch.uint8), self.rank * rows * block_bytes
        own = flat[begin : begin + len(found)]
        found[: len(own)] = own
        return DTensor.from_local(found.view(rows, block_bytes), self.mesh, [Shard(0)], run_check=False)

    def start(
        self,
        model: Any,
        compute_dtype: torch.dtype,
        embedding: tuple[Segment, torch.dtype],
        head: tuple[Segment, torch.dtype],
    ) -> None:
        """Have FSDP2 gather the model's layers. `embedding` is the segment and dtype of its values in a file."""
        whole = set(model.parameters())
        for number, (name, weights) in enumerate(weights_by_layer(model).items()):
            layer = model.get_submodule(name)
            layer.shards = Shards()
            parts = self.joined(layer.shards, weights)
            for name, part in parts.items():
                layer.shards.hold(name, torch.empty(part.shape, dtype=part.dtype, device="meta"))
            self.layers.append(fully_shard(layer, mesh=self.mesh, reshard_after_forward=True, ignored_params=whole))
            layer.shards.load_state_dict(parts, assign=True)
            layer.register_forward_pre_hook(partial(self.note, number))
        decoder = fully_shard(model.base_model, mesh=self.mesh, ignored_params=whole)
        decoder.register_forward_pre_hook(self.announce)
        decoder.register_forward_hook(self.check_order)
        before = model.get_input_embeddings()
        if type(before) is nn.Embedding:
            model.set_input_embeddings(PagedEmbedding(before, *embedding, compute_dtype))
        model.sharded_base = self

    def joined(self, shards: Shards, weights: list[Holder]) -> dict[str, Tensor]:
        """Return the parts of a layer's weights by their names in `shards`, which the weights read from now on."""
        parts = {}
        for number, weight in enumerate(weights):
            before = self.taken.pop(weight)
            weight.fetch = replace(before, shards=shards, number=number)
            parts |= {f"{kind}_{number}": getattr(before.shards, f"{kind}_0").data for kind in ("codes", "absmax")}
        return parts

    def announce(self, *_: Any) -> None:
        """Tell the caller that a forward begins."""
        self.ran = []
        if self.before_forward is not None:
            self.before_forward()

    def note(self, number: int, *_: Any) -> None:
        """Note that a layer begins. A backward that runs it again is outside of a forward."""
        if self.ran is not None:
            self.ran.append(number)

    def check_order(self, *_: Any) -> None:
        """Raise UserError unless the forward has run each layer once and in order."""
        ran, self.ran = self.ran, None
        if ran != list(range(len(self.layers))):
            must = "parallel fsdp needs a model that runs each of its layers once and in order"
            raise UserError(
                must, f"layers {', '.join(map(str, ran or ()))} in a forward", "pass --parallel ddp", "parallel"
            )

    def gather_once(self) -> None:
        """Gather each layer once, as another process's forward without gradients does."""
        for layer in self.layers:
            layer.unshard()
            layer.reshard()
