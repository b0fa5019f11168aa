"""An event loop on a thread of its own, for callers that have none, or one that is not to be disturbed.

So an engine is watched whatever its caller does meanwhile, notebooks that run a loop themselves need no second way, and
two engines share nothing. A caller that leaves, by Ctrl-C or an error, cancels what it waited for. Nobody waits for a
loop that has ended: what still ran is cancelled, and its callers get `EngineDeadError`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, contextmanager
from typing import Any, Generic, TypeVar

from ..errors import EngineDeadError

T = TypeVar("T")


class LoopThread:
    """Started when it is made; `stop` ends it. The thread does not keep its process from ending."""

    def __init__(self, name: str):
        self._loop = asyncio.new_event_loop()
        self._is_stopped = False
        self._lock = threading.RLock()  # a collector of garbage may stop what its own thread submits to
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            while tasks := asyncio.all_tasks(self._loop):
                for task in tasks:
                    task.cancel()
                self._loop.run_until_complete(asyncio.wait(tasks))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin `work` there. Raises `EngineDeadError` once the loop is to end."""
        with self._lock:  # what is begun is begun before the loop is told to end
            if not self._is_stopped:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise EngineDeadError("this LLM is closed")

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` there and wait for it. Raises `EngineDeadError` where the loop ends meanwhile, as all below do."""
        future = self.submit(work)
        try:
            with _ended_by_stop():
                return future.result()
        finally:
            future.cancel()  # nothing, unless the wait was interrupted

    async def acall(self, work: Coroutine[Any, Any, T]) -> T:
        """The same, awaited on another loop, whose cancellation is passed on."""
        future = self.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _closed_meanwhile() from None

    def iterate(self, items: AsyncGenerator[T]) -> Iterator[T]:
        """The items as they come; leaving the iterator closes them. They are taken whether or not anybody reads."""
        taken: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        future = self.submit(_pump(items, taken.put))
        future.add_done_callback(lambda done: taken.put(_End(done)))
        try:
            while not isinstance(item := taken.get(), _End):
                yield item
            with _ended_by_stop():
                item.future.result()
        finally:
            future.cancel()

    async def aiterate(self, items: AsyncGenerator[T]) -> AsyncIterator[T]:
        """The same on another loop."""
        loop, taken = asyncio.get_running_loop(), asyncio.Queue[T | _End]()

        def put(item: T | _End) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(taken.put_nowait, item)

        future = self.submit(_pump(items, put))
        future.add_done_callback(lambda done: put(_End(done)))
        try:
            while not isinstance(item := await taken.get(), _End):
                yield item
            with _ended_by_stop():
                item.future.result()
        finally:
            future.cancel()

    def stop(self) -> None:
        """End the loop, once; what still runs there is cancelled."""
        with self._lock:
            if not self._is_stopped:
                self._is_stopped = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        if not self.is_current:
            self._thread.join()


@contextmanager
def _ended_by_stop() -> Iterator[None]:
    """Nobody but `stop` cancels what somebody waits for."""
    try:
        yield
    except CancelledError:
        raise _closed_meanwhile() from None


def _closed_meanwhile() -> EngineDeadError:
    return EngineDeadError("this LLM was closed before the answer had come")


class _End(Generic[T]):
    """The last item: `future` has what went wrong, if anything did."""

    def __init__(self, future: Future[T]):
        self.future = future


async def _pump(items: AsyncGenerator[T], put: Any) -> None:
    async with aclosing(items):
        async for item in items:
            put(item)
