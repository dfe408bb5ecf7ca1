"""A server of OpenAI's API for one base and its adapters: /v1/chat/completions, /v1/completions, /v1/responses and
/v1/models, and of /health and /metrics.

Each adapter is a model with its own name. The base's name selects the base without an adapter. `service.py` turns
requests into work, `engine.py` computes the tokens, `protocol.py` checks parameters, `replies.py` builds the answers'
JSON, and `guard.py` checks connections and headers before the routes.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from onecard.adapter.form import NAMES, difference
from onecard.adapter.load import with_adapter
from onecard.adapter.origin import form_beside
from onecard.config import ServeConfig
from onecard.errors import UserError
from onecard.hf.load import load_tokenizer
from onecard.infer.engine import GenerationRequest
from onecard.infer.graphs import make_context
from onecard.infer.guard import Door, Guard, TimedProtocol
from onecard.infer.metrics import Counted
from onecard.infer.protocol import ApiError, ChatRequest, CompletionRequest, parse
from onecard.infer.replies import Reply
from onecard.infer.responses import ResponsesReply, ResponsesRequest
from onecard.infer.service import Numbered, Served, Service
from onecard.infer.tools import format_of


def cancel(works: list[GenerationRequest]) -> None:
    for work in works:
        work.cancelled = True


async def events(pieces: AsyncIterator[Numbered], reply: Any) -> AsyncIterator[Any]:
    """Yield the data of each server-sent event."""
    for data in reply.begin():
        yield data
    async for choice, piece in pieces:
        if piece.error:
            yield ApiError(500, piece.error, code="failed").body
            return
        for data in reply.add(choice, piece):
            yield data
        if reply.complete:
            break
    for data in reply.end():
        yield data


async def answer(service: Service, request: Any, reply_of: Any = None) -> Response:
    """Answer a request.

    Args:
        reply_of: makes the reply from the request, the number of the prompt's tokens and what finds calls.
    """
    works, pieces, tools = await service.submit(request)
    reply = (reply_of or Reply)(request, len(works[0].input_ids), tools)
    chunks = service.measured(pieces, works)
    if request.stream:
        return Events(works, events(chunks, reply))
    try:
        async for choice, piece in chunks:
            if piece.error:
                raise ApiError(500, piece.error, code="failed")
            list(reply.add(choice, piece))
            if reply.complete:
                break
        return JSONResponse(reply.whole())
    finally:
        cancel(works)


class Events(Response):
    """A response of server-sent events. The work is cancelled when they end, also by an error."""

    def __init__(self, works: list[GenerationRequest], data: AsyncIterator[Any]):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.works, self.data = works, data

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self.data:
                await send({"type": "http.response.body", "body": event_bytes(data), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            cancel(self.works)


def event_bytes(data: Any) -> bytes:
    """Return an event as it is sent. An object of the responses API names its type."""
    text = data if isinstance(data, str) else json.dumps(data)
    kind = data.get("type") if isinstance(data, dict) else None
    return (f"event: {kind}\n" if kind else "").encode() + f"data: {text}\n\n".encode()


def make_app(service: Service) -> FastAPI:
    """Create the app with its routes. FastAPI's own pages are off, since they load scripts from other hosts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="onecard", lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, config=service.config)
    app.add_middleware(Counted, metrics=service.metrics)

    @app.exception_handler(ApiError)
    async def failed(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, error: Any) -> JSONResponse:
        missing = ApiError(error.status_code, f"{request.method} {request.url.path} is not served", code="not_found")
        return JSONResponse(missing.body, missing.status)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "active": len(service.engine.active), "waiting": len(service.engine.waiting)}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [service.listed(name) for name in service.models]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        return service.listed(name)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/embeddings")
    async def embed() -> Response:
        what = "/v1/embeddings is not served: the models here predict text, and were not trained for embeddings"
        raise ApiError(404, what, code="unsupported_endpoint")

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        asked = parse(ResponsesRequest, await request.body())
        return await answer(service, asked.as_chat(), partial(ResponsesReply, asked))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(service, parse(ChatRequest, await request.body()))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(service, parse(CompletionRequest, await request.body()))

    return app


def make_server(model: Any, models: dict[str, Served], config: ServeConfig) -> uvicorn.Server:
    app = make_app(Service(model, models, config))
    most = config.max_num_seqs + config.max_queued  # requests that are active or wait
    http: Any = partial(TimedProtocol, seconds=config.client_timeout_seconds, door=Door(2 * most))
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_level="warning",
        limit_concurrency=4 * most,
        timeout_graceful_shutdown=5,  # running answers may end in this time; then they are cancelled
        ws="none",
        http=http,
    )
    return uvicorn.Server(settings)


def name_models(model: str, adapters: list[str]) -> dict[str, str | None]:
    """Return the folders by the models' names in requests; the base's folder is None.

    Args:
        model: the checkpoint's folder or hub id; a folder's last part is its name.
        adapters: FOLDER, whose last part is its name, or NAME=FOLDER.

    Raises:
        UserError: a name occurs twice.
    """
    folders: dict[str, str | None] = {Path(model).resolve().name if Path(model).exists() else model: None}
    for given in adapters:
        name, _, folder = ("", "", given) if Path(given).is_dir() or "=" not in given else given.partition("=")
        name = name or Path(folder).resolve().name
        if name in folders:
            raise UserError("each model needs a name of its own", f"{name!r} twice", "write NAME=FOLDER", "adapter")
        folders[name] = folder
    return folders


def serve(
    model: Any, checkpoint: str, folders: dict[str, str | None], config: ServeConfig, lines: list[str] | None = None
) -> None:
    """Load the adapters, bind the address, print it, and run the server until Ctrl-C.

    Args:
        checkpoint: the base's folder or hub id.
        folders: the result of `name_models`.
        lines: printed after the address.

    Raises:
        UserError: the address is not free; same as `with_adapter`.
    """
    models: dict[str, Served] = {}
    for i, (name, folder) in enumerate(folders.items()):
        own = None if folder is None else f"adapter_{i}"  # peft allows no dots in names
        form = form_beside(folder)
        tokenizer = load_tokenizer(checkpoint, folder)
        models[name] = Served(own, tokenizer, form, format_of(tokenizer))
        if models[name].tools == "text":
            print(f"note     {name}: calls of tools are returned as text: the template has a format of its own")
        if own is not None:
            model = with_adapter(model, folder, own)
        if note := difference(form, models[name].tokenizer):
            print(f"note     {name}: {note}")
        if form and form.prompt != "chat":
            print(f"note     {name}: trained on {NAMES[form.prompt]}: a chat request takes one message, written so")
    host = f"[{config.host}]" if ":" in config.host else config.host
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        door = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        must, do = "the server's address must be this machine's and free", "choose another --port or --host"
        raise UserError(must, error.strerror or str(error), do, f"{host}:{config.port}") from None
    make_context(model)  # an unsuitable model raises UserError before the first request
    port = door.getsockname()[1]
    told = [f"serving  {', '.join(models)}", f"base_url http://{host}:{port}/v1  (Ctrl-C ends)", *(lines or [])]
    print("\n".join(told), flush=True)
    make_server(model, models, config).run(sockets=[door])
