"""The states of the optimizer sharded over the processes of a run (ZeRO stage 1, arXiv 1910.02054, section 5.1).

Each trainable tensor has an owner among the processes, which alone has its states and updates it. Then the owner sends
the tensor to the others, in one broadcast for all of its tensors. Gradients are summed and clipped in each process as
without this. A tensor is never divided, so the update has the same bits with every optimizer, and no block of 8-bit
states lies in two processes. torch's ZeroRedundancyOptimizer does the same, but its states travel as pickles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from onecard.errors import UserError
from onecard.optim.make import Optimizer, owners_of
from onecard.train.ranks import Ranks

Parameters = dict[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Owners:
    """Which process has the states of each trainable tensor.

    Attributes:
        parts: the tensors of each process, by name. Each has all if the states are not sharded.
    """

    ranks: Ranks
    is_sharded: bool
    parts: list[Parameters]

    @classmethod
    def of(cls, trainable: Parameters, ranks: Ranks, is_sharded: bool) -> Owners:
        """Share out the tensors. Raises UserError if there are fewer of them than processes."""
        if not is_sharded or ranks.count == 1:
            return cls(ranks, False, [trainable] * ranks.count)
        if len(trainable) < ranks.count:
            must, do = "each process must have a tensor to update", "leave shard_optimizer out"
            raise UserError(must, f"{len(trainable)} for {ranks.count} processes", do, "shard_optimizer")
        parts: list[Parameters] = [{} for _ in range(ranks.count)]
        for (name, p), owner in zip(trainable.items(), owners_of([p.numel() for p in trainable.values()], ranks.count)):
            parts[owner][name] = p
        return cls(ranks, True, parts)

    @property
    def own(self) -> Parameters:
        """The tensors of this process."""
        return self.parts[self.ranks.number]

    @torch.no_grad()
    def spread(self) -> None:
        """Give all processes the tensors that their owners have updated."""
        for number, part in enumerate(self.parts if self.is_sharded else ()):
            sizes, device = [p.nbytes for p in part.values()], next(iter(part.values())).device
            if number == self.ranks.number:
                self.ranks.broadcast(
                    torch.cat([p.detach().reshape(-1).view(torch.uint8) for p in part.values()]), number
                )
                continue
            received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
            self.ranks.broadcast(received, number)
            for p, values in zip(part.values(), received.split(sizes)):
                p.copy_(values.clone().view(p.dtype).view_as(p))  # the copy begins at a multiple of its bytes

    def all_states(self, optimizer: Optimizer) -> dict[str, torch.Tensor]:
        """Return the states of all tensors by TENSOR.STATE in the first process, in host memory; nothing in others."""
        if not self.is_sharded and not self.ranks.is_first:
            return {}
        found = {
            f"{name}.{key}": value.contiguous()
            for name, p in self.own.items()
            for key, value in optimizer.state_tensors(p).items()
        }
        if not self.is_sharded:
            return found
        own = [(name, str(state.dtype).removeprefix("torch."), list(state.shape)) for name, state in found.items()]
        every = self.ranks.gather(own)
        if not self.ranks.is_first:
            for state in found.values():
                self.ranks.send(state)
            return {}
        for number in range(1, self.ranks.count):
            for name, dtype, shape in every[number]:
                found[name] = self.ranks.receive(torch.empty(shape, dtype=getattr(torch, dtype)), number)
        return found
