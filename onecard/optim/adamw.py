"""AdamW (arXiv 1711.05101) with 32-bit or 8-bit states, for all parameters in one or two launches.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w (1 - lr wd) - lr m' / (sqrt(v') + eps),    m' = m / (1 - b1^t), v' = v / (1 - b2^t)

8-bit states (arXiv 2110.02861) take 2 + 8/256 bytes per weight instead of 8. Each update dequantizes them, computes in
float32 and quantizes them again. Parameters are independent, so states can be loaded before a parameter's update and
offloaded after it (paging/states.py) with bit-identical results. An update is complete or does not happen: it allocates
memory before it writes. A step that ran out of memory continues with the parameter that failed.

A parameter in 16 bits (a fully trained module) has a float32 master weight among its states. The update changes the
master weight, and the parameter is the master weight rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from onecard.kernels import ops
from onecard.kernels.reference import Rates
from onecard.paging.states import PagedStates
from onecard.quant.dynamic import zeros_8bit

SMALL = 4096  # a parameter of fewer elements has 32-bit states, as in bitsandbytes
STATES_8BIT = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")


class AdamW(torch.optim.Optimizer):
    """torch's fused AdamW. With `state_bits` 8, states are in 8 bits and our own kernel updates (kernels/ops.py).

    Args:
        paged: holds the offloaded states. None: states stay on the device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,
        paged: PagedStates | None = None,
    ):
        assert state_bits in (8, 32), state_bits
        self.state_bits, self.paged = state_bits, paged
        self.left: list[tuple[list[torch.nn.Parameter], dict[str, Any]]] | None = None  # to update, the next one last
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. After a failed allocation, a second call continues the step."""
        if self.left is None:
            self.left = self.units(self.is_batched)[::-1]
        while self.left:
            some, group = self.left[-1]
            for p in some:
                if p not in self.state or not self.state[p]:
                    self.state[p] = self.first_state(p)
                if self.paged is not None:
                    self.paged.bring(p, self.state[p])
            settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            update(some, [p.grad for p in some], [self.state[p] for p in some], **settings)
            self.left.pop()
            if self.paged is not None and self.paged.crowded:
                for p in some:
                    self.paged.send(p, self.state[p])
        self.left = None

    @property
    def is_batched(self) -> bool:
        """Whether parameters are updated together, for few launches: on a GPU, if their states have room."""
        on_gpu = any(p.device.type == "cuda" for group in self.param_groups for p in group["params"])
        return on_gpu and not (self.paged is not None and self.paged.crowded)

    def units(self, batched: bool) -> list[tuple[list[torch.nn.Parameter], dict[str, Any]]]:
        """Return what to update together: all parameters of a kind if `batched`, else one."""
        found: list[tuple[list[torch.nn.Parameter], dict[str, Any]]] = []
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            kinds: dict[Any, list[torch.nn.Parameter]] = {}
            for p in learning:
                kinds.setdefault(self.kind(p) if batched else p, []).append(p)
            found += [(some, group) for some in kinds.values()]
        return found

    def kind(self, p: Tensor) -> int:
        """Return what the parameters of one launch share: 32-bit states, or the number of steps of 8-bit states."""
        return int(self.state.get(p, {}).get("step", 0)) if self.in_8bit(p) else -1

    def in_8bit(self, p: Tensor) -> bool:
        """Whether a parameter's states are in 8 bits. With a master weight they are in 32 bits."""
        return self.state_bits == 8 and p.numel() >= SMALL and p.dtype == torch.float32

    def first_state(self, p: Tensor) -> dict[str, Tensor]:
        """Return a parameter's states before its first update: zeros, and its master weight if it needs one."""
        step = torch.zeros((), dtype=torch.float32)
        if not self.in_8bit(p):
            m, v = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
            master = {} if p.dtype == torch.float32 else {"master": p.detach().float()}
            return self.placed(p, {"step": step, "exp_avg": m, "exp_avg_sq": v, **master})
        m, m_absmax = zeros_8bit(p.numel(), p.device, signed=True)
        v, v_absmax = zeros_8bit(p.numel(), p.device, signed=False)
        return {"step": step, "exp_avg": m, "exp_avg_absmax": m_absmax, "exp_avg_sq": v, "exp_avg_sq_absmax": v_absmax}

    def placed(self, p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a state to its update's device. Only the step count of an 8-bit state stays on the host."""
        host = {"step"} if "exp_avg_absmax" in state else set()
        return {key: tensor if key in host else tensor.to(p.device) for key, tensor in state.items()}

    def state_tensors(self, p: torch.nn.Parameter) -> dict[str, Tensor]:
        """Return a parameter's states in host memory, from the device or offloaded."""
        state = self.state[p]
        return self.paged.look(p, state) if self.paged is not None else {k: t.cpu() for k, t in state.items()}

    def load_state(self, p: torch.nn.Parameter, stored: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        self.state[p] = self.placed(p, stored)

    def averaged(self) -> AbstractContextManager[None]:
        """AdamW has no average of the parameters: nothing changes."""
        return nullcontext()

    def finish(self) -> None:
        """Nothing is left to do after the last step."""

    def page_out(self) -> bool:
        """Offload all states. Return whether that freed device memory. What is left of a step goes one by one."""
        if self.paged is None:
            return False
        self.left = self.left and [([p], group) for some, group in self.left for p in some[::-1]]
        return sum(self.paged.send(p, state) for p, state in self.state.items()) > 0


def update(
    params: Sequence[Tensor], grads: Sequence[Any], states: Sequence[dict[str, Tensor]], lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Update all parameters and their states in place, without waiting for a device."""
    plain = [i for i, state in enumerate(states) if "exp_avg_absmax" not in state]
    if plain:
        masters = [states[i].get("master", params[i]) for i in plain]
        adamw(
            masters, [grads[i].float() for i in plain], [states[i]["exp_avg"] for i in plain],
            [states[i]["exp_avg_sq"] for i in plain], [], [states[i]["step"] for i in plain],
            fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps,
            maximize=False,
        )  # fmt: skip
        for i, master in zip(plain, masters):
            if master is not params[i]:
                params[i].copy_(master)
    parts: dict[int, list[tuple[Tensor, ...]]] = {}  # by number of steps: usually one entry
    for p, grad, state in zip(params, grads, states):
        if "exp_avg_absmax" in state:
            parts.setdefault(int(state["step"]) + 1, []).append((p, grad, *(state[key] for key in STATES_8BIT)))
    for step, some in parts.items():
        ops.adamw_8bit_(some, Rates.of(step, lr, betas, eps, weight_decay))
    for state in states:
        if "exp_avg_absmax" in state:
            state["step"] += 1
