"""Settings of answers: sampling, and the server."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from onecard.config.strict import Strict, is_loopback, parse_bytes


class SamplingConfig(Strict):
    """Sampling of the next token. A setting without a value follows the checkpoint's generation config.

    The penalties and the bias shape the logits also at temperature 0; top_k, top_p and min_p only above it.
    """

    temperature: float | None = Field(
        default=0.0, ge=0, le=2, description="0 takes the likeliest token; none: as the checkpoint's generation config"
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="draw from the likeliest tokens that have this share together"
    )
    top_k: int | None = Field(default=None, ge=0, description="draw from so many of the likeliest tokens; 0: from all")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="draw from tokens of at least this share of the likeliest one's"
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=10, description="divides logits of tokens in prompt or answer; 1: none"
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="subtracted from a token's logit for each time that the answer has it"
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="subtracted from the logits of tokens that the answer has"
    )
    logit_bias: dict[int, float] = Field(
        default_factory=dict, description="TOKEN=BIAS: -100 to 100 is added to the logit of the token with this id"
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="default: another each time")
    stop: tuple[str, ...] = Field(
        default_factory=tuple, description="texts that end an answer; they are not part of it"
    )

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _read_bias(cls, bias: Any) -> Any:
        """Read TOKEN=BIAS of the command line."""
        if not isinstance(bias, list):
            return bias
        if wrong := [each for each in bias if not isinstance(each, str) or "=" not in each]:
            raise ValueError(f"a bias must be written TOKEN=BIAS, such as 5=-100; found {wrong[0]}")
        return dict(each.split("=", 1) for each in bias)

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[int, float]) -> dict[int, float]:
        if wrong := [f"{token}: {value}" for token, value in bias.items() if token < 0 or abs(value) > 100]:
            raise ValueError(f"a bias must be from -100 to 100, of a token's id; found {wrong[0]}")
        return bias

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("a stop text must not be empty")
        return stop


class ServeConfig(Strict):
    """A server of OpenAI's API."""

    host: str = Field(
        default="127.0.0.1", description="address to listen on; any but this machine's own needs an api_key"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port")
    api_key: str | None = Field(default=None, pattern="^[!-~]+$", description="token that requests must carry")
    allowed_hosts: list[str] = Field(
        default_factory=list, description="names in the Host header, besides this machine's own, that a proxy sends"
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="tokens of prompt and answer; default: the model's"
    )
    max_num_seqs: int = Field(default=8, ge=1, description="answers at a time; one forward pass gives a token to each")
    max_queued: int = Field(default=64, ge=1, description="requests that wait; more are refused")
    prefix_cache: str = Field(
        default="256MiB", description="memory for keys and values of earlier prompts and answers; 0B keeps none"
    )
    max_body_bytes: int = Field(default=1 << 20, ge=1024, description="bytes of the largest request")
    client_timeout_seconds: float = Field(default=60, gt=0, description="for a client that neither sends nor reads")

    @field_validator("prefix_cache")
    @classmethod
    def _check_size(cls, size: str) -> str:
        parse_bytes(size)
        return size

    @model_validator(mode="after")
    def _open_only_with_a_token(self) -> ServeConfig:
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(f"host {self.host} is reached by others: pass --api-key, or set ONECARD_API_KEY")
        return self
