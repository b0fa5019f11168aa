"""Requests that come by ASGI reach an HTTP server as they are, and a client that leaves is left there."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from specserve.ray.asgi import Forwarder


@pytest.fixture
async def served():
    """(a forwarder, what its server saw); /slow streams until its client leaves."""
    seen = []

    async def handle(request):
        seen.append((request.method, request.path_qs, request.headers.get("Host"), await request.read()))
        return web.Response(status=418, body=b"tea", headers={"X-Kind": "green"})

    async def slow(request):
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x")
                await asyncio.sleep(0.01)
        except (asyncio.CancelledError, ConnectionResetError):
            seen.append("left")
            raise

    app = web.Application()
    app.router.add_get("/slow", slow)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()

    async def url():
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield Forwarder(url), seen
    await runner.cleanup()


def scope(method, path, headers=()):
    path, _, query = path.partition("?")
    return {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "headers": [(b"host", b"some.where"), *headers],
    }  # fmt: skip


async def test_method_path_headers_and_body_come_and_go_as_they_are(served):
    forwarder, seen = served
    messages = [{"type": "http.request", "body": b"ab", "more_body": True}, {"type": "http.request", "body": b"c"}]
    sent = []

    async def receive():
        return messages.pop(0) if messages else await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    await forwarder(scope("POST", "/v1/a%20b?c=%2F", [(b"content-length", b"3")]), receive, send)
    assert seen == [("POST", "/v1/a%20b?c=%2F", "some.where", b"abc")]
    assert sent[0]["status"] == 418 and (b"x-kind", b"green") in sent[0]["headers"]
    assert b"".join(message["body"] for message in sent[1:]) == b"tea" and not sent[-1]["more_body"]
    await forwarder(scope("GET", "/health"), receive, send)
    assert seen[-1] == ("GET", "/health", "some.where", b"")


async def test_a_client_that_leaves_is_left_by_the_server(served):
    forwarder, seen = served
    started = asyncio.Event()

    async def receive():
        await started.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message.get("body"):
            started.set()

    await forwarder(scope("GET", "/slow"), receive, send)
    async with asyncio.timeout(20):
        while seen != ["left"]:
            await asyncio.sleep(0.01)
