"""Experts4bit: the stacked experts of a mixture-of-experts layer in 4 bits.

For a token x, its experts e and their routing weights w_e, with up's weights U_e (N, K) and down's D_e:

    u_e = x U_e^T + b_e,    h_e = act(u_e),    y = sum over e of w_e (h_e D_e^T + c_e)

Each product may have a LoRA term s B_e A_e. The forward keeps x, the routing and u for the backward. With g = dL/dy,
the backward is

    dh_e = g D_e,    dw_e = <dh_e, h_e> + <g, c_e>,    du_e = act'(u_e) w_e dh_e,    dx = sum over e of du_e U_e

It runs act, the model's own function, again for h_e and act'. Routers stay in 16 bits, the same as with bitsandbytes:
transformers does not build them as linears. They are small, but a wrong choice of expert is a large error.

On a CPU, on a GPU without grouped products, and for few tokens, the experts with tokens are computed in turn. U_e and
D_e exist only in a scratch buffer while the tokens of expert e are computed. The host reads the number of tokens of
each expert first, once in each layer. Other GPUs compute all experts together, and the host reads nothing (slabs.py).

Shape suffixes: T tokens, J experts of a token, S = T J pairs sorted by expert, M pairs of one expert, E experts,
N outputs and K inputs of a product, R the LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from onecard.config import ROW_MULTIPLE
from onecard.kernels import ops
from onecard.kernels.cpu_info import product_dtype
from onecard.kernels.dequantize import dequantize_to_scratch
from onecard.kernels.reference import Lora
from onecard.nn.linear import Linear4bit
from onecard.nn.slabs import GroupedExperts, can_group
from onecard.quant.state import PackedWeight, QuantState, part_of

FEW_ROWS, FILL_ROWS = 8, 16
Term = tuple[float, Tensor | None, Tensor | None]  # a LoRA term in autograd's arguments: scaling, A, B
STACKS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass
class Factors:
    """The LoRA terms of all experts: A (E, R, K), B (N, R, E) as peft stores it, and their scaling."""

    A_ERK: Tensor
    B_NRE: Tensor
    scaling: float


class StackedWeight:
    """One stacked weight of an Experts4bit. It has the methods that a Linear4bit has for its weight."""

    def __init__(self, experts: Experts4bit, name: str):
        self.experts, self.name = experts, name
        self.shape: torch.Size = getattr(experts, name).shape
        self.quant_state: QuantState | None = None
        self.fetch: Callable[[], tuple[Tensor, QuantState]] | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The packed codes, uint8 (numel/2, 1). Before `set_weight`, a parameter of `shape` on the meta device."""
        return getattr(self.experts, self.name)

    @weight.setter
    def weight(self, parameter: nn.Parameter) -> None:
        setattr(self.experts, self.name, parameter)

    @property
    def is_transposed(self) -> bool:
        """Whether the stored weight is (E, K, N)."""
        return self.experts.is_transposed and not self.turns(self.loaded_state.quant_type)

    def stored_shape(self, quant_type: str) -> torch.Size:
        """Return the shape of the stored weight. MXFP4's blocks run along the inputs: it is (E, N, K) in any model."""
        E, *matrix = self.shape
        return torch.Size([E, *(reversed(matrix) if self.turns(quant_type) else matrix)])

    def turns(self, quant_type: str) -> bool:
        """Whether the stored weight's matrices are the transposes of the model's."""
        return turns(self.experts.is_transposed, quant_type)

    def set_weight(self, packed: Tensor, state: QuantState) -> None:
        """Set the quantized weight, of `stored_shape`."""
        expected = self.stored_shape(state.quant_type)
        assert state.shape == expected, (state.shape, expected)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.quant_state = state

    def stored(self) -> tuple[Tensor, QuantState]:
        """Return the codes and scales for a product. `fetch` pages a paged weight in."""
        return (self.weight, self.loaded_state) if self.fetch is None else self.fetch()

    @property
    def loaded_state(self) -> QuantState:
        """The QuantState. The weight must be set."""
        assert self.quant_state is not None, "Experts4bit computes after set_weight"
        return self.quant_state

    def dequantize(self) -> Tensor:
        """Dequantize the weight, of shape `shape`, to the compute dtype."""
        W = ops.dequantize_4bit(*self.stored(), self.experts.compute_dtype)
        return W.mT.contiguous() if self.turns(self.loaded_state.quant_type) else W


class Experts4bit(nn.Module):
    """Replaces a model's experts that implement transformers' experts interface.

    Parameters and children keep their names. `weights` holds the stacked weights, (E, N, K), or (E, K, N) if the model
    `is_transposed`; those in MXFP4 are stored as (E, N, K) in any model. While a LoRA layer computes, `factors` holds
    its LoRA terms by the weight's name.
    """

    def __init__(self, experts: Any, compute_dtype: torch.dtype | None):
        super().__init__()
        self.own = (experts,)  # in a tuple, so that its parameters are not registered twice
        self.compute_dtype = compute_dtype
        self.is_transposed: bool = experts.is_transposed
        for name, child in experts.named_children():
            self.add_module(name, child)
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.weights = {name: StackedWeight(self, name) for name in self._parameters if name in STACKS}
        self.factors: dict[str, Factors] = {}
        experts._parameters.clear()

    @property
    def num_experts(self) -> int:
        return self.weights["down_proj"].shape[0]

    def activate(self, u: Tensor) -> Tensor:
        """Apply the model's activation, and its gate if it has one, between the two products."""
        (experts,) = self.own
        return experts._apply_gate(u) if experts.has_gate else experts.act_fn(u)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return y (T, K) for hidden_states (T, K), top_k_index, int64 (T, J), and top_k_weights (T, J)."""
        up, down = (self.factors.get(name) for name in self.weights)
        x = hidden_states.to(self.compute_dtype or hidden_states.dtype)
        states = [weight.loaded_state for weight in self.weights.values()]
        y = (GroupedExperts if can_group(top_k_index, states, x) else ExpertsInTurn).apply(
            x,
            top_k_weights,
            top_k_index,
            self,
            products,
            *((up.scaling, up.A_ERK, up.B_NRE) if up else (1.0, None, None)),
            *((down.scaling, down.A_ERK, down.B_NRE) if down else (1.0, None, None)),
        )
        return y.to(hidden_states.dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> Experts4bit:
        # Same as in Linear4bit: scales move with their codes and keep their dtype.
        super()._apply(fn, recurse)
        for weight in self.weights.values():
            if weight.quant_state is not None and weight.quant_state.absmax.device != weight.weight.device:
                weight.quant_state = weight.quant_state.to(weight.weight.device)
        return self

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={tuple(weight.shape)}" for name, weight in self.weights.items())
        return f"{shapes}, compute_dtype={self.compute_dtype}"


class Product:
    """One product of all experts, y = x W_e^T + b_e + s (x A_e^T) B_e^T, within one forward or backward."""

    def __init__(self, weight: StackedWeight, scaling: float, A_ERK: Tensor | None, B_NRE: Tensor | None, x: Tensor):
        self.packed, self.state = weight.stored()
        self.transposed, self.scaling, self.dtype = weight.is_transposed, scaling, x.dtype
        bias: Tensor | None = getattr(weight.experts, f"{weight.name}_bias", None)
        self.bias_EN = None if bias is None else bias.to(x.dtype)
        self.A_ERK, self.B_ENR = A_ERK, None if B_NRE is None else B_NRE.permute(2, 0, 1).contiguous()

    @property
    def num_outputs(self) -> int:
        return self.state.shape[2 if self.transposed else 1]

    @cached_property
    def grads(self) -> tuple[Any, Any]:
        """The gradients of A (E, R, K) and B (E, N, R). They are zero for experts without tokens."""
        if self.A_ERK is None or self.B_ENR is None:
            return None, None
        return torch.zeros_like(self.A_ERK), torch.zeros_like(self.B_ENR)

    def part(self, expert: int) -> tuple[PackedWeight, int]:
        """Return W_e and the number of weights to skip before it (`part_of`)."""
        packed, state, skip = part_of(self.packed, self.state, expert)
        return PackedWeight.of(packed, state), skip

    @contextmanager
    def weight(self, expert: int) -> Iterator[Tensor]:
        """Dequantize W_e (N, K) into a scratch buffer, which is valid in the body."""
        part, skip = self.part(expert)
        with dequantize_to_scratch(part, self.dtype) as whole:
            W = whole.view(-1)[skip:].view(self.state.shape[1:])
            yield W.T if self.transposed else W

    def lora(self, expert: int) -> Lora | None:
        """Return the LoRA term of an expert, or None."""
        if self.A_ERK is None or self.B_ENR is None:
            return None
        return Lora(self.A_ERK[expert], self.B_ENR[expert], self.scaling)

    def forward(self, expert: int, x_MK: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (M, N), and x A_e^T (M, R) for the backward."""
        lora = self.lora(expert)
        bias = None if self.bias_EN is None else self.bias_EN[expert]
        part, skip = self.part(expert)
        if not skip and not self.transposed:
            return ops.linear_forward(x_MK, part, bias, lora)[:2]
        with self.weight(expert) as W_NK:
            y_MN = x_MK @ W_NK.T
        if bias is not None:
            y_MN += bias
        if lora is None:
            return y_MN, x_MK.new_empty(0)
        xA_MR = x_MK @ lora.A_RK.to(x_MK.dtype).T
        return y_MN.addmm_(xA_MR, lora.B_NR.to(x_MK.dtype).T, alpha=lora.scaling), xA_MR

    def backward(self, expert: int, g_MN: Tensor, x_MK: Tensor, xA_MR: Tensor, needs_x: bool, learns: bool) -> Tensor:
        """Return the gradient with respect to x, (M, K) if `needs_x`, else empty. If `learns`, store the gradients of
        A_e and B_e in `grads`."""
        lora = self.lora(expert)
        learns = learns and lora is not None
        if not needs_x and not learns:
            return g_MN.new_empty(0)
        rest = (lora, None if lora is None else x_MK, xA_MR, [needs_x, False, learns, learns])
        part, skip = self.part(expert)
        if not skip and not self.transposed:
            dx_MK, _, dA_RK, dB_NR = ops.linear_backward(g_MN, part, *rest)
        else:
            dx_MK, _, dA_RK, dB_NR = ops.plain_backward(g_MN, partial(self.weight, expert), *rest)
        if learns:
            for all_of_them, its_own in zip(self.grads, (dA_RK, dB_NR)):
                all_of_them[expert] = its_own
        return g_MN.new_empty(0) if dx_MK is None else dx_MK


class ExpertsInTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, w_TJ, index_TJ, experts, make, s_up, A_up, B_up, s_down, A_down, B_down):
        x = x_TK.to(product_dtype(x_TK.dtype, x_TK.device.type))
        up, down = make(experts, (s_up, A_up, B_up), (s_down, A_down, B_down), x)
        pairs_S, counts = by_expert(index_TJ, experts.num_experts)
        u_SN = x.new_empty(len(pairs_S), up.num_outputs)
        xA_SR, hA_SR = (x.new_empty(len(pairs_S), 0 if A is None else A.shape[1]) for A in (A_up, A_down))
        y_TK = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert, part in expert_slices(counts):
            tokens_M = pairs_S[part] // index_TJ.shape[1]
            M = len(tokens_M)
            u_MN, xA_MR = up.forward(expert, x[padded_rows(tokens_M)])
            y_MK, hA_MR = down.forward(expert, experts.activate(u_MN))
            u_SN[part] = u_MN[:M]
            for kept, made in ((xA_SR, xA_MR), (hA_SR, hA_MR)):
                if kept.numel():
                    kept[part] = made[:M]
            y_TK.index_add_(0, tokens_M, y_MK[:M].float() * w_TJ.reshape(-1)[pairs_S[part], None])
        ctx.experts, ctx.make, ctx.counts, ctx.scalings = experts, make, counts, (s_up, s_down)
        ctx.save_for_backward(x_TK, w_TJ, pairs_S, u_SN, xA_SR, hA_SR, A_up, B_up, A_down, B_down)
        return y_TK.to(x_TK.dtype)

    @staticmethod
    def backward(ctx, grad_y_TK):
        x_TK, w_TJ, pairs_S, u_SN, xA_SR, hA_SR, A_up, B_up, A_down, B_down = ctx.saved_tensors
        x, g_TK = x_TK.to(u_SN.dtype), grad_y_TK.to(u_SN.dtype)
        up, down = ctx.make(ctx.experts, (ctx.scalings[0], A_up, B_up), (ctx.scalings[1], A_down, B_down), x)
        dx_TK = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        dw_S = torch.zeros(w_TJ.numel(), dtype=torch.float32, device=x.device)
        for expert, part in expert_slices(ctx.counts):
            tokens_M = pairs_S[part] // w_TJ.shape[1]
            M, rows = len(tokens_M), padded_rows(tokens_M)
            x_MK, g_MK, w_M = x[rows], g_TK[rows], padded_rows(w_TJ.reshape(-1)[pairs_S[part]].float())
            xA_MR, hA_MR = padded_rows(xA_SR[part]), padded_rows(hA_SR[part])
            with torch.enable_grad():
                u_MN = padded_rows(u_SN[part]).detach().requires_grad_()
                h_MN = ctx.experts.activate(u_MN)
            dh_MN = down.backward(expert, g_MK, h_MN.detach(), hA_MR, True, False)
            dw_M = (dh_MN.float() * h_MN.detach().float()).sum(-1)
            if down.bias_EN is not None:
                dw_M += (g_MK.float() * down.bias_EN[expert].float()).sum(-1)
            dw_S[pairs_S[part]] = dw_M[:M]
            down.backward(expert, (g_MK * w_M[:, None]).to(x.dtype), h_MN.detach(), hA_MR, False, True)
            (du_MN,) = torch.autograd.grad(h_MN, u_MN, (dh_MN * w_M[:, None]).to(x.dtype))
            dx_MK = up.backward(expert, du_MN, x_MK, xA_MR, ctx.needs_input_grad[0], True)
            if ctx.needs_input_grad[0]:
                dx_TK.index_add_(0, tokens_M, dx_MK[:M].float())
        dx = dx_TK.to(x_TK.dtype) if ctx.needs_input_grad[0] else None
        (dA_up, dB_up), (dA_down, dB_down) = (
            (None, None) if dA is None else (dA, dB.permute(1, 2, 0)) for dA, dB in (up.grads, down.grads)
        )
        return dx, dw_S.view(w_TJ.shape).to(w_TJ.dtype), None, None, None, None, dA_up, dB_up, None, dA_down, dB_down


def products(experts: Experts4bit, up: Term, down: Term, x: Tensor) -> tuple[Product, Product]:
    """Return both products in x's dtype. Each tuple has scaling, and A (E, R, K) and B (N, R, E), or None for both."""
    first, second = experts.weights.values()
    return Product(first, *up, x), Product(second, *down, x)


def by_expert(index_TJ: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Return the pairs t J + j sorted by expert, int64 (S,), and the number of pairs of each expert."""
    flat = index_TJ.reshape(-1)
    counts_E = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))  # bincount would sync
    return flat.argsort(stable=True), counts_E.tolist()


def padded_rows(x_M: Tensor) -> Tensor:
    """Append zero rows to x, up to one of a few row counts. In the backward these rows have routing weight 0, so that
    they add nothing to the gradients."""
    M = x_M.shape[0]
    return nn.functional.pad(x_M, (0, 0) * (x_M.ndim - 1) + (0, filled_rows(M) - M))


def filled_rows(M: int) -> int:
    """Return the row count that M rows are padded to. Few counts, because a product prepares each new one once."""
    multiple = 1 if M <= FEW_ROWS else FILL_ROWS if M <= 8 * FILL_ROWS else ROW_MULTIPLE
    return -(-M // multiple) * multiple


def num_filled_rows(least: int, most: int) -> int:
    """Count the different results of filled_rows for `least` to `most` rows."""
    count, M = 0, least
    while min(most, 8 * FILL_ROWS) >= M:
        count, M = count + 1, filled_rows(M) + 1
    if most < M:
        return count
    return count + -(-most // ROW_MULTIPLE) - -(-M // ROW_MULTIPLE) + 1


def expert_slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has pairs, and the slice of its pairs among the sorted ones."""
    end = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(end, end + count)
        end += count


def turns(is_transposed: bool, quant_type: str) -> bool:
    """Whether a stacked weight in 4 bits has the transposes of the model's matrices: MXFP4's are always (N, K)."""
    return is_transposed and quant_type == "mxfp4"


def are_stacked_experts(module: Any) -> bool:
    """Whether a module implements transformers' experts interface in a form that Experts4bit supports."""
    plain = not getattr(module, "has_post_expert_norm", False)
    return plain and hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def has_experts(model: nn.Module) -> bool:
    """Whether any of a model's modules is an Experts4bit."""
    return any(isinstance(module, Experts4bit) for module in model.modules())


def weights_of(module: nn.Module) -> Iterator[tuple[str, Linear4bit | StackedWeight]]:
    """Yield a module's own 4-bit weights by parameter name."""
    if isinstance(module, Linear4bit):
        yield "weight", module
    elif isinstance(module, Experts4bit):
        yield from module.weights.items()
