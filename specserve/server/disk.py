"""Looks at a disk that may be away: on threads of their own, bounded in number and time, so that nothing else waits.

A file system of a network may hang, and whatever thread asks it hangs along. Here that costs one of a few threads, and
whoever asked is told after `PATIENCE_S`. Looks for one name have few of the threads, and a file system of which some
hang gets no more (`../readers.py`): a directory or a disk that is away leaves the others theirs.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from ..errors import OverloadedError
from ..readers import Readers

NUM_THREADS = 16
MAX_STUCK, MAX_STUCK_A_MOUNT = 64, 8  # that hang nearly as long as `PATIENCE_S`
THREADS_A_NAME = 4
MAX_LOOKS = 1024  # that wait or hang
PATIENCE_S = 15.0

T = TypeVar("T")


class Disk:
    """`mount_of` tells the file systems apart that names lie on."""

    def __init__(self, mount_of: Callable[[str], Hashable] = lambda name: name) -> None:
        self._mount_of = mount_of
        self._readers = Readers(NUM_THREADS, 0.8 * PATIENCE_S, max_stuck=MAX_STUCK, max_stuck_a_mount=MAX_STUCK_A_MOUNT)
        self._names: dict[str, asyncio.Semaphore] = {}
        self._looks: Counter[str] = Counter()  # by name, those that nobody waits for any more included

    async def look(self, name: str, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` on a thread. Raises `OverloadedError` (503) when the disk does not answer in time."""
        if (num := self._looks.total()) >= MAX_LOOKS:
            raise OverloadedError(f"{num} requests wait for the disk of the adapters; retry shortly", status=503)
        places = self._names.setdefault(name, asyncio.Semaphore(THREADS_A_NAME))
        self._looks[name] += 1
        work = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                await places.acquire()
                work = self._readers.submit(functools.partial(function, *args), self._mount_of(name))
                future = asyncio.wrap_future(work)
                future.add_done_callback(lambda done: self._end(name, places, done))
                return await asyncio.shield(future)
        except TimeoutError:
            if work is not None:
                work.cancel()  # unless it has begun
            self._readers.look()
            what = f"adapter {name[:128]!r}" if name else "the adapters folder"
            message = f"{what}: its disk has not answered for {PATIENCE_S:g} s; retry when it does"
            raise OverloadedError(message, status=503) from None
        finally:
            if work is None:
                self._forget(name)

    def _end(self, name: str, places: asyncio.Semaphore, done: asyncio.Future[Any]) -> None:
        if not done.cancelled():
            done.exception()  # nobody may be left to take it
        places.release()
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._looks[name] -= 1
        if not self._looks[name]:
            del self._looks[name], self._names[name]
