"""The app, and the flags that its commands share: every field of a config is one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from onecard.config import (
    DataConfig,
    ExportConfig,
    LoadConfig,
    PlanConfig,
    QuantizeConfig,
    ReadConfig,
    SamplingConfig,
    ServeConfig,
    StoredConfig,
    StudioConfig,
    TrainConfig,
)
from onecard.terminal import partial

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

app = App(
    name="onecard",
    help="Fine-tune language models up to the 100-billion class on one card.",
    version_flags=["--version"],
)
if TYPE_CHECKING:
    TrainFields = DataFields = PlanFields = QuantFields = StoredFields = ExportFields = ServeFields = Any
    QuantizeFields = ReadFields = SamplingFields = DataWords = OptionalWords = StudioFields = Any
else:
    flags = Parameter(name="*", negative_iterable=(), consume_multiple=True)
    TrainFields = Annotated[partial(TrainConfig) | None, flags]
    DataFields = Annotated[partial(DataConfig) | None, flags]
    ReadFields = Annotated[partial(ReadConfig) | None, flags]
    DataWords = Annotated[list[str], Parameter(consume_multiple=True, negative_iterable=())]
    OptionalWords = Annotated[list[str] | None, Parameter(consume_multiple=True, negative_iterable=())]
    ServeFields = Annotated[partial(ServeConfig) | None, flags]
    SamplingFields = Annotated[partial(SamplingConfig) | None, flags]
    StudioFields = Annotated[partial(StudioConfig) | None, flags]
    QuantFields = Annotated[partial(LoadConfig) | None, flags]
    QuantizeFields = Annotated[partial(QuantizeConfig) | None, flags]
    StoredFields = Annotated[partial(StoredConfig) | None, flags]
    ExportFields = Annotated[partial(ExportConfig) | None, flags]
    PlanFields = Annotated[partial(PlanConfig) | None, flags]
