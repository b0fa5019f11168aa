"""Server-sent events: headers and writing. A reader that takes nothing for a minute is dropped."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
WRITE_TIMEOUT_S = 60.0


async def send_events(response: web.StreamResponse, *events: Any, mark: bytes = b"data: ") -> None:
    """Write `events` as JSON in one piece; raises `TimeoutError` when the reader takes nothing."""
    if events:
        data = b"".join(mark + msgspec.json.encode(event) + b"\n\n" for event in events)
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(data)
