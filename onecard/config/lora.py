"""Settings of the LoRA adapter, with the fields of peft's LoraConfig."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from onecard.config.strict import Strict
from onecard.patterns import check_syntax


class LoraSettings(Strict):
    """LoRA, with the fields of peft's LoraConfig."""

    r: int = Field(default=16, ge=1, description="rank of the update")
    lora_alpha: float = Field(
        default=32, gt=0, description="scale: lora_alpha/r, or lora_alpha/sqrt(r) with use_rslora"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the inputs of LoRA that are set to 0")
    target_modules: list[str] | str = Field(
        default="all-linear", description='names of linears, a pattern, or "all-linear"'
    )
    target_parameters: list[str] | None = Field(
        default=None, description="stacked weights of experts, such as gate_up_proj and down_proj"
    )
    use_rslora: bool = Field(default=False, description="scale by lora_alpha/sqrt(r) (arXiv 2312.03732)")
    use_dora: bool = Field(default=False, description="learn magnitude and direction apart (arXiv 2402.09353)")
    modules_to_save: list[str] | None = Field(
        default=None, description="modules trained in full and saved with the adapter"
    )

    @field_validator("target_modules")
    @classmethod
    def _names_or_pattern(cls, value: list[str] | str) -> list[str] | str:
        # peft matches a list against the ends of names, and a string, as a pattern, against whole names.
        words = [word for part in ([value] if isinstance(value, str) else value) for word in part.split(",")]
        if words and all(re.fullmatch(r"[\w.]+", word) for word in words):
            return words
        pattern = value if isinstance(value, str) else "".join(value[:1])
        if not pattern or (isinstance(value, list) and len(value) > 1):
            raise ValueError('must be names like q_proj, one pattern, or "all-linear"')
        check_syntax([pattern])
        return pattern

    @model_validator(mode="after")
    def _plain_lora_on_experts(self) -> LoraSettings:
        if self.target_parameters and (self.lora_dropout > 0 or self.use_dora):
            raise ValueError("target_parameters take no lora_dropout and no use_dora, as in peft")
        return self
