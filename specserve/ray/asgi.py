"""What Ray's own HTTP proxies bring, handed on to the server in the same process: `serve run` and Ray services in
Kubernetes have their address there.

The proxies speak ASGI, the server does not; so a request goes on over the loopback, as it is, and its answer comes back
in the pieces that it comes in. A client that leaves closes that connection, which ends its sequences.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import aiohttp
from yarl import URL

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
OF_ONE_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade"}
HAVE_BODY = {b"content-length", b"transfer-encoding"}


class Forwarder:
    """An ASGI application; `url` gives the server's address, and waits for it."""

    def __init__(self, url: Callable[[], Awaitable[str]]):
        self._url = url
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        if self._session is not None:
            await self._session.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        sent_all = asyncio.Event()
        answering = asyncio.ensure_future(self._forward(scope, _body(scope, receive, sent_all), send))
        leaving = asyncio.ensure_future(_left(receive, sent_all))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _forward(self, scope: dict[str, Any], body: AsyncGenerator[bytes] | None, send: Send) -> None:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None), skip_auto_headers=("User-Agent",)
            )
        query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
        path = scope["raw_path"].decode("latin-1") if scope.get("raw_path") else scope["path"]
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"] if k not in OF_ONE_HOP]
        async with self._session.request(
            scope["method"],
            URL(f"{await self._url()}{path}{query}", encoded=True),
            headers=headers,
            data=body,
            allow_redirects=False,
        ) as response:
            kept = [(k.lower(), v) for k, v in response.raw_headers if k.lower() not in OF_ONE_HOP]
            await send({"type": "http.response.start", "status": response.status, "headers": kept})
            async for piece in response.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(scope: dict[str, Any], receive: Receive, sent_all: asyncio.Event) -> AsyncGenerator[bytes] | None:
    """The request's, in pieces; None where it has none."""
    if not any(name in HAVE_BODY for name, _ in scope["headers"]):
        sent_all.set()
        return None

    async def pieces() -> AsyncGenerator[bytes]:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client left while it was sending")
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body"):
                sent_all.set()
                return

    return pieces()


async def _left(receive: Receive, sent_all: asyncio.Event) -> None:
    """Until the client leaves, of whom nothing else is expected once it has sent all."""
    await sent_all.wait()
    while (await receive())["type"] != "http.disconnect":
        pass
