"""Settings of the LoRA adapter, with the fields of peft's LoraConfig."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from onecard.config.strict import Strict
from onecard.patterns import check_syntax, first_match

PISSA = re.compile(r"pissa(_niter_[1-9]\d*)?")
FROM_WEIGHT = ("pissa", "olora")  # starts that are made from the base's weights
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Layers = Annotated[
    list[Annotated[int, Field(ge=0)]], BeforeValidator(lambda value: [value] if isinstance(value, int) else value)
]


def split_tokens(value: Any) -> Any:
    """Return the tokens of a text with commas, or of a list of such texts."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        return value
    return [token.strip() for text in value for token in text.split(",")]


def check_tokens(value: list[str]) -> list[str]:
    """Raise ValueError for an empty token, one with white space, one that is listed twice, and a file beside tokens."""
    if not value or not all(value):
        raise ValueError("must list tokens that are not empty")
    if bad := [text for text in value if not text.endswith(".txt") and any(char.isspace() for char in text)]:
        raise ValueError(f"must be tokens without white space, not {bad[0]!r}")
    if len(set(value)) < len(value):
        raise ValueError(f"must list each token once, not {max(value, key=value.count)!r} again")
    if len(value) > 1 and any(text.endswith(".txt") for text in value):
        raise ValueError("must be tokens, or one .txt file alone")
    return value


Tokens = Annotated[list[str], BeforeValidator(split_tokens), AfterValidator(check_tokens)]


TrainFor = Literal["q4_0", "gptq", "nvfp4", "nf4"]


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
    exclude_modules: list[str] | str | None = Field(
        default=None, description="names of modules, or a pattern, that get no LoRA though target_modules match"
    )
    layers_to_transform: Layers | None = Field(
        default=None, description="numbers of the layers that get LoRA; default: all"
    )
    layers_pattern: Names | None = Field(
        default=None, description="name of the list of layers that layers_to_transform counts, such as layers"
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="r of the modules that a name or pattern matches: '{\"q_proj\": 8}'"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="lora_alpha of the modules that a name or pattern matches"
    )
    lora_bias: bool = Field(default=False, description="learn a bias of lora_B, for linears that have a bias")
    use_rslora: bool = Field(default=False, description="scale by lora_alpha/sqrt(r) (arXiv 2312.03732)")
    use_dora: bool = Field(default=False, description="learn magnitude and direction apart (arXiv 2402.09353)")
    init_lora_weights: str = Field(
        default="default",
        description="start of LoRA: default, gaussian, orthogonal, pissa, pissa_niter_N, olora; "
        "loftq: corrects what the 4 bits leave (arXiv 2310.08659)",
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="modules trained in full and saved with the adapter"
    )
    train_for: TrainFor | None = Field(
        default=None,
        description="format of the file that will be served: each linear computes with its merged weight rounded to "
        "it, so that the file keeps what is learned",
    )

    add_tokens: Tokens | None = Field(
        default=None,
        description="tokens that the tokenizer and the model get, such as '<think>,</think>', or a .txt file of one "
        "a line; their rows of embedding and head are trained",
    )
    add_special_tokens: Tokens | None = Field(
        default=None,
        description="same, for control tokens, such as '<|im_start|>': text of a message never becomes one",
    )

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _names_or_pattern(cls, value: list[str] | str | None) -> list[str] | str | None:
        if value is None:
            return None
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
        if self.target_parameters and (self.lora_dropout > 0 or self.use_dora or self.lora_bias):
            raise ValueError("target_parameters take no lora_dropout, no use_dora and no lora_bias, as in peft")
        return self

    @model_validator(mode="after")
    def _weights_that_a_file_has(self) -> LoraSettings:
        if self.train_for and (self.lora_dropout > 0 or self.use_dora or self.target_parameters):
            raise ValueError("train_for takes no lora_dropout, no use_dora and no target_parameters: a linear computes "
                             "with W + s B A, rounded")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _patterns(self) -> LoraSettings:
        check_syntax([*self.rank_pattern, *self.alpha_pattern, *(self.layers_pattern or ())])
        return self

    @model_validator(mode="after")
    def _layers_of_named_modules(self) -> LoraSettings:
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, as in peft")
        is_pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if self.layers_to_transform is not None and is_pattern:
            raise ValueError("layers_to_transform needs names in target_modules, not a pattern, as in peft")
        if self.layers_to_transform is not None and self.target_parameters:
            raise ValueError("layers_to_transform does not limit target_parameters, as in peft: leave one out")
        return self

    @model_validator(mode="after")
    def _bias_beside_plain_lora(self) -> LoraSettings:
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias and use_dora do not go together, as in peft")
        return self

    @field_validator("init_lora_weights")
    @classmethod
    def _a_known_start(cls, value: str) -> str:
        known = ("default", "gaussian", "orthogonal", "olora", "loftq")
        if value == "eva":
            raise ValueError("eva is not offered: its passes over the data have no place in the memory plan; use pissa")
        if value not in known and not PISSA.fullmatch(value):
            raise ValueError(f"must be {', '.join(known)}, pissa or pissa_niter_N, not {value!r}")
        return value

    @model_validator(mode="after")
    def _a_start_that_fits(self) -> LoraSettings:
        start, ranks = self.init_lora_weights, [self.r, *self.rank_pattern.values()]
        if start.startswith(FROM_WEIGHT) and (self.use_dora or self.lora_dropout > 0):
            raise ValueError(f"init_lora_weights {start} takes no use_dora and no lora_dropout: the start must cancel")
        if start not in ("default", "gaussian") and self.target_parameters:
            raise ValueError(f"init_lora_weights {start} is for linears: leave target_parameters out")
        if start == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ValueError("init_lora_weights orthogonal needs an even rank, as in peft")
        return self

    @property
    def adds_tokens(self) -> bool:
        return bool(self.add_tokens or self.add_special_tokens)

    @property
    def has_frozen_start(self) -> bool:
        """Whether the start stays beside the adapter, so that the base is as it was (adapter/layers.py)."""
        return self.init_lora_weights.startswith(FROM_WEIGHT)

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's LoRA."""
        return first_match(self.rank_pattern, module, self.r)
