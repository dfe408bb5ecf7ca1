"""Settings of answers: sampling, and the server."""

from __future__ import annotations

from pydantic import Field, model_validator

from onecard.config.strict import Strict, is_loopback


class SamplingConfig(Strict):
    """Sampling of the next token."""

    temperature: float | None = Field(
        default=0.0, ge=0, le=2, description="0 takes the likeliest token; none: as the checkpoint's generation config"
    )
    top_p: float | None = Field(default=None, gt=0, le=1, description="default: the checkpoint's generation config")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="default: another each time")
    stop: tuple[str, ...] = Field(default=(), description="texts that end an answer; they are not part of it")


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
    max_num_seqs: int = Field(default=8, ge=1, description="requests answered at a time, a token each in turn")
    max_queued: int = Field(default=64, ge=1, description="requests that wait; more are refused")
    max_body_bytes: int = Field(default=1 << 20, ge=1024, description="bytes of the largest request")
    client_timeout_seconds: float = Field(default=60, gt=0, description="for a client that neither sends nor reads")

    @model_validator(mode="after")
    def _open_only_with_a_token(self) -> ServeConfig:
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(f"host {self.host} is reached by others: pass --api-key, or set ONECARD_API_KEY")
        return self
