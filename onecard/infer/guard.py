"""What stands before the server's routes: Host, token, body size, time; a client that is gone ends its work.

A web page can reach a server on 127.0.0.1: by a name of its own that resolves there (DNS rebinding), which the Host
header shows, or by a form, which cannot be application/json. A server that others can reach asks each of them for
a token, which no page knows.
"""

from __future__ import annotations

import asyncio
import hmac
from contextlib import suppress
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from onecard.config import ServeConfig, is_loopback
from onecard.infer.protocol import ApiError

OWN_NAMES = ("localhost", "127.0.0.1", "::1")


class TimedProtocol(H11Protocol):
    """uvicorn's, which by itself waits for a request's head without end, and counts such connections as busy ones."""

    def __init__(self, *args: Any, seconds: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seconds, self.timer = seconds, None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.stop_timer()

    def time_head(self) -> None:
        """The time runs from the first byte of a head, or the connection, to the whole head, however many come."""
        if self.conn.their_state is not h11.IDLE:
            self.stop_timer()
        elif self.timer is None:
            self.timer = self.loop.call_later(self.seconds, self.timeout_keep_alive_handler)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: Any, config: ServeConfig):
        self.app, self.config = app, config
        self.timeout = config.client_timeout_seconds
        self.names = {name.lower() for name in (*OWN_NAMES, config.host, *config.allowed_hosts)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def timed_send(message: Any) -> None:
            async with asyncio.timeout(self.timeout):
                await send(message)

        try:
            self.check_headers(scope)
            body = await self.read_body(scope, receive)
        except ApiError as error:
            return await JSONResponse(error.body, error.status)(scope, receive, timed_send)
        if body is not None:
            await self.run(scope, body, receive, timed_send)

    def check_headers(self, scope: Any) -> None:
        """Raise ApiError for a strange Host, a wrong token or a body that is not JSON."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        if is_loopback(self.config.host) or self.config.allowed_hosts:
            name = host_name(headers.get(b"host", b"").decode("latin-1"))
            if name not in self.names:
                raise ApiError(421, f"the Host header must name this server, found {name[:80]!r}", code="wrong_host")
        if self.config.api_key is not None and scope["path"] != "/health":
            sent = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(sent, self.config.api_key.encode()):
                raise ApiError(401, "the api key is missing or wrong", code="invalid_api_key")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            raise ApiError(415, "the body must be application/json", code="unsupported_media_type")

    async def read_body(self, scope: Any, receive: Any) -> bytes | None:
        """The whole body, None from a client that went away. Raises ApiError if it is too large or too slow."""
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.config.max_body_bytes:
                        limit = self.config.max_body_bytes
                        raise ApiError(413, f"a request may have {limit:,} bytes", code="request_too_large")
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time", code="timeout") from None
        return bytes(body)

    async def run(self, scope: Any, body: bytes, receive: Any, send: Any) -> None:
        """The app, until it is done or its client gone."""
        gone = asyncio.create_task(receive())  # nothing but a disconnect comes after the body
        told = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return told.pop() if told else await asyncio.shield(gone)

        app = asyncio.create_task(self.app(scope, replay, send))
        try:
            await asyncio.wait({app, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            app.cancel()
            gone.cancel()
        with suppress(TimeoutError, asyncio.CancelledError):  # a reader that stopped reading; a client that is gone
            await app


def host_name(host: str) -> str:
    """The name or address in a Host header, its port and brackets left out."""
    name = host[: host.rindex("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
    return name.strip("[]").lower()
