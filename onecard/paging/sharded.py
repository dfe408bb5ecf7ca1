"""The frozen base sharded over the processes of a run, by decoder layer, with PyTorch's FSDP2 (`fully_shard`).

Each process keeps an equal number of blocks of every 4-bit weight: their codes and their scales, as uint8 parameters
of the decoder layer. FSDP2 gathers a layer's before its forward and before its backward, on a GPU the next layer's at
the same time, and drops them afterwards. At most three gathered layers exist: in use, in FSDP2's buffer, and its copy.
LoRA, norms, biases, the head and the scales of double quantization's scales are whole in each process. The embedding
is read row by row from its file.

A 16-bit weight is quantized in parts: each process reads and quantizes its own blocks. A block's codes depend on the
block alone. Double quantization needs the scales of all blocks, for their mean and for groups that lie in two
processes. So they are gathered in float32 when all weights are loaded, one weight's at a time: 1/16 byte a weight.

All processes must make the same forwards and backwards in the same order. `before_forward` and `gather_once` are for
callers that have more of them in one process than in another. So a forward must run each layer once and in order, which
the first one checks.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
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
from onecard.kernels import ops
from onecard.paging.files import Segment
from onecard.paging.weights import Holder, MovedBase, weights_by_layer
from onecard.quant.blockwise import check_quantizable, not_finite
from onecard.quant.nested import quantize_absmax
from onecard.quant.scales import per_block
from onecard.quant.state import QuantState

LOAD = datetime.timedelta(hours=3)  # a process waits as long for the others to load their parts


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


class ShardedBase(MovedBase):
    """Keeps this process's part of a model's 4-bit weights while it loads, and has FSDP2 gather them afterwards.

    Attributes:
        before_forward: called before each forward of the decoder.
    """

    def __init__(self, folder: Path, device: torch.device):
        """Args: folder: for an unnamed file with an embedding that no checkpoint contains as it is."""
        super().__init__(folder, device)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(device.type, (self.count,))
        self.taken: dict[Holder, ShardedWeight] = {}
        self.scales: dict[Holder, Tensor] = {}  # own blocks', float32, on the host; with double quantization
        self.layers: list[FSDPModule] = []
        self.ran: list[int] | None = None  # numbers of the layers that the current forward has run
        self.before_forward: Callable[[], Any] | None = None

    def own(self, numel: int, blocksize: int) -> range:
        """Return which weights of `numel` are in this process's blocks."""
        first = self.rank * self.rows(-(-numel // blocksize)) * blocksize
        return range(min(first, numel), min(first + self.rows(-(-numel // blocksize)) * blocksize, numel))

    def rows(self, blocks: int) -> int:
        """Return how many of a weight's blocks each process has; the last ones may have fewer."""
        return -(-blocks // self.count)

    def quantize(
        self,
        weight: Holder,
        shape: torch.Size,
        parts: Iterable[tuple[int, str, Tensor]],
        quantization: tuple[str, int, bool],
    ) -> None:
        """Quantize this process's blocks of a 16-bit weight, to the same bits as `quantize_4bit` of the whole weight.

        Args:
            parts: parts of the flat weight, at least one and all that hold own blocks, in order: the number of its
                first weight, its name, and the part, which is whole blocks unless it is the last one.
            quantization: quant_type, blocksize and double_quant.

        Raises:
            UserError: same as `quantize_4bit`.
        """
        quant_type, blocksize, double_quant = quantization
        own, dtype, codes, absmax = self.own(shape.numel(), blocksize), None, [], []
        for at, name, W in parts:
            check_quantizable(W, quant_type, blocksize, double_quant, name)
            flat, dtype = W.detach().reshape(-1), W.dtype
            piece = flat[max(own.start - at, 0) : max(own.stop - at, 0)].to(self.device)
            if not piece.numel():
                continue
            try:
                packed, found = ops.quantize_4bit(piece, quant_type, blocksize, False, name)
            except UserError:
                raise not_finite(flat, W.shape, name) from None
            codes.append(packed)
            absmax.append(found.absmax)
        assert dtype is not None
        own_codes = torch.cat(codes) if codes else torch.empty(0, dtype=torch.uint8, device=self.device)
        kind = torch.uint8 if quant_type == "mxfp4" else torch.float32
        own_absmax = torch.cat(absmax) if absmax else own_codes.new_empty(0, dtype=kind)
        if double_quant:
            self.scales[weight] = own_absmax.cpu()
            own_absmax = own_codes.new_empty(0)
        state = QuantState(own_absmax, shape, dtype, blocksize, quant_type)
        self.hold(weight, own_codes, own_absmax, state)

    def take(self, weight: Holder, segments: tuple[Segment, Segment] | None = None) -> None:
        """Keep this process's blocks of a weight, and free the others. `segments`: where a file has them."""
        packed, state = weight.weight.detach(), weight.loaded_state
        own = self.own(state.numel, state.blocksize)
        codes = packed.view(-1)[own.start // 2 : (own.stop + 1) // 2]
        each = per_block(state.quant_type)
        absmax = state.absmax[own.start // state.blocksize * each : -(-own.stop // state.blocksize) * each]
        self.hold(weight, codes, absmax, state.to(self.device))

    def hold(self, weight: Holder, codes: Tensor, absmax: Tensor, state: QuantState) -> None:
        """Keep this process's codes and absmax of a weight with this state."""
        blocks, shards = -(-state.numel // state.blocksize), Shards()
        shards.hold("codes_0", self.part(codes, -(-state.blocksize // 2), blocks))
        block_bytes = absmax.itemsize * per_block(state.quant_type)
        shards.hold("absmax_0", self.part(absmax, block_bytes, blocks))
        state = replace(state, absmax=torch.empty(0, dtype=absmax.dtype, device=self.device))
        self.empty(weight, state)
        num_codes = (state.numel + 1) // 2
        weight.fetch = self.taken[weight] = ShardedWeight(shards, 0, num_codes, blocks * block_bytes, state)

    def part(self, own: Tensor, block_bytes: int, blocks: int) -> DTensor:
        """Copy this process's blocks of uint8 (blocks, block_bytes). Zeros make the parts of all processes equal."""
        found = torch.zeros(self.rows(blocks), block_bytes, dtype=torch.uint8, device=self.device)
        flat = own.contiguous().view(-1).view(torch.uint8)
        found.view(-1)[: len(flat)] = flat
        return DTensor.from_local(found, self.mesh, [Shard(0)], run_check=False)

    def end_load(self, model: nn.Module) -> None:
        """Quantize the scales of double quantization, and move what is whole to the device. All processes must be here
        within `LOAD`. Raises torch's error if one is not."""
        model.to(self.device)
        if not self.scales:
            return
        group: Any = dist.new_group(backend="gloo", timeout=LOAD)
        for weight, own in self.scales.items():
            blocks = -(-weight.loaded_state.numel // weight.loaded_state.blocksize)
            padded = torch.zeros(self.rows(blocks))
            padded[: len(own)] = own
            every = torch.empty(self.count * len(padded))
            dist.all_gather_into_tensor(every, padded, group=group)
            codes, nested_absmax, offset = quantize_absmax(every[:blocks].to(self.device))
            first = self.rank * len(padded)
            taken = self.taken[weight]
            taken.shards.hold("absmax_0", self.part(codes[first : first + len(padded)], 1, blocks))
            taken.state = weight.quant_state = replace(
                taken.state, absmax=codes.new_empty(0), nested_absmax=nested_absmax, nested_offset=offset
            )
        self.scales.clear()
        dist.destroy_process_group(group)

    def start(
        self,
        model: Any,
        compute_dtype: torch.dtype,
        embedding: tuple[Segment, torch.dtype],
        head: tuple[Segment, torch.dtype],
    ) -> None:
        """Have FSDP2 gather the model's layers. `embedding` is the segment and dtype of its values in a file."""
        self.replace_embedding(model, embedding, compute_dtype)
        model.to(self.device)
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
        for layer, before in zip(self.layers, [self.layers[0], *self.layers]):
            # The first one names itself. Without a name, FSDP2 gathers what the last forward without a backward ran.
            layer.set_modules_to_backward_prefetch([before])
        decoder = fully_shard(model.base_model, mesh=self.mesh, ignored_params=whole)
        decoder.register_forward_pre_hook(self.announce)
        decoder.register_forward_hook(self.check_order)
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


def is_of_exchange(error: BaseException) -> bool:
    """Whether an exchange of torch.distributed has failed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
