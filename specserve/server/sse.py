"""Server-sent events: a job's deltas as a stream in an API's shape.

An error before the first event is an answer with its own status; after it, the last event. A reader that takes nothing
for long is cut off by its connection.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from aiohttp import web

from ..errors import ErrorInfo, UserError
from ..messages import Delta

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class EventBuilder(Protocol):
    """Shapes one job's stream, as one API writes it."""

    def events(self, idx: int, delta: Delta) -> list[Any]:
        """What the next delta of sequence `idx` adds; nothing while it says nothing yet."""

    def closing(self) -> list[Any]:
        """What follows the last delta."""

    def error(self, info: ErrorInfo) -> Any:
        """The last event of a stream that fails."""


async def stream_events(
    stream: EventStream, deltas: AsyncGenerator[tuple[int, Delta]], builder: EventBuilder, last: bytes = b""
) -> web.StreamResponse:
    """Send what `builder` makes of `deltas`, then `last`. Raises `UserError` for what fails before the first delta."""
    try:
        async with aclosing(deltas):
            async for idx, delta in deltas:
                await stream.send(*builder.events(idx, delta))
        await stream.send(*builder.closing())
    except UserError as error:
        if not stream.is_open:
            raise
        await stream.send(builder.error(error.info()))
    return await stream.end(last)


class EventStream:
    """The answer to `request`, which starts with the first event. Raises `ConnectionError` when nobody reads it."""

    def __init__(
        self,
        request: web.Request,
        headers: Mapping[str, str] | None = None,
        mark: bytes | Callable[[Any], bytes] = b"data: ",  # what stands before an event's JSON
    ):
        self.response = web.StreamResponse(headers={**HEADERS, **(headers or {})})
        self._request = request
        self._mark = mark

    @property
    def is_open(self) -> bool:
        return self.response.prepared

    async def open(self) -> None:
        if not self.is_open:
            await self.response.prepare(self._request)

    async def send(self, *events: Any) -> None:
        """Write `events` as JSON in one piece."""
        await self.open()
        if events:
            mark = self._mark
            marks = [mark(event) if callable(mark) else mark for event in events]
            texts = [msgspec.json.encode(event) for event in events]
            data = b"".join([start + text + b"\n\n" for start, text in zip(marks, texts, strict=True)])
            await self.response.write(data)

    async def end(self, last: bytes = b"") -> web.StreamResponse:
        """Write `last` and what says that the stream is complete."""
        await self.response.write_eof(last)
        return self.response
