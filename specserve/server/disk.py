"""Looks at a disk that may be away: on threads of their own, bounded in number and time, so that nothing else waits.

A file system of a network may hang, and whatever thread asks it hangs along. Here that costs one of a few threads, and
whoever asked is told after `PATIENCE_S`. Looks for one name have few of the threads: a single directory that hangs
leaves the others theirs. The threads end with the process, which does not wait for them.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import OverloadedError

NUM_THREADS = 16
THREADS_A_NAME = 4
MAX_LOOKS = 1024  # that wait or hang
PATIENCE_S = 15.0

T = TypeVar("T")


class Disk:
    """Threads are started when they are needed first."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self._num_threads = 0
        self._names: dict[str, asyncio.Semaphore] = {}
        self._looks: Counter[str] = Counter()  # by name, those that nobody waits for any more included

    async def look(self, name: str, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` on a thread. Raises `OverloadedError` (503) when the disk does not answer in time."""
        if (num := self._looks.total()) >= MAX_LOOKS:
            raise OverloadedError(f"{num} requests wait for the disk of the adapters; retry shortly", status=503)
        places = self._names.setdefault(name, asyncio.Semaphore(THREADS_A_NAME))
        self._looks[name] += 1
        is_begun = False
        try:
            async with asyncio.timeout(PATIENCE_S):
                await places.acquire()
                try:
                    future = self._begin(function, args)
                except BaseException:
                    places.release()
                    raise
                future.add_done_callback(lambda done: self._end(name, places, done))
                is_begun = True
                return await asyncio.shield(future)
        except TimeoutError:
            what = f"adapter {name[:128]!r}" if name else "the adapters folder"
            message = f"{what}: its disk has not answered for {PATIENCE_S:g} s; retry when it does"
            raise OverloadedError(message, status=503) from None
        finally:
            if not is_begun:
                self._forget(name)

    def _begin(self, function: Callable[..., T], args: tuple[Any, ...]) -> asyncio.Future[T]:
        if self._num_threads < min(NUM_THREADS, self._looks.total()):
            threading.Thread(target=self._work, name="disk", daemon=True).start()
            self._num_threads += 1  # none that could not be started
        done: Future[T] = Future()
        self._tasks.put((done, function, args))
        return asyncio.wrap_future(done)

    def _end(self, name: str, places: asyncio.Semaphore, done: asyncio.Future[Any]) -> None:
        if not done.cancelled():
            done.exception()  # nobody may be left to take it
        places.release()
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._looks[name] -= 1
        if not self._looks[name]:
            del self._looks[name], self._names[name]

    def _work(self) -> None:
        while True:
            done, function, args = self._tasks.get()
            try:
                result = function(*args)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)
