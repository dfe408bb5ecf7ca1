"""Settings of `onecard studio`."""

from __future__ import annotations

from pydantic import Field

from onecard.config.infer import ServeConfig


class StudioConfig(ServeConfig):
    """The page: its server, and the folder of the runs."""

    port: int = Field(default=8010, ge=0, le=65535, description="TCP port")
    root: str = Field(default=".", description="folder under which runs are found, and under which new ones begin")
