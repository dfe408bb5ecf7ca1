"""The models of the chat: a base and adapters, loaded into the page's process and served as `onecard serve` does."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from onecard.adapter.load import with_adapter
from onecard.adapter.origin import form_beside
from onecard.config import StudioConfig
from onecard.errors import UserError, first_line
from onecard.hf.load import load_tokenizer
from onecard.infer.graphs import make_context
from onecard.infer.server import make_app, name_models
from onecard.infer.service import Served, Service
from onecard.memory.measure import return_free_memory
from onecard.terminal import load_base


class Talk:
    """The loaded models, and an ASGI app that passes requests to them."""

    def __init__(self, config: StudioConfig):
        self.config = config
        self.service: Service | None = None
        self.app: Any = None
        self.state: dict[str, Any] = {"state": "empty", "models": []}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.app is None:
            body = {"error": {"message": "no model is loaded", "type": "invalid_request_error", "code": "no_model"}}
            return await JSONResponse(body, 409)(scope, receive, send)
        await self.app(scope, receive, send)

    async def load(self, model: str, adapters: list[str]) -> None:
        """Load a base with adapters in place of those before. Raises UserError, same as `onecard serve`."""
        if self.state["state"] == "loading":
            raise UserError("one model loads at a time", "another one loads", "wait for it", "chat")
        folders = name_models(model, adapters)
        self.state = {"state": "loading", "models": list(folders), "base": model}
        try:
            await self.unload()
            self.service = await asyncio.to_thread(load_service, model, folders, self.config)
        except BaseException as error:
            message = str(error) if isinstance(error, UserError) else first_line(error)
            self.state = {"state": "failed", "models": [], "message": message}
            raise
        self.app = make_app(self.service)
        self.state = {"state": "ready", "models": list(folders), "base": model}

    async def unload(self) -> None:
        """Drop the models, and return their memory."""
        service, self.service, self.app = self.service, None, None
        if service is not None:
            await asyncio.to_thread(service.close)
            del service
            gc.collect()
            return_free_memory()


def load_service(model: str, folders: dict[str, str | None], config: StudioConfig) -> Service:
    """Load the base and the adapters. Raises UserError, same as `load_base` and `with_adapter`."""
    for folder in filter(None, (model if Path(model).is_absolute() else None, *folders.values())):
        if not Path(folder).exists():
            raise UserError("the folder must exist", "no such folder", "choose another one", folder)
    loaded = load_base(model, next(filter(None, folders.values()), None), None, "auto")
    models = {}
    for i, (name, folder) in enumerate(folders.items()):
        own = None if folder is None else f"adapter_{i}"  # peft allows no dots in names
        models[name] = Served(own, load_tokenizer(model, folder), form_beside(folder))
        if own is not None:
            loaded = with_adapter(loaded, folder, own)
    make_context(loaded)  # an unsuitable model raises UserError before the first request
    return Service(loaded, models, config)
