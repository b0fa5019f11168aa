"""Threads that ask disks which may hang: what hangs is left alone, and others go on in its stead.

A file system of a network may never answer, and no thread that asks it comes back. Here a read that takes longer than
`stuck_s` has a thread of its own from then on, up to `max_stuck`; `num` others go on. A file system with
`max_stuck_a_mount` such reads gets no more of them until one ends, so that one that is away leaves others their turn.
Threads end when there is nothing to read, and the process waits for none.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import OverloadedError

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Task:
    future: Future[Any]
    work: Callable[[], Any]
    mount: Hashable
    began: float = 0.0
    is_stuck: bool = False


class Readers:
    """`mount` is whatever tells file systems apart."""

    def __init__(
        self,
        num: int,
        stuck_s: float,
        *,
        max_stuck: int,
        max_stuck_a_mount: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num, self._stuck_s = num, stuck_s
        self._max_stuck, self._max_stuck_a_mount = max_stuck, max_stuck_a_mount
        self._clock = clock
        self._pending: list[_Task] = []  # in order
        self._running: list[_Task] = []
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], T], mount: Hashable) -> Future[T]:
        """`work()` on a thread, in turn. It may be cancelled until it begins."""
        task = _Task(Future(), work, mount)
        with self._lock:
            self._pending.append(task)
        task.future.add_done_callback(lambda future: self._drop(task) if future.cancelled() else None)
        self.look()
        return task.future

    def _drop(self, task: _Task) -> None:
        """One that was cancelled: where all threads hang nobody else would take it out."""
        with self._lock, contextlib.suppress(ValueError):
            self._pending.remove(task)

    def look(self) -> None:
        """See which reads hang by now, and let others begin in their stead; to be called while there are any."""
        with self._lock:
            now = self._clock()
            for task in self._running:
                task.is_stuck = now - task.began > self._stuck_s
            while (begun := self._begin_next()) is not None:
                try:
                    threading.Thread(target=self._work, args=(begun,), name="adapter", daemon=True).start()
                except RuntimeError as error:
                    self._running.remove(begun)
                    text = f"no thread is to be had for the adapters' disk ({error}); retry shortly"
                    begun.future.set_exception(OverloadedError(text, status=503))

    def num_stuck(self, mount: Hashable = None) -> int:
        """Reads that hang, of all file systems or of one."""
        with self._lock:
            return sum(task.is_stuck and mount in (None, task.mount) for task in self._running)

    def is_held_back(self, mount: Hashable) -> bool:
        """Whether no read of that file system begins before one that hangs has ended."""
        return self.num_stuck(mount) >= self._max_stuck_a_mount

    def _begin_next(self) -> _Task | None:
        """Under the lock."""
        stuck = Counter(task.mount for task in self._running if task.is_stuck)
        if len(self._running) - min(stuck.total(), self._max_stuck) >= self._num:
            return None
        for task in self._pending[:]:
            if stuck[task.mount] < self._max_stuck_a_mount:
                self._pending.remove(task)
                if task.future.set_running_or_notify_cancel():
                    task.began = self._clock()
                    self._running.append(task)
                    return task
        return None

    def _work(self, task: _Task) -> None:
        following: _Task | None = task
        while following is not None:
            task = following
            result, error = None, None
            try:
                result = task.work()
            except BaseException as raised:
                error = raised
            with self._lock:
                self._running.remove(task)
                following = self._begin_next()
            if error is not None:
                task.future.set_exception(error)
            else:
                task.future.set_result(result)
