"""A torch operator whose calls on plain tensors go around torch.library's dispatch: its Python costs as much as a small
product (LOG.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Operator:
    """torch.ops.onecard.<name>, which a compiler and other tracers see, and torch.autograd.Function for the rest.

    `compute` takes a tensor first; its annotations are the operator's schema.
    """

    def __init__(self, name: str, compute: Callable):
        self.compute = compute
        self.operator = torch.library.custom_op(f"onecard::{name}", compute, mutates_args=())
        self.register_fake = self.operator.register_fake
        self.function: Any = None

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """As torch.library's: gradients for every argument from (ctx, *grads), what they need kept by setup_context."""
        self.operator.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *inputs: Any) -> Any:
            # Not beside a setup_context of its own: apply() would inspect the signature at every call.
            output = self.compute(*inputs)
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)
            return output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.function = type(self.compute.__name__, (torch.autograd.Function,), parts)

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        if type(x) is not Tensor or torch.compiler.is_compiling():
            return self.operator(x, *arguments)
        if not torch.is_grad_enabled():
            return self.compute(x, *arguments)
        return self.operator(x, *arguments) if self.function is None else self.function.apply(x, *arguments)
