"""A server of OpenAI's API for one base and its adapters: /v1/chat/completions, /v1/completions, /v1/models.

Each adapter is a model with its own name. The base's name selects the base without an adapter. `engine.py` computes
the tokens, `protocol.py` checks parameters, `guard.py` checks connections and headers before the routes.
"""

from __future__ import annotations

import asyncio
import copy
import json
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from onecard.adapter.form import NAMES, difference, form_ids
from onecard.adapter.load import with_adapter
from onecard.adapter.origin import Form, form_beside
from onecard.adapter.tokens import vocabulary_of
from onecard.config import ServeConfig
from onecard.data.chat.mask import LONGEST_TOKEN, text_ids
from onecard.errors import UserError
from onecard.hf.load import load_tokenizer
from onecard.infer.decoding import context_length
from onecard.infer.engine import Engine, GenerationRequest, TextChunk
from onecard.infer.graphs import make_context
from onecard.infer.guard import Door, Guard, TimedProtocol
from onecard.infer.protocol import ApiError, ChatRequest, CompletionRequest, Reply, parse

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
SHORT_PROMPT = 8192  # characters or tokens; another thread encodes longer prompts, so that short ones do not wait


@dataclass(frozen=True)
class Served:
    """The adapter, tokenizer and prompt form of a model's name.

    Attributes:
        adapter: the adapter's name in peft; None for the base.
        form: the form of the adapter's prompts; None if its folder does not say.
    """

    adapter: str | None
    tokenizer: Any
    form: Form | None = None


class Service:
    """The model, its names and the engine.

    Args:
        models: by the names that requests use.
    """

    def __init__(self, model: Any, models: dict[str, Served], config: ServeConfig):
        self.models, self.config = models, config
        self.vocab_sizes = {name: vocabulary_of(model, [str(served.adapter)]) for name, served in models.items()}
        length = context_length(model)
        self.max_model_len = min(config.max_model_len or length, length)
        self.engine = Engine(model, config.max_num_seqs, config.max_queued)
        # One thread for short prompts and one for long ones, each with its own tokenizers: a tokenizer is not
        # thread-safe, and the event loop must not block.
        self.encoders = {long: ThreadPoolExecutor(1) for long in (False, True)}
        self.tokenizers_for_long: dict[str, Any] = {}
        self.num_encoding = 0
        self.started = int(time.time())

    def prompt(self, request: Any, long: bool = False) -> list[int]:
        """Return the tokens of a request's messages or prompt. Runs in an encoder's thread. Raises ApiError."""
        tokenizer = self.tokenizer(request.model, long)
        try:
            self.check_length(request, tokenizer)
            if isinstance(request, ChatRequest):
                form = self.models[request.model].form
                return form_ids([message.turn() for message in request.messages], tokenizer, form)
            prompt = request.one_prompt()
            ids = text_ids(prompt, tokenizer) if isinstance(prompt, str) else prompt
        except UserError as error:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise ApiError(400, f"{error.must}; found: {error.found}", param, "invalid_value") from None
        if not ids or not all(0 <= token < self.vocab_sizes[request.model] for token in ids):
            raise ApiError(400, "a prompt must have tokens, all of the vocabulary", "prompt", "invalid_value")
        return ids

    def tokenizer(self, name: str, long: bool) -> Any:
        """Return a model's tokenizer for the thread of short or of long prompts."""
        if not long:
            return self.models[name].tokenizer
        if name not in self.tokenizers_for_long:
            self.tokenizers_for_long[name] = copy.deepcopy(self.models[name].tokenizer)
        return self.tokenizers_for_long[name]

    def check_length(self, request: Any, tokenizer: Any) -> None:
        """Raise ApiError if a text's beginning alone exceeds the model's context. The rest is not encoded.

        The beginning doubles until it is the whole text. At the cut, a few tokens may differ.
        """
        text, size = request.text(), 4 * self.max_model_len
        while size < len(text):
            num_tokens = len(text_ids(text[:size], tokenizer))
            if num_tokens > self.max_model_len + LONGEST_TOKEN:
                raise self.too_long(request, f"more than {self.max_model_len} in the prompt")
            size *= 2

    def too_long(self, request: Any, found: str) -> ApiError:
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        message = f"this model's context is {self.max_model_len} tokens; found {found}"
        return ApiError(400, message, param, "context_length_exceeded")

    def max_new_tokens(self, request: Any, num_prompt_tokens: int) -> int:
        """Return the requested number of tokens, or the default. Raises ApiError if there is no room for it."""
        chat = isinstance(request, ChatRequest)
        asked = (request.max_completion_tokens if chat else None) or request.max_tokens
        room = self.max_model_len - num_prompt_tokens
        most = asked if asked is not None else room if chat else COMPLETION_TOKENS
        if room < max(1, most):
            raise self.too_long(request, f"{num_prompt_tokens} in the prompt and {max(1, most)} for the answer")
        return most

    async def submit(self, request: Any) -> tuple[GenerationRequest, asyncio.Queue[TextChunk], Reply]:
        """Queue a request. Return its work, the queue of its chunks, and its reply. Raises ApiError."""
        if request.model not in self.models:
            names = ", ".join(self.models)
            raise ApiError(404, f"no model {request.model[:80]!r}; there are: {names}", "model", "model_not_found")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        ids = await self.encoded(request)
        num_tokens = self.max_new_tokens(request, len(ids))

        def emit(piece: TextChunk) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        served = self.models[request.model]
        chat = isinstance(request, ChatRequest)
        ends = served.form.end_tokens if served.form else ()
        how = (request.sampling(), served.adapter, served.tokenizer)
        work = GenerationRequest(ids, num_tokens, *how, emit, goes_on=not chat, ends=ends)
        if not self.engine.submit(work):
            raise overloaded()
        usage = request.stream_options.include_usage
        return work, pieces, Reply(chat, request.model, len(ids), usage)

    async def encoded(self, request: Any) -> list[int]:
        """Encode a request's prompt in a thread. Raises ApiError, also if too many requests wait."""
        if self.num_encoding >= self.config.max_num_seqs + self.config.max_queued:
            raise overloaded()
        long = request.size() > SHORT_PROMPT
        self.num_encoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.encoders[long], self.prompt, request, long)
        finally:
            self.num_encoding -= 1

    async def answer(self, request: Any) -> Response:
        work, pieces, reply = await self.submit(request)
        if request.stream:
            return Events(work, events(pieces, reply))
        said = []
        try:
            while True:
                piece = await pieces.get()
                said.append(piece.text)
                if piece.error:
                    raise ApiError(500, piece.error, code="failed")
                if piece.finish_reason:
                    return JSONResponse(reply.whole("".join(said), piece.num_tokens, piece.finish_reason))
        finally:
            work.cancelled = True

    def close(self) -> None:
        self.engine.close()
        for encoder in self.encoders.values():
            encoder.shutdown(cancel_futures=True)

    def listed(self, name: str) -> dict[str, Any]:
        if name not in self.models:
            raise ApiError(404, f"no model {name[:80]!r}", "model", "model_not_found")
        return {"id": name, "object": "model", "created": self.started, "owned_by": "onecard"}


def overloaded() -> ApiError:
    return ApiError(503, "too many requests wait", code="overloaded")


async def events(pieces: asyncio.Queue[TextChunk], reply: Reply) -> AsyncIterator[str]:
    """Yield the data of each server-sent event."""
    if reply.chat:
        yield json.dumps(reply.chunk("", first=True))
    while True:
        piece = await pieces.get()
        if piece.error:
            yield json.dumps(ApiError(500, piece.error, code="failed").body)
            return
        if piece.text:
            yield json.dumps(reply.chunk(piece.text))
        if piece.finish_reason:
            break
    yield json.dumps(reply.chunk("", piece.finish_reason))
    if reply.include_usage:
        yield json.dumps(reply.event([], reply.usage(piece.num_tokens)))
    yield "[DONE]"


class Events(Response):
    """A response of server-sent events. The work is cancelled when they end, also by an error."""

    def __init__(self, work: GenerationRequest, data: AsyncIterator[str]):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.work, self.data = work, data

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self.data:
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.work.cancelled = True


def make_app(service: Service) -> FastAPI:
    """Create the app with its routes. FastAPI's own pages are off, since they load scripts from other hosts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="onecard", lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, config=service.config)

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

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.answer(parse(ChatRequest, await request.body()))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await service.answer(parse(CompletionRequest, await request.body()))

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


def serve(model: Any, checkpoint: str, folders: dict[str, str | None], config: ServeConfig) -> None:
    """Load the adapters, bind the address, print it, and run the server until Ctrl-C.

    Args:
        checkpoint: the base's folder or hub id.
        folders: the result of `name_models`.

    Raises:
        UserError: the address is not free; same as `with_adapter`.
    """
    models: dict[str, Served] = {}
    for i, (name, folder) in enumerate(folders.items()):
        own = None if folder is None else f"adapter_{i}"  # peft allows no dots in names
        form = form_beside(folder)
        models[name] = Served(own, load_tokenizer(checkpoint, folder), form)
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
    print(f"serving  {', '.join(models)}\nbase_url http://{host}:{port}/v1  (Ctrl-C ends)", flush=True)
    make_server(model, models, config).run(sockets=[door])
