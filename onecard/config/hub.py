"""Settings of the upload to the hub, with transformers' names."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from onecard.config.strict import Strict

NAME = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w])?"  # of an account or a repository


class HubSettings(Strict):
    """Upload of the adapter to the hub."""

    push_to_hub: bool = Field(default=False, description="upload the adapter and its model card after the training")
    hub_model_id: str | None = Field(
        default=None, description="repository, such as me/my-adapter; default: the output folder's name, of the account"
    )
    hub_private_repo: bool | None = Field(
        default=None, description="whether a new repository is private; default: as the account has it"
    )

    @field_validator("hub_model_id")
    @classmethod
    def _a_repository(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(rf"({NAME}/)?{NAME}", value):
            raise ValueError("must be NAME or ACCOUNT/NAME, of letters, digits, - _ and .")
        return value

    @model_validator(mode="after")
    def _only_with_an_upload(self) -> HubSettings:
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private_repo is not None):
            raise ValueError("hub_model_id and hub_private_repo need push_to_hub")
        return self
