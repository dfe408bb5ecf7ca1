"""The stream of changes: server-sent events that tell every open page the state of all runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

SECONDS_BETWEEN_LOOKS, SECONDS_ALIVE = 1.0, 15.0


class Board:
    """The state that all open pages show. It is looked up once a second for all, while a page is open."""

    def __init__(self, look: Callable[[], dict[str, Any]]):
        self.look = look
        self.text, self.readers = "", 0
        self.changed = asyncio.Condition()
        self.watcher: asyncio.Task[None] | None = None

    async def refresh(self) -> str:
        """Look once, and wake the readers if something has changed."""
        text = json.dumps(await asyncio.to_thread(self.look))
        if text != self.text:
            async with self.changed:
                self.text = text
                self.changed.notify_all()
        return text

    async def watch(self) -> None:
        while self.readers:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            await self.refresh()

    async def events(self) -> AsyncIterator[bytes]:
        """Yield server-sent events: the state now, and at each change; a comment if nothing changes."""
        self.readers += 1
        try:
            if self.watcher is None or self.watcher.done():
                self.watcher = asyncio.create_task(self.watch())
            sent = await self.refresh()
            yield f"data: {sent}\n\n".encode()
            while True:
                try:
                    async with asyncio.timeout(SECONDS_ALIVE), self.changed:
                        await self.changed.wait_for(lambda last=sent: self.text != last)
                    sent = self.text
                    yield f"data: {sent}\n\n".encode()
                except TimeoutError:
                    yield b": alive\n\n"
        finally:
            self.readers -= 1


class Stream(Response):
    """A response of server-sent events."""

    def __init__(self, chunks: AsyncIterator[bytes]):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
