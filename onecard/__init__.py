"""onecard: fine-tune language models up to the 100-billion class on one card."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onecard.api import export as export
    from onecard.api import merge as merge
    from onecard.api import train as train
    from onecard.config import ExportConfig as ExportConfig
    from onecard.config import TrainConfig as TrainConfig
    from onecard.errors import UserError as UserError
    from onecard.hf.load import load_model as load_model
    from onecard.hf.quantizer import BitsAndBytesConfig as BitsAndBytesConfig
    from onecard.kernels.ops import dequantize_4bit as dequantize_4bit
    from onecard.kernels.ops import quantize_4bit as quantize_4bit
    from onecard.memory.plan import plan as plan
    from onecard.quant.state import QuantState as QuantState

_HOMES = {
    "BitsAndBytesConfig": "onecard.hf.quantizer",
    "ExportConfig": "onecard.config",
    "QuantState": "onecard.quant.state",
    "TrainConfig": "onecard.config",
    "UserError": "onecard.errors",
    "dequantize_4bit": "onecard.kernels.ops",
    "load_model": "onecard.hf.load",
    "merge": "onecard.api",
    "plan": "onecard.memory.plan",
    "quantize_4bit": "onecard.kernels.ops",
}
_CALLABLE_PACKAGES = ("export", "train")  # onecard/callable.py
__all__ = [
    "BitsAndBytesConfig",
    "ExportConfig",
    "QuantState",
    "TrainConfig",
    "UserError",
    "dequantize_4bit",
    "export",
    "load_model",
    "merge",
    "plan",
    "quantize_4bit",
    "train",
]


def __getattr__(name: str) -> Any:
    # torch, transformers and peft load when a name is used: `onecard --help` needs none of them.
    if name in _CALLABLE_PACKAGES:
        return import_module(f"onecard.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module onecard has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
