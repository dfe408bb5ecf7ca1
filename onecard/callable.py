"""A package that is also a function: `onecard.train(config)` beside `onecard.train.loop`.

Python puts an imported submodule into its parent under its own name. So a function `train` in onecard/__init__.py would
be replaced by the package onecard/train on its first import. A module may have a class of its own instead (the
language reference, "Customizing module attribute access"), and a class may have `__call__`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """onecard.NAME(...) calls the function NAME of onecard.api."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return function(self)(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:  # editors show it
        return signature(function(self))


def function(package: ModuleType) -> Any:
    return getattr(import_module("onecard.api"), package.__name__.rpartition(".")[2])


def make_callable(name: str) -> None:
    """Let the package `name` be called."""
    sys.modules[name].__class__ = CallablePackage
