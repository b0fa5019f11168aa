"""GET /v1/stats: the engine's state and counters, once or as server-sent events.

A stream is of the keys that there were when it began: it ends when they are read again, so that its client shows its
key anew.
"""

from __future__ import annotations

from contextlib import aclosing

from aiohttp import web

from ..access.caller import found_caller
from ..access.keys import KeyRing
from ..engine_client.serving_engine import ServingEngine
from ..http_body import convert, json_response
from ..route import Handler
from ..sse import EventStream
from .feed import StatsFeed
from .snapshot import NamesAlike, StatsSource, visible
from .types import StatsQuery


class StatsRoutes:
    """Of one server."""

    def __init__(self, engine: ServingEngine, base_name: str, names_alike: NamesAlike, keys: KeyRing):
        self._source = StatsSource(engine, base_name)
        self._names_alike = names_alike
        self.feed = StatsFeed(self._source.newest, names_alike)
        engine.on_snapshot = self.feed.publish
        self._keys = keys

    def handlers(self) -> dict[str, Handler]:
        """Handlers by the names that the route table gives them."""
        return {"stats": self.stats}

    async def stats(self, request: web.Request) -> web.StreamResponse:
        query, caller = convert(dict(request.query), StatsQuery), found_caller(request)
        if query.stream == "false" or request.method == "HEAD":
            whole = await self._source.fresh()
            may_see = caller.may_use if caller is not None else lambda name: True
            return json_response(visible(whole, may_see, self._names_alike))
        stream, keys_before = EventStream(request), self._keys.num_reads
        async with aclosing(self.feed.listen(caller)) as events:
            async for event in events:
                if self._keys.num_reads != keys_before:
                    break
                await stream.send(event)
        return await stream.end()
