"""A time at which waiting ends, with one timer for all waits of a request: there is one for each of its deltas.

`asyncio.timeout_at` makes a timer for each wait. As there, a wait is cut by cancelling its task, and a cancellation
that comes from elsewhere goes on. What is done between two waits is not cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

T = TypeVar("T")


class EndTime:
    """`end` is of the event loop's time. The timer lives within `with`."""

    def __init__(self, end: float):
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Task[Any] | None = None
        self._is_cut = False  # the latest wait

    def __enter__(self) -> EndTime:
        self._timer = self._loop.call_at(self._end, self._cut)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    @property
    def has_come(self) -> bool:
        return self._loop.time() > self._end

    async def next_of(self, items: AsyncGenerator[T]) -> T | None:
        """The next one, None for no more. Raises `TimeoutError` if the time comes, or had come, before it is there."""
        if self.has_come:
            self._loop.call_soon(self._cut)
        self._waiting, self._is_cut = (task := asyncio.current_task()), False
        assert task is not None
        num_cancels = task.cancelling()
        try:
            item = await anext(items, None)
        except BaseException as error:
            if self._is_cut and task.uncancel() <= num_cancels and isinstance(error, asyncio.CancelledError):
                raise TimeoutError from None
            raise
        finally:
            self._waiting = None
        if self._is_cut:
            task.uncancel()
        return item

    def _cut(self) -> None:
        if self._waiting is not None and not self._is_cut:
            self._is_cut = True
            self._waiting.cancel()
