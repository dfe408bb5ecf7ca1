"""The page's server: its routes and its process.

Answers to the page are JSON. A mistake is a status 400 with the three parts of a UserError. Long work is in threads.
The preview has one of its own, so that a second one waits for the first.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

from onecard.config import StudioConfig, TrainConfig, is_loopback
from onecard.errors import UserError
from onecard.hf.load import pick_device
from onecard.infer.guard import Door, TimedProtocol
from onecard.memory.measure import available_bytes, format_bytes
from onecard.studio import prepare, writing
from onecard.studio.guard import COOKIE, PageGuard
from onecard.studio.jobs import Jobs
from onecard.studio.runs import Runs, as_text, differences
from onecard.studio.stream import Board, Stream
from onecard.studio.talk import Talk
from onecard.train.folders import REPORT

STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
MOST_POINTS, MOST_RUNS = 4000, 12  # of a curve; on one chart
CONNECTIONS = 512


class Studio:
    """What the routes work on."""

    def __init__(self, config: StudioConfig):
        self.config = config
        self.root = Path(config.root).expanduser().resolve()
        if not self.root.is_dir():
            raise UserError(
                "root must be a folder", "no such folder", "make it, or choose another --root", str(self.root)
            )
        self.jobs = Jobs(self.root)
        self.runs = Runs(self.root, self.jobs)
        self.planner = prepare.Planner()
        self.talk = Talk(config)
        self.board = Board(self.state)
        self.previews, self.plans = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def state(self) -> dict[str, Any]:
        """Return what every page shows."""
        runs = self.runs.refresh()
        jobs = [writing.progress(job) for job in self.jobs.refresh() if job.kind != "train"]
        return {"runs": runs, "jobs": jobs, "is_cut": self.runs.is_cut, "chat": self.talk.state}

    def info(self) -> dict[str, Any]:
        device = pick_device("auto")
        return {
            "root": str(self.root),
            "folder": os.getcwd(),
            "device": str(device),
            "free_bytes": available_bytes(device),
            "settings": prepare.settings(),
        }

    def train(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Start a run. Raises UserError for a wrong setting, or an output folder that is not new."""
        config = prepare.check_fields(fields)
        output = Path(config.output).resolve()
        if not output.is_relative_to(self.root):
            must, do = "the output must be under the page's root, to be seen", f"choose a folder under {self.root}"
            raise UserError(must, str(output), do, "output")
        if output.is_dir() and any(output.iterdir()):
            raise UserError("the output folder must be new or empty", "it has entries", "choose another one", "output")
        words = prepare.command_of(fields)
        if words is None:
            words = ["train", "--config", str(self.runs.write_config(f"start-{os.urandom(6).hex()}", fields))]
        return {"job": self.jobs.start("train", words, Path.cwd(), output).name}

    def write(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Start a merge or an export. Raises UserError for a wrong setting."""
        words = writing.words_of(fields)
        output = Path(fields["output"]).absolute()
        return {"job": self.jobs.start(words[0], words, Path.cwd(), output).name}

    async def close(self) -> None:
        await self.talk.unload()
        for pool in (self.previews, self.plans):
            pool.shutdown(wait=False, cancel_futures=True)


async def sent(request: Request) -> dict[str, Any]:
    """Return a request's JSON object. Raises UserError for anything else."""
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError("the body must be a JSON object", "something else", "send an object", "body")
    return content


def text_of(content: dict[str, Any], name: str, default: str | None = None) -> str:
    value = content.get(name, default)
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text", repr(value)[:80], "send a text", name)
    return value


def fields_of(content: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a page sends: those of its form, and those of its YAML, which win."""
    fields, more = content.get("fields"), text_of(content, "more", "")
    if not isinstance(fields, dict):
        raise UserError("fields must be an object", repr(fields)[:80], "send the settings", "fields")
    return {**fields, **prepare.parsed(more)}


def make_page(studio: Studio) -> FastAPI:
    """Create the app with its routes. FastAPI's own pages are off, since they load scripts from other hosts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await studio.close()

    app = FastAPI(title="onecard studio", lifespan=lifespan, openapi_url=None)
    app.state.studio = studio
    app.add_middleware(PageGuard, config=studio.config)

    @app.exception_handler(UserError)
    async def failed(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse(prepare.as_dict(error), 400)

    @app.get("/")
    async def page(request: Request) -> Response:
        key = request.query_params.get("key")
        if key is None or studio.config.api_key is None:
            return FileResponse(STATIC / "index.html", headers=HEADERS)
        answer = RedirectResponse("/", 303)  # the guard has checked the key; it leaves the address
        answer.set_cookie(COOKIE, key, httponly=True, samesite="strict")
        return answer

    add_runs(app, studio)
    add_prepare(app, studio)
    app.mount("/chat", studio.talk)
    app.mount("/static", Static(directory=STATIC))
    return app


class Static(StaticFiles):
    """The page's files, with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_runs(app: FastAPI, studio: Studio) -> None:
    """Add the routes of runs and jobs."""
    runs = studio.runs

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/info")
    async def info() -> dict[str, Any]:
        return await asyncio.to_thread(studio.info)

    @app.get("/api/events")
    async def events() -> Response:
        return Stream(studio.board.events())

    @app.get("/api/curves")
    async def curves(request: Request) -> dict[str, Any]:
        names = request.query_params.getlist("run")[:MOST_RUNS]
        first, last, most = (number_in(request, name) for name in ("first", "last", "points"))
        most = min(max(most or 1000, 10), MOST_POINTS)

        return await asyncio.to_thread(runs.points, names, most, first, last)

    @app.get("/api/run")
    async def run(request: Request) -> dict[str, Any]:
        name = request.query_params.get("run", "")
        record = runs.need_record(name)
        facts = record.model_dump(include={"command", "folder", "plan", "choice", "num_processes", "config"})
        return {**facts, "path": as_text(runs.get(name).path)}

    @app.get("/api/compare")
    async def compare(request: Request) -> list[dict[str, Any]]:
        names = request.query_params.getlist("run")[:MOST_RUNS]
        return differences({name: runs.need_record(name) for name in names})

    @app.get("/api/report")
    async def report(request: Request) -> Response:
        name = request.query_params.get("run", "")
        path = runs.get(name).path / REPORT
        if not path.is_file():
            raise UserError("the run must have a report", "none yet", "wait until it has ended", name)
        return FileResponse(path, headers={**HEADERS, "content-security-policy": REPORT_POLICY})

    @app.get("/api/log")
    async def log(request: Request) -> dict[str, str]:
        return {"text": await asyncio.to_thread(studio.jobs.log, request.query_params.get("job", ""))}

    @app.post("/api/stop")
    async def stop(request: Request) -> dict[str, str]:
        name = text_of(await sent(request), "run")
        await asyncio.to_thread(runs.stop, name)
        await studio.board.refresh()
        return {"run": name}

    @app.post("/api/resume")
    async def resume(request: Request) -> dict[str, str]:
        name = text_of(await sent(request), "run")
        job = await asyncio.to_thread(runs.resume, name)
        await studio.board.refresh()
        return {"job": job.name}


def number_in(request: Request, name: str) -> int | None:
    value = request.query_params.get(name)
    try:
        return None if value in (None, "") else int(float(str(value)))
    except (ValueError, OverflowError):
        raise UserError(f"{name} must be a number", str(value)[:80], "correct it", name) from None


def add_prepare(app: FastAPI, studio: Studio) -> None:
    """Add the routes that prepare and start."""

    async def in_thread(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *args)

    @app.post("/api/files")
    async def files(request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(prepare.list_folder, text_of(await sent(request), "folder", os.getcwd()))

    @app.post("/api/preview")
    async def preview(request: Request) -> dict[str, Any]:
        return await in_thread(studio.previews, prepare.preview, fields_of(await sent(request)))

    @app.post("/api/plan")
    async def plan(request: Request) -> dict[str, Any]:
        content = await sent(request)
        memory = text_of(content, "device_memory", "") or None
        return await in_thread(
            studio.plans, studio.planner.plan, fields_of(content), memory, bool(content.get("searches"))
        )

    @app.post("/api/command")
    async def command(request: Request) -> dict[str, Any]:
        fields = fields_of(await sent(request))
        prepare.make_config(TrainConfig, {"model": "-", "data": "-", **fields}, "page")
        return prepare.written(fields)

    @app.post("/api/train")
    async def train(request: Request) -> dict[str, Any]:
        job = await asyncio.to_thread(studio.train, fields_of(await sent(request)))
        await studio.board.refresh()
        return job

    @app.post("/api/write")
    async def write(request: Request) -> dict[str, Any]:
        job = await asyncio.to_thread(studio.write, fields_of(await sent(request)))
        await studio.board.refresh()
        return job

    @app.post("/api/load")
    async def load(request: Request) -> dict[str, Any]:
        content = await sent(request)
        adapters = content.get("adapters", [])
        if not isinstance(adapters, list) or not all(isinstance(each, str) for each in adapters):
            raise UserError("adapters must be a list of folders", repr(adapters)[:80], "send a list", "adapters")
        await studio.talk.load(text_of(content, "model"), adapters)
        await studio.board.refresh()
        return studio.talk.state


def serve_page(config: StudioConfig) -> None:
    """Bind the address, print it, and serve the page until Ctrl-C. Raises UserError if the address is not free."""
    studio = Studio(config)
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        door = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        must, do = "the server's address must be this machine's and free", "choose another --port or --host"
        raise UserError(must, error.strerror or str(error), do, f"{host}:{config.port}") from None
    port = door.getsockname()[1]
    shown = "" if config.api_key is None else "?key=…  (your key in its place)"
    print(f"page     http://{host}:{port}/{shown}\nroot     {studio.root}", flush=True)
    if not is_loopback(config.host):
        print(
            "note     others reach this address: the key and all else are readable on the way without TLS", flush=True
        )
    print(f"memory   {format_bytes(available_bytes(pick_device('auto')))} free  (Ctrl-C ends; runs go on)", flush=True)
    make_server(studio).run(sockets=[door])


def make_server(studio: Studio) -> uvicorn.Server:
    config = studio.config
    http: Any = partial(TimedProtocol, seconds=config.client_timeout_seconds, door=Door(CONNECTIONS // 2))
    settings = uvicorn.Config(
        make_page(studio),
        host=config.host,
        port=config.port,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=1,
        ws="none",
        http=http,
    )
    return uvicorn.Server(settings)
