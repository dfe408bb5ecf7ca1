"""AdamW (arXiv 1711.05101) with 32-bit or 8-bit states, parameter by parameter.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w (1 - lr wd) - lr m' / (sqrt(v') + eps),    m' = m / (1 - b1^t), v' = v / (1 - b2^t)

8-bit states (arXiv 2110.02861) take 2 + 8/256 bytes a weight instead of 8: each update dequantizes them, computes in
float32 and quantizes again. The update of one parameter depends on no other, so states can be brought in for it and
sent away after it (paging/states.py) without changing a bit; and it is made whole or not at all: what it allocates, it
allocates before it writes, so a step that ran out of memory goes on from the parameter that it came to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from onecard.paging.states import PagedStates
from onecard.quant.dynamic import STATE_BLOCKSIZE, dequantize_8bit, quantize_8bit, zeros_8bit

SMALL = 4096  # elements, up to which states stay in 32 bits, as in bitsandbytes
STATES_8BIT = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
SLICE = 1 << 18  # elements in float32 at a time, a multiple of STATE_BLOCKSIZE


class AdamW(torch.optim.Optimizer):
    """torch's fused AdamW on one parameter after another; `state_bits` 8 keeps its states in 8 bits.

    Args:
        paged: where the states go when they leave the device; None if they never do.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,
        paged: PagedStates | None = None,
    ):
        assert state_bits in (8, 32), state_bits
        self.state_bits, self.paged = state_bits, paged
        self.left: list[tuple[torch.nn.Parameter, dict[str, Any]]] | None = None  # of a step begun, the next one last
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; after an allocation has failed, a second call goes on."""
        if self.left is None:
            pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
            self.left = pairs[::-1]
        while self.left:
            p, group = self.left[-1]
            if p not in self.state or not self.state[p]:
                self.state[p] = self.first_state(p)
            if self.paged is not None:
                self.paged.bring(p, self.state[p])
            update(p, p.grad, self.state[p], **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
            self.left.pop()
            if self.paged is not None and self.paged.crowded:
                self.paged.send(p, self.state[p])
        self.left = None

    def first_state(self, p: Tensor) -> dict[str, Tensor]:
        """A parameter's states before its first update: zeros."""
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        if self.state_bits == 32 or p.numel() < SMALL:
            return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        m, m_absmax = zeros_8bit(p.numel(), p.device, signed=True)
        v, v_absmax = zeros_8bit(p.numel(), p.device, signed=False)
        return {"step": step, "exp_avg": m, "exp_avg_absmax": m_absmax, "exp_avg_sq": v, "exp_avg_sq_absmax": v_absmax}

    def state_tensors(self, p: torch.nn.Parameter) -> dict[str, Tensor]:
        """A parameter's states in host memory, wherever they are."""
        state = self.state[p]
        return self.paged.look(p, state) if self.paged is not None else {k: t.cpu() for k, t in state.items()}

    def page_out(self) -> bool:
        """Send all states off the device; whether that gave room."""
        if self.paged is None:
            return False
        return sum(self.paged.send(p, state) for p, state in self.state.items()) > 0


def update(
    p: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """One parameter's update, in place, its states too."""
    if "exp_avg_absmax" in state:
        return update_8bit(p, grad, state, lr, betas, eps, weight_decay)
    adamw(
        [p], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
        fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps,
        maximize=False,
    )  # fmt: skip


def update_8bit(
    p: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """The same with 8-bit states, `SLICE` elements in float32 at a time; nothing is written before all is made."""
    t = int(state["step"].item()) + 1
    rate, root = lr / (1 - betas[0] ** t), (1 - betas[1] ** t) ** 0.5
    w_all, g_all, made = p.view(-1), grad.reshape(-1).float(), []
    for first in range(0, p.numel(), SLICE):
        part = slice(first, min(first + SLICE, p.numel()))
        scales = slice(first // STATE_BLOCKSIZE, -(-part.stop // STATE_BLOCKSIZE))
        g = g_all[part]
        m = dequantize_8bit(state["exp_avg"][part], state["exp_avg_absmax"][scales], signed=True)
        v = dequantize_8bit(state["exp_avg_sq"][part], state["exp_avg_sq_absmax"][scales], signed=False)
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        w = w_all[part].mul(1 - lr * weight_decay).addcdiv_(m, v.sqrt().div_(root).add_(eps), value=-rate)
        values = (*quantize_8bit(m, signed=True), *quantize_8bit(v, signed=False))
        places = [state[key][scales if "absmax" in key else part] for key in STATES_8BIT]
        made += [(w_all[part], w), *zip(places, values)]
    for place, value in made:
        place.copy_(value)
    state["step"] += 1
