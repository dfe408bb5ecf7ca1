"""Checks before the server's routes: Host header, token, body size, time. A client that disconnects ends its work.

A web page can reach a server on 127.0.0.1. It can use its own name that resolves there (DNS rebinding), which the Host
header shows, or a form, which cannot send application/json. A server that other machines can reach requires a token,
which no page knows.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections import Counter
from contextlib import suppress
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from onecard.config import ServeConfig, is_loopback
from onecard.infer.protocol import ApiError

OWN_NAMES = ("localhost", "127.0.0.1", "::1")
HEAD_SECONDS = 10  # limit for a request's head; a body has the client's whole time
HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{0,5}))?")


class Door:
    """The connections with an incomplete request. A new one replaces an old one if there are too many.

    uvicorn counts them as busy, so without this limit a few hundred of them block all other clients. The replaced one
    is the oldest of the peer that has the most of them.
    """

    def __init__(self, most: int):
        self.most = most
        self.waiting: dict[TimedProtocol, None] = {}  # the oldest first

    def wait(self, connection: TimedProtocol) -> None:
        if connection in self.waiting:
            return
        self.waiting[connection] = None
        if len(self.waiting) > self.most:
            peers = Counter(each.peer for each in self.waiting)
            crowd = max(peers, key=peers.__getitem__)
            oldest = next(each for each in self.waiting if each.peer == crowd)
            self.leave(oldest)
            oldest.transport.abort()

    def leave(self, connection: TimedProtocol) -> None:
        self.waiting.pop(connection, None)


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with a time limit for a request's head. uvicorn itself waits without a limit."""

    def __init__(self, *args: Any, seconds: float, door: Door, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seconds, self.timer, self.door = min(seconds, HEAD_SECONDS), None, door

    @property
    def peer(self) -> str | None:
        return self.client[0] if self.client else None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.take_place()
        self.time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.take_place()
        self.time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.take_place()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.stop_timer()
        self.door.leave(self)

    def take_place(self) -> None:
        """Register the connection at the door while its request is incomplete, else remove it."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing():
            self.door.wait(self)
        else:
            self.door.leave(self)

    def time_head(self) -> None:
        """Time a request's head, from the connection or its first byte until it is complete. New bytes add no time."""
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
        self.names = {own_name(name) for name in (*OWN_NAMES, config.host, *config.allowed_hosts)}

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
        """Raise ApiError for a wrong Host, a wrong token or a body that is not JSON."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        if is_loopback(self.config.host) or self.config.allowed_hosts:
            host = headers.get(b"host", b"").decode("latin-1")
            if host_name(host) not in self.names:
                raise ApiError(421, f"the Host header must name this server, found {host[:80]!r}", code="wrong_host")
        if self.config.api_key is not None and scope["path"] != "/health":
            sent = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(sent, self.config.api_key.encode()):
                raise ApiError(401, "the api key is missing or wrong", code="invalid_api_key")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            raise ApiError(415, "the body must be application/json", code="unsupported_media_type")

    async def read_body(self, scope: Any, receive: Any) -> bytes | None:
        """Read the whole body; None if the client disconnects. Raises ApiError if it is too large or too slow."""
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
        """Run the app until it is done or its client disconnects."""
        gone = asyncio.create_task(receive())  # only a disconnect can follow the body
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop() if messages else await asyncio.shield(gone)

        app = asyncio.create_task(self.app(scope, replay, send))
        try:
            await asyncio.wait({app, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            app.cancel()
            gone.cancel()
        with suppress(TimeoutError, asyncio.CancelledError):  # the client stopped reading, or disconnected
            await app


def host_name(host: str) -> str | None:
    """Return the name or address in a Host header (RFC 9110, 7.2), without the port; None if it is invalid."""
    found = HOST.fullmatch(host)
    if found is None or int(found["port"] or 0) > 65535:
        return None
    if found["name"] is not None:
        return found["name"].lower().removesuffix(".")  # the dot of the DNS root
    try:
        return str(ipaddress.IPv6Address(found["v6"]))
    except ValueError:
        return None


def own_name(name: str) -> str:
    """Normalize a name or address, same as `host_name`."""
    return host_name(name) or host_name(f"[{name}]") or name.lower()
