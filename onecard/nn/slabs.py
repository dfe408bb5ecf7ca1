"""Experts computed together on a GPU: grouped products on slabs of dequantized weights. The host waits for nothing.

It computes what experts.py defines, for all pairs of a token and one of its experts at once. The pairs are sorted by
expert once. A grouped product multiplies the rows of each expert by that expert's matrix; it reads on the device where
each expert's rows end. The weights of all experts exist in a scratch buffer, or in turn as slabs: the same slice of the
result's features from each expert. So each slab needs all rows, and no slab needs to know which rows an expert has.

A result is in the pairs' order. A token's sum over its experts reads it back by place, J times, so that it is the same
in every run. The activation runs on some rows at a time, for its memory.

torch's grouped product needs a GPU that it has a kernel for; elsewhere, and for few pairs, experts are computed one at
a time (experts.py). It leaves the result of a group without rows as it was in memory, so that is set to zero here.

Shape suffixes: those of experts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from math import gcd, lcm
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from onecard.config import NESTED_BLOCKSIZE, ROW_MULTIPLE
from onecard.kernels.cpu_info import product_dtype
from onecard.kernels.cuda_graph import forbid_device_sync
from onecard.kernels.dequantize import dequantize_to_scratch
from onecard.quant.codebook import dynamic_map
from onecard.quant.scales import per_block
from onecard.quant.state import PackedWeight, QuantState

if TYPE_CHECKING:
    from onecard.nn.experts import Experts4bit, Product

SLAB_BYTES = 256 << 20
ALIGNED = 8  # a grouped product's rows begin at multiples of 16 bytes
PAIRS_AT_ONCE = 1 << 14  # of an activation


class Groups:
    """The pairs t J + j of tokens and experts, sorted by expert.

    Attributes:
        pairs_S: int64. Pair pairs_S[i] is in place i.
        ends_E: int32, the place after each expert's last pair.
        tokens_S: the token of each place.
        places_TJ: the place of each pair.
        is_empty_E: whether an expert has no pair.
    """

    def __init__(self, pairs_S: Tensor, ends_E: Tensor, num_choices: int):
        self.pairs_S, self.ends_E = pairs_S, ends_E
        self.tokens_S = pairs_S // num_choices
        places = torch.arange(len(pairs_S), device=pairs_S.device)
        self.places_TJ = torch.empty_like(pairs_S).scatter_(0, pairs_S, places).view(-1, num_choices)
        self.is_empty_E = ends_E == functional.pad(ends_E[:-1], (1, 0))

    @cached_property
    def expert_S(self) -> Tensor:
        """The expert of each place."""
        places = torch.arange(len(self.pairs_S), device=self.ends_E.device, dtype=torch.int32)
        return torch.searchsorted(self.ends_E, places, right=True)

    @classmethod
    def of(cls, index_TJ: Tensor, num_experts: int) -> Groups:
        flat = index_TJ.reshape(-1)
        counts_E = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
        return cls(flat.argsort(stable=True), counts_E.cumsum(0).int(), index_TJ.shape[1])

    def sum(self, values_SK: Tensor, weights_TJ: Tensor | None = None) -> Tensor:
        """Return each token's sum over its pairs, float32 (T, K), in the order of its choices."""
        total_TK = values_SK.new_zeros(len(self.places_TJ), values_SK.shape[1], dtype=torch.float32)
        for j in range(self.places_TJ.shape[1]):
            part_TK = values_SK[self.places_TJ[:, j]]
            if weights_TJ is None:
                total_TK += part_TK
            else:
                total_TK.addcmul_(part_TK, weights_TJ[:, j, None].float())
        return total_TK

    def product(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Multiply (S, K) by (E, K, N) to (S, N), each row by its expert's matrix."""
        return functional.grouped_mm(rows, matrices, offs=self.ends_E)

    def outer(self, a_SN: Tensor, b_SK: Tensor) -> Tensor:
        """Return the sum over each expert's rows of a^T b, (E, N, K)."""
        found = functional.grouped_mm(a_SN.T, b_SK, offs=self.ends_E)
        return found.masked_fill_(self.is_empty_E[:, None, None], 0)


class SlabProduct:
    """One product of all experts, y = x W_e^T + b_e + s (x A_e^T) B_e^T, for rows in the pairs' order."""

    def __init__(self, product: Product, groups: Groups):
        self.packed, self.state, self.dtype, self.groups = product.packed, product.state, product.dtype, groups
        self.dim_N, self.dim_K = (2, 1) if product.transposed else (1, 2)
        self.bias_EN, self.scaling = product.bias_EN, product.scaling
        self.lora, self.A_ERK, self.B_ENR = product.A_ERK, None, None
        if product.A_ERK is not None and product.B_ENR is not None:
            missing = -product.A_ERK.shape[1] % ALIGNED  # of the rank
            self.A_ERK = functional.pad(product.A_ERK.to(self.dtype), (0, 0, 0, missing))
            self.B_ENR = functional.pad(product.B_ENR.to(self.dtype), (0, missing))

    def forward(self, x_SK: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (S, N), and x A^T (S, R) for the backward."""
        A, B, bias_EN = self.A_ERK, self.B_ENR, self.bias_EN
        xA_SR = x_SK.new_empty(0) if A is None else self.groups.product(x_SK, A.mT)

        def finish(y: Tensor, part: slice) -> Tensor:
            if bias_EN is not None:
                y += bias_EN[:, part][self.groups.expert_S]
            return y if B is None else y.add_(self.groups.product(xA_SR, B[:, part].mT), alpha=self.scaling)

        return self.slab_by_slab(x_SK, self.dim_N, finish), xA_SR

    def backward(self, g_SN: Tensor, needs_x: bool) -> tuple[Tensor, Tensor]:
        """Return the gradient with respect to x, (S, K) if `needs_x`, else empty; and s g B (S, R)."""
        A, B = self.A_ERK, self.B_ENR
        gB_SR = g_SN.new_empty(0) if B is None else self.groups.product(g_SN, B).mul_(self.scaling)

        def finish(dx: Tensor, part: slice) -> Tensor:
            return dx if A is None else dx.add_(self.groups.product(gB_SR, A[:, :, part]))

        return self.slab_by_slab(g_SN, self.dim_K, finish) if needs_x else g_SN.new_empty(0), gB_SR

    def lora_grads(
        self, g_SN: Tensor, gB_SR: Tensor, x_SK: Tensor, xA_SR: Tensor, weights_S: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of A (E, R, K) and of B (N, R, E). `weights_S` multiplies the rows of g."""
        if self.lora is None:
            return None, None
        if weights_S is not None:
            gB_SR, xA_SR = (rows.mul(weights_S[:, None]).to(rows.dtype) for rows in (gB_SR, xA_SR))
        dA_ERK, dB_ENR = self.groups.outer(gB_SR, x_SK), self.groups.outer(g_SN, xA_SR).mul_(self.scaling)
        _, R, _ = self.lora.shape
        return dA_ERK[:, :R].to(self.lora.dtype), dB_ENR[:, :, :R].permute(1, 2, 0).to(self.lora.dtype)

    def slab_by_slab(self, rows: Tensor, dim: int, finish: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Multiply rows by the weights, whose dimension `dim` becomes the result's features. `finish` completes each
        slice of them."""
        turned = dim == 1  # a product takes matrices whose last dimension is the result's
        whole = None
        for part in slices(self.state.shape, dim, self.state.blocksize, self.dtype.itemsize):
            with dequantize_to_scratch(slab_of(self.packed, self.state, dim, part), self.dtype) as W:
                found = finish(self.groups.product(rows, W.mT if turned else W), part)
            if found.shape[1] == self.state.shape[dim]:
                return found
            whole = rows.new_empty(len(rows), self.state.shape[dim]) if whole is None else whole
            whole[:, part] = found
        assert whole is not None
        return whole


class GroupedExperts(torch.autograd.Function):
    """Computes the same as experts.ExpertsInTurn."""

    @staticmethod
    def forward(ctx, x_TK, w_TJ, index_TJ, experts, make, s_up, A_up, B_up, s_down, A_down, B_down):
        x = x_TK.to(product_dtype(x_TK.dtype, x_TK.device.type))
        groups = Groups.of(index_TJ, experts.num_experts)
        made = make(experts, (s_up, A_up, B_up), (s_down, A_down, B_down), x)
        up, down = (SlabProduct(product, groups) for product in made)
        u_SN, xA_SR = up.forward(x[groups.tokens_S])
        y_SK, hA_SR = down.forward(activated(experts, u_SN))
        ctx.experts, ctx.make, ctx.scalings = experts, make, (s_up, s_down)
        tensors = (u_SN, xA_SR, hA_SR, A_up, B_up, A_down, B_down)
        ctx.save_for_backward(x_TK, w_TJ, groups.pairs_S, groups.ends_E, *tensors)
        return groups.sum(y_SK, w_TJ).to(x_TK.dtype)

    @staticmethod
    def backward(ctx, grad_y_TK):
        x_TK, w_TJ, pairs_S, ends_E, u_SN, xA_SR, hA_SR, A_up, B_up, A_down, B_down = ctx.saved_tensors
        x, g_TK = x_TK.to(u_SN.dtype), grad_y_TK.to(u_SN.dtype)
        groups = Groups(pairs_S, ends_E, w_TJ.shape[1])
        made = ctx.make(ctx.experts, (ctx.scalings[0], A_up, B_up), (ctx.scalings[1], A_down, B_down), x)
        up, down = (SlabProduct(product, groups) for product in made)
        w_S = w_TJ.reshape(-1)[pairs_S].float()
        g_SK, h_SN = g_TK[groups.tokens_S], activated(ctx.experts, u_SN)
        dh_SN, gB_SR = down.backward(g_SK, True)
        grads_down = down.lora_grads(g_SK, gB_SR, h_SN, hA_SR, w_S)
        dw_S = row_products(dh_SN, h_SN)
        if down.bias_EN is not None:
            dw_S += row_products(g_SK, down.bias_EN, groups.expert_S)
        del g_SK, h_SN
        du_SN = activation_gradient(ctx.experts, u_SN, dh_SN.mul_(w_S[:, None]))
        del dh_SN
        dx_SK, gB_SR = up.backward(du_SN, ctx.needs_input_grad[0])
        dx = groups.sum(dx_SK).to(x_TK.dtype) if ctx.needs_input_grad[0] else None
        del dx_SK
        grads_up = up.lora_grads(du_SN, gB_SR, x[groups.tokens_S] if up.lora is not None else x, xA_SR)
        dw_TJ = torch.empty_like(dw_S).scatter_(0, pairs_S, dw_S).view(w_TJ.shape).to(w_TJ.dtype)
        return dx, dw_TJ, None, None, None, None, *grads_up, None, *grads_down


def can_group(index_TJ: Tensor, states: list[QuantState], x: Tensor) -> bool:
    """Whether to compute all experts together: there are as many pairs as experts, the device multiplies groups without
    a wait, and each slab of the stacked weights, which have `states`, is whole blocks."""
    work = product_dtype(x.dtype, x.device.type)
    if index_TJ.numel() < states[0].shape[0] or not multiplies_groups(x.device, work):
        return False
    return all(can_slab(state.shape, state.blocksize, work.itemsize) for state in states)


def can_slab(shape: torch.Size, blocksize: int, itemsize: int) -> bool:
    """Whether a stacked weight is multiplied in slabs."""
    parts = [slices(shape, dim, blocksize, itemsize) for dim in (1, 2)]
    return all(parts) and all(size % ALIGNED == 0 for size in shape[1:])


@cache
def multiplies_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a grouped product for the device that does not wait for it. Where it has no kernel, torch reads
    on the host where the groups end."""
    if device.type != "cuda" or not hasattr(functional, "grouped_mm"):
        return False
    rows = torch.eye(16, device=device, dtype=dtype)
    matrices = torch.arange(2 * 16 * 16, device=device).view(2, 16, 16).remainder(251).to(dtype)
    ends = torch.tensor([5, 16], device=device, dtype=torch.int32)
    try:
        with forbid_device_sync():
            found = functional.grouped_mm(rows, matrices, offs=ends)
    except RuntimeError:
        return False
    return torch.equal(found, torch.cat([matrices[0, :5], matrices[1, 5:]]))


def is_grouped(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a plan counts experts as computed together. Without a GPU here, a new one is assumed."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return dtype == torch.bfloat16 and hasattr(functional, "grouped_mm")
    return multiplies_groups(device, dtype)


def slices(shape: torch.Size, dim: int, blocksize: int, itemsize: int) -> list[slice]:
    """Return the parts of a stacked weight's dimension 1 or 2 that slabs hold: SLAB_BYTES at most, or ROW_MULTIPLE
    entries. There is none if slabs cannot be whole blocks."""
    size, whole = shape[dim], shape.numel() * itemsize
    if whole <= SLAB_BYTES:
        return [slice(0, size)]
    width = shape[2] if dim == 1 else 1  # neighbouring weights of an entry
    if dim == 2 and size % blocksize:
        return []
    step = lcm(ROW_MULTIPLE, blocksize // gcd(blocksize, width))
    entries = max(SLAB_BYTES * size // whole // step, 1) * step
    return [slice(first, min(first + entries, size)) for first in range(0, size, entries)]


def slab_bytes(shape: torch.Size, blocksize: int, itemsize: int) -> int:
    """Return the bytes of the largest slab of a stacked weight, with those of its codes and scales if these are copied;
    those of an expert if there are no slabs."""
    if not can_slab(shape, blocksize, itemsize):
        return shape[1:].numel() * itemsize
    found = []
    for dim in (1, 2):
        parts = slices(shape, dim, blocksize, itemsize)
        num_weights = shape.numel() // shape[dim] * (parts[0].stop - parts[0].start)
        found.append(num_weights * (itemsize + (len(parts) > 1)))
    return max(found)


def slab_of(packed: Tensor, state: QuantState, dim: int, part: slice) -> PackedWeight:
    """Return a slice of dimension 1 or 2 of a stacked weight. If it is not the whole, its codes and scales are copies,
    with scales of double quantization in float32."""
    if part.stop - part.start == state.shape[dim]:
        return PackedWeight.of(packed, state)
    stride = state.shape[1:].numel() if dim == 1 else state.shape[2]
    width = state.shape[2] if dim == 1 else 1
    first, last = part.start * width, part.stop * width  # of `stride` weights
    codes = packed.view(-1, stride // 2)[:, first // 2 : last // 2]
    first, last, stride = first // state.blocksize, last // state.blocksize, stride // state.blocksize
    each, nested_absmax = per_block(state.quant_type), state.nested_absmax
    absmax = state.absmax.view(-1, each * stride)[:, each * first : each * last]
    if nested_absmax is not None and state.nested_offset is not None:
        starts = torch.arange(len(absmax), device=absmax.device)[:, None] * stride
        group = (starts + torch.arange(first, last, device=absmax.device)) // NESTED_BLOCKSIZE
        absmax = dynamic_map(absmax.device)[absmax.long()] * nested_absmax[group] + state.nested_offset
        nested_absmax = None
    shape = list(state.shape)
    shape[dim] = part.stop - part.start
    codes, absmax = (tensor.contiguous().view(-1) for tensor in (codes, absmax))
    return PackedWeight(codes, absmax, nested_absmax, None, state.quant_type, state.blocksize, shape)


def activated(experts: Experts4bit, u_SN: Tensor) -> Tensor:
    """Return act(u), (S, K)."""
    with torch.no_grad():
        parts = [experts.activate(part) for part in u_SN.split(PAIRS_AT_ONCE)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def activation_gradient(experts: Experts4bit, u_SN: Tensor, dh_SK: Tensor) -> Tensor:
    """Return act'(u) dh, (S, N)."""
    found = torch.empty_like(u_SN)
    for u, dh, du in zip(*(rows.split(PAIRS_AT_ONCE) for rows in (u_SN, dh_SK, found))):
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            h = experts.activate(leaf)
        du.copy_(torch.autograd.grad(h, leaf, dh)[0])
    return found


def row_products(a_SN: Tensor, b: Tensor, index_S: Tensor | None = None) -> Tensor:
    """Return the sums of each row's products, float32 (S,). `index_S`: the row of b for each row of a."""
    found = a_SN.new_empty(len(a_SN), dtype=torch.float32)
    for first in range(0, len(a_SN), PAIRS_AT_ONCE):
        rows = slice(first, first + PAIRS_AT_ONCE)
        found[rows] = (a_SN[rows].float() * (b[rows] if index_S is None else b[index_S[rows]])).sum(-1)
    return found
