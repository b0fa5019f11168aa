"""What is asked of the engine beside requests, and its answers, by the ids of calls.

A call that its engine did not live to answer is asked once more of the next one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from ...adapter_messages import AdapterLoaded, AdapterStates, GetAdapters, LoadAdapter, PinAdapter, UnloadAdapter
from ...errors import EngineDeadError, EngineLostError, from_info
from ...messages import CallDone, CallFailed, GetStats
from ...stats_messages import Stats
from .link import Link


class Calls:
    """`link` gives the engine that serves, or the next one, waited for so many seconds; None: as by requests."""

    def __init__(self, link: Callable[[float | None], Awaitable[Link]]):
        self._link = link
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count()

    def next_id(self) -> int:
        return next(self._ids)

    async def ask(
        self,
        message: LoadAdapter | UnloadAdapter | PinAdapter | GetAdapters | GetStats,
        patience_s: float | None = None,
    ) -> Any:
        """The answer; raises `UserError`."""
        for is_last in (False, True):
            engine = await self._link(patience_s)
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._waiting[message.call_id] = future
            try:
                engine.send(message)
                return await future
            except EngineLostError:
                if is_last:
                    raise
            finally:
                self._waiting.pop(message.call_id, None)

    def answer(self, message: AdapterLoaded | AdapterStates | CallDone | Stats) -> None:
        if (future := self._waiting.pop(message.call_id, None)) is not None and not future.done():
            future.set_result(message)

    def fail(self, message: CallFailed) -> None:
        if (future := self._waiting.pop(message.call_id, None)) is not None and not future.done():
            future.set_exception(from_info(message.error))

    def fail_all(self, kind: type[EngineDeadError], reason: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(kind(reason))
        self._waiting.clear()
