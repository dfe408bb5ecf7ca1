"""Selects the linears of a model that are quantized to 4 bits.

The head, the modules that the family keeps in float32 and the towers of inputs other than text are not quantized. A
linear whose weight the model's code reads directly is not quantized either: such code (the fused kernels of state-space
layers, transformers' `self.dt_proj.weight @ x`) needs a matrix, not codes, and would ignore an adapter. It is found in
the source of each module's class, so that code paths of other devices count, too. Branches that the module's own
settings rule out do not count.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Iterable, Iterator
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

SETUP = ("__init__", "_init_weights", "reset_parameters")  # they run before a model computes
COMPARED = {
    ast.Gt: operator.gt, ast.Lt: operator.lt, ast.GtE: operator.ge, ast.LtE: operator.le, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
LINEARS = (nn.Linear, Conv1D)


def linears_of(model: Any, skip: list[str] | None = None) -> dict[str, Any]:
    """Return the linears of transformers' model that are quantized, by name.

    Args:
        skip: names of modules that are not quantized. None: the head.
    """
    kept = [*kept_names(model, skip), *beside_text(model), *sorted(read_directly(model))]
    named = model.named_modules()
    return {name: m for name, m in named if is_plain(m) and should_convert_module(name, kept)}


def skipped_names(model: Any) -> list[str] | None:
    """Return the modules that a 4-bit checkpoint's config.json must list as 16-bit. None: the head, the default."""
    beside = beside_text(model)
    return [*kept_names(model, None), *beside] if beside else None


def beside_text(model: Any) -> list[str]:
    """Return the names of a multimodal model's modules that text does not pass through. They are not quantized.

    These are all modules outside the decoder and head, and the models of other inputs inside the decoder, together with
    the modules around them up to the next model.
    """
    if set(inputs_of(model)) == {"text"}:
        return []
    named = dict(model.named_modules())
    ends = (model.get_decoder(), model.get_output_embeddings())
    kept = [name for name, module in named.items() if any(module is end for end in ends)]

    def leads(name: str) -> bool:  # to the decoder or head, or is inside one of them
        return any(is_inside(path, name) or is_inside(name, path) for path in kept)

    found = {name for name in named if not leads(name) and leads(parent_of(name))}
    for name, module in named.items():
        if isinstance(module, PreTrainedModel) and "text" not in inputs_of(module):
            while not isinstance(named[parent_of(name)], PreTrainedModel):
                name = parent_of(name)
            found.add(name)
    return sorted(found)


def parent_of(name: str) -> str:
    return name.rpartition(".")[0]


def is_inside(name: str, path: str) -> bool:
    return not path or f"{name}.".startswith(f"{path}.")


def inputs_of(model: Any) -> tuple[str, ...]:
    """Return the input modalities that the class of a transformers model declares."""
    found = model.input_modalities
    return (found,) if isinstance(found, str) else tuple(found)


@torch.no_grad()
def is_plain(module: Any) -> bool:
    """Whether a module computes the same as a linear. A router may subclass nn.Linear and return more, and Falcon's
    linears have their own forward: such a module is tried on a copy with a small weight."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(module, nn.Linear):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    x, W, bias = (torch.randn(shape, generator=generator, device="cpu") for shape in ((2, 5), (3, 5), (3,)))
    bias = None if module.bias is None else bias
    small = copy(module)
    parameters = {"weight": W, "bias": bias}
    small._parameters = {name: None if p is None else nn.Parameter(p) for name, p in parameters.items()}
    small.in_features, small.out_features = 5, 3
    try:
        found: Any = small(x)
    except Exception:  # it needs another weight
        return False
    expected = nn.functional.linear(x, W, bias)
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def kept_names(model: Any, skip: list[str] | None) -> list[str]:
    """Return name patterns of the modules that the caller or the family keeps unquantized.

    transformers' own list is not used: its last entry is another linear if head and embedding are one tensor.
    """
    if skip is None:
        head = model.get_output_embeddings()
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        heads = {name for name, module in model.named_modules() if module is head}
        last = {list(model.named_parameters())[-1][0]} if head is None else set()
        skip = sorted(heads | {name.removesuffix(".weight") for name in tied | last})
    return [*skip, *(model._keep_in_fp32_modules or ())]


def read_directly(model: nn.Module) -> set[str]:
    """Return the names of the linears whose weight a module's code reads directly."""
    found = set()
    for path, module in model.named_modules():
        for name in weights_read(module):
            whole = f"{path}.{name}".lstrip(".")
            if isinstance(module.get_submodule(name), LINEARS):
                found.add(whole)
    return found


def weights_read(module: nn.Module) -> Iterator[str]:
    """Yield the paths of a module's submodules whose weight its methods read."""
    for function in methods(type(module)):
        for node in live(function, module):
            parts = dotted(node)
            if len(parts) < 3 or parts[-1] != "weight":
                continue
            path = parts[1:-1]
            if parts[0] == "self" and has(module, path):
                yield ".".join(path)
            elif parts[0] != "self" and len(path) > 1:  # the variable of a loop over layers
                yield from (name for name, _ in module.named_modules() if name.endswith(f".{'.'.join(path)}"))


def has(module: Any, path: list[str]) -> bool:
    """Whether a path of names leads to a submodule."""
    for name in path:
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module is not None


@cache
def methods(kind: type) -> list[ast.AST]:
    """Return the syntax trees of a class's methods and those of its bases below nn.Module, except SETUP."""
    found: dict[str, ast.AST] = {}
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # a class made at run time: its bases' methods count
            continue
        for node in getattr(tree.body[0], "body", ()):
            if isinstance(node, ast.FunctionDef) and node.name not in SETUP:
                found.setdefault(node.name, node)
    return list(found.values())


def live(node: ast.AST, module: nn.Module) -> Iterator[ast.AST]:
    """Yield a node and its descendants, without branches that the module's settings rule out and reads of `.device`."""
    yield node
    if isinstance(node, ast.Attribute) and node.attr == "device":
        return
    parts: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If):
        holds = decided(node.test, module)
        parts = [node.test, *(node.body if holds is not False else ()), *(node.orelse if holds is not True else ())]
    for part in parts:
        yield from live(part, module)


def decided(test: ast.AST, module: Any) -> bool | None:
    """Return the value of a condition on a module's own settings, or None if it is not known."""
    if isinstance(test, ast.BoolOp):
        ends = isinstance(test.op, ast.Or)  # the value of one part that decides the whole
        found = [decided(part, module) for part in test.values]
        return ends if ends in found else None if None in found else not ends
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = decided(test.operand, module)
        return None if inner is None else not inner
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in COMPARED:
        left, right = setting(test.left, module), setting(test.comparators[0], module)
        return None if not left or not right else bool(COMPARED[type(test.ops[0])](left[0], right[0]))
    value = setting(test, module)
    return bool(value[0]) if value else None


def setting(node: ast.AST, module: Any) -> tuple[Any] | None:
    """Return a constant or a module's own plain attribute, in a tuple; None for anything else."""
    if isinstance(node, ast.Constant):
        return (node.value,)
    parts = dotted(node)
    if len(parts) == 2 and parts[0] == "self" and parts[1] != "training":
        value = vars(module).get(parts[1], module)
        return (value,) if isinstance(value, (bool, int, float, str)) else None
    return None


def dotted(node: ast.AST) -> list[str]:
    """Return the names of `a.b.c`, or an empty list for another expression."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []
