"""Runs whose operations have a fixed order of additions: the same command gives the same bits again.

On a CPU the kernels have a fixed order in any case. On a GPU some of torch's have not: the backward of attention adds
its partial sums in the order in which they are ready. torch's own switch selects fixed forms, and refuses operations
without one. cuBLAS needs workspaces of a fixed size (https://docs.pytorch.org/docs/stable/notes/randomness.html).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from onecard.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")  # the values with which cuBLAS is deterministic; the first is the faster one
WITHOUT_A_FORM = "does not have a deterministic implementation"


@contextmanager
def deterministic(wanted: bool, device: str) -> Iterator[None]:
    """If `wanted`, let torch compute the body with deterministic algorithms only, and restore its settings after it.

    The environment keeps the workspace of cuBLAS, which reads it once a process.

    Args:
        device: as of TrainConfig.

    Raises:
        UserError: cuBLAS has been set or started otherwise; an operation without a deterministic form.
    """
    if not wanted:
        yield
        return
    if device != "cpu" and torch.cuda.is_available():
        fix_workspace()
    memory: Any = torch.utils.deterministic  # a module with a property, which type checkers do not see
    mode, fills = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms(True), without its import of a compiler
    memory.fill_uninitialized_memory = False  # new memory is written before it is read
    try:
        yield
    except RuntimeError as error:
        if WITHOUT_A_FORM not in str(error):
            raise
        must, found = "each operation of a deterministic run must have a deterministic form", str(error)
        found = found.partition(WITHOUT_A_FORM)[0] + "has none in torch"
        raise UserError(must, found, "leave deterministic out", "deterministic") from None
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fills


def fix_workspace() -> None:
    """Set cuBLAS's workspaces in the environment. Raises UserError if they have another size, or it is too late."""
    found = os.environ.get(WORKSPACE)
    if found in FIXED:
        return
    must = f"a deterministic run must have {WORKSPACE} {' or '.join(FIXED)} before CUDA starts"
    do = f"set {WORKSPACE}={FIXED[0]} in the environment of the process"
    if found is not None:
        raise UserError(must, found, do, WORKSPACE)
    if torch.cuda.is_initialized():
        raise UserError(must, "none, and CUDA has started", do, WORKSPACE)
    os.environ[WORKSPACE] = FIXED[0]
