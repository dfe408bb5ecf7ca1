"""Cross-entropy; its gradient replaces the logits. Each program reads one row twice.

The first pass keeps a running maximum m and the sum of exp(z - m), rescaled when m grows. The second pass writes
softmax(z) - onehot(target). Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onecard.kernels.triton import launch

BLOCK, NUM_WARPS = 4096, 8


@triton.jit
def cross_entropy_kernel(z, target, losses, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    wanted = tl.load(target + row)
    at_target = tl.load(z + wanted).to(tl.float32)  # now: another warp may overwrite it in the second pass
    most = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(z + at, mask=at < V, other=float("-inf")).to(tl.float32)
        now = tl.maximum(most, tl.max(x, axis=0))
        total = total * tl.exp(most - now) + tl.sum(tl.exp(x - now), axis=0)
        most = now
    tl.store(losses + row + tl.arange(0, 1), tl.log(total) + (most - at_target))
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(z + at, mask=at < V, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - most) / total - (at == wanted).to(tl.float32)
        tl.store(z + at, gradient.to(z.dtype.element_ty), mask=at < V)


def cross_entropy_(z_PV: Tensor, target_P: Tensor) -> Tensor:
    """Same as reference.cross_entropy_."""
    assert z_PV.is_contiguous() and target_P.dtype == torch.int64
    losses_P = torch.empty(len(target_P), dtype=torch.float32, device=z_PV.device)
    launch(
        cross_entropy_kernel, len(target_P), z_PV, target_P.contiguous(), losses_P, z_PV.shape[1],
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return losses_P
