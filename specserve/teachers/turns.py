"""Who asks what is being asked waits for that answer, whether it is asked here or by another program.

Among programs the turn is a lock of the cache's, which the kernel takes from one that is killed. One that does not go
on is waited for as long as for an answer of one's own, and then the same is asked twice.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..awake_clock import AwakeClock
from .answer_cache import AnswerCache
from .pacing import Pacing

FIRST_WAIT_S = 0.02
MAX_WAIT_S = 0.5


class Turns:
    """At the asks to one teacher; `longest_s` is how long another program is waited for."""

    def __init__(self, cache: AnswerCache, pacing: Pacing, longest_s: float):
        self._cache, self._pacing, self._longest_s = cache, pacing, longest_s
        self._here: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def here(self, digest: str) -> asyncio.Lock:
        """The lock of an ask in this program."""
        return self._here.setdefault(digest, asyncio.Lock())

    @asynccontextmanager
    async def among_programs(self, digest: str) -> AsyncIterator[None]:
        """While within, nobody else asks this; whoever did may have put the answer into the cache before."""
        clock, wait_s = AwakeClock(MAX_WAIT_S), FIRST_WAIT_S
        while not (is_held := self._cache.take(digest)) and clock.tick() < self._longest_s:
            if self._pacing.has_ended:
                break
            await self._pacing.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_WAIT_S)
        try:
            yield
        finally:
            if is_held:
                self._cache.give_back(digest)
