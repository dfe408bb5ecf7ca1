"""Make a package callable: `onecard.train(config)` works in addition to `onecard.train.loop`.

Python binds an imported submodule to its name in the parent package. So the first import of the package onecard/train
would replace a function `train` in onecard/__init__.py. But a module's class can be changed (the language reference,
"Customizing module attribute access") to one that has `__call__`.
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
    """Make the package `name` callable."""
    sys.modules[name].__class__ = CallablePackage
