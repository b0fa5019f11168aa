"""Places for rows that run: so many at a time, shared evenly between those whose rows they are.

Whoever holds fewest gets the next one. Knows nothing of rows.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Places:
    """`num` says how many there are at the moment, at least one; fewer than are taken is no harm."""

    def __init__(self, num: Callable[[], int]):
        self._num = num
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def num_held(self) -> int:
        return self._held.total()

    @property
    def num_waiting(self) -> int:
        return sum(len(turns) for turns in self._waiting.values())

    @asynccontextmanager
    async def one(self, owner: str) -> AsyncIterator[None]:
        """A place, from when it is there."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at that moment
                self._back(owner)
            raise
        try:
            yield
        finally:
            self._back(owner)

    def _back(self, owner: str) -> None:
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        self._give()

    def _give(self) -> None:
        while self._waiting and self.num_held < self._num():
            owner = min(self._waiting, key=lambda name: self._held[name])
            turn = self._waiting[owner].popleft()
            if not self._waiting[owner]:
                del self._waiting[owner]
            if not turn.cancelled():
                self._held[owner] += 1
                turn.set_result(None)
