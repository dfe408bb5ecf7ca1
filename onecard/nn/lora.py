"""The LoRA layer that peft puts around a Linear4bit: plain LoRA goes through one fused operator.

Registered through LoraConfig's custom modules (see `lora_config`); DoRA and the other variants, several active
adapters and mixed batches take peft's own forward around Linear4bit.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from onecard.config import LoraSettings
from onecard.errors import UserError
from onecard.kernels import ops
from onecard.nn.linear import Linear4bit


class LoraLinear4bit(PeftLinear):
    """y = W x + s B A dropout(x) over a frozen 4-bit W; A and B are float32 masters, cast for the products."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.plain_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        x_in = x.to(base.compute_dtype or x.dtype)
        dropout = self.lora_dropout[name]
        adapter_A: Any = self.lora_A[name]
        adapter_B: Any = self.lora_B[name]
        active = self.training and not isinstance(dropout, nn.Identity)
        packed, state = base.stored()
        y = ops.qlora_linear(
            x_in,
            packed,
            state,
            base.bias,
            adapter_A.weight,
            adapter_B.weight,
            self.scaling[name],
            dropout(x_in) if active else None,
        )
        return y.to(x.dtype)

    def plain_adapter(self) -> str | None:
        """The one active plain LoRA adapter, or None where peft's own forward is needed."""
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or names[0] in self.lora_variant or self.lora_B[names[0]].bias is not None:
            return None
        return names[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UserError(
            "an adapter is merged into 16-bit weights",
            "a 4-bit base, where rounding would undo most of the update",
            "load the base in 16 bits with plain peft and merge there",
            "merge",
        )


def lora_config(settings: LoraSettings) -> LoraConfig:
    """peft's LoraConfig for these settings, with Linear4bit going to LoraLinear4bit."""
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=settings.modules_to_save,
        task_type="CAUSAL_LM",
    )
    return register_fused(config)


def register_fused(config: Any) -> Any:
    """Let a peft config put LoraLinear4bit around Linear4bit; the mapping is not stored with an adapter."""
    if isinstance(config, LoraConfig):
        config._register_custom_module({Linear4bit: LoraLinear4bit})
    return config
