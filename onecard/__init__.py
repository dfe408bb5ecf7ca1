"""onecard: fine-tune language models up to the 100-billion class on one card."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onecard.errors import UserError as UserError
    from onecard.hf.load import load_model as load_model
    from onecard.hf.quantizer import BitsAndBytesConfig as BitsAndBytesConfig
    from onecard.kernels.ops import dequantize_4bit as dequantize_4bit
    from onecard.kernels.ops import quantize_4bit as quantize_4bit
    from onecard.memory.plan import plan as plan
    from onecard.quant.state import QuantState as QuantState

_HOMES = {
    "BitsAndBytesConfig": "onecard.hf.quantizer",
    "QuantState": "onecard.quant.state",
    "UserError": "onecard.errors",
    "dequantize_4bit": "onecard.kernels.ops",
    "load_model": "onecard.hf.load",
    "plan": "onecard.memory.plan",
    "quantize_4bit": "onecard.kernels.ops",
}
__all__ = ["BitsAndBytesConfig", "QuantState", "UserError", "dequantize_4bit", "load_model", "plan", "quantize_4bit"]


def __getattr__(name: str) -> Any:
    # torch, transformers and peft load when a name is used: `onecard --help` needs none of them.
    if name not in _HOMES:
        raise AttributeError(f"module onecard has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
