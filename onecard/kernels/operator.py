"""A torch operator whose calls on plain tensors bypass torch.library's dispatch, whose Python code costs as much as a
small product (LOG.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Operator:
    """torch.ops.onecard.<name> for a compiler and other tracers, and a torch.autograd.Function for all other calls.

    The first argument of `compute` is a tensor. Its annotations are the operator's schema.
    """

    def __init__(self, name: str, compute: Callable):
        self.compute = compute
        self.operator = torch.library.custom_op(f"onecard::{name}", compute, mutates_args=())
        self.register_fake = self.operator.register_fake
        self.function: Any = None

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Same as torch.library's: from (ctx, *grads) to all arguments' gradients; setup_context saves the tensors."""
        self.operator.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *inputs: Any) -> Any:
            # Not as a separate setup_context: apply() would then inspect the signature at every call.
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
