"""Adapters on their way into the engine: read on threads, then given places in the order in which they were asked for.

One that finds no place waits, and an adapter in use makes room (`AdapterRegistry.place`). Only a few are in memory
while they wait, others are not read yet; what waits too long or is too many is refused.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..adapters.lora import LoraAdapter
from ..errors import ErrorInfo, OverloadedError, UserError
from ..memory import give_memory_back
from ..messages import AdapterLoaded, CallFailed, LoadAdapter
from .engine import Engine

MAX_LOADS = 1024  # that wait
MAX_READ = 4  # that are being read, or are read and wait for a place
NUM_READERS = 2
WAIT_S = 60.0  # for a place
READ_S = 600.0  # a disk that has not given an adapter by then is away

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Load:
    message: LoadAdapter
    deadline: float
    adapter: Future[LoraAdapter] | None = None  # None until a reader has it


class AdapterLoads:
    """Owned by the engine's thread; `wake` is called from others when there is something to place."""

    def __init__(self, engine: Engine, wake: Callable[[], None], clock: Callable[[], float] = time.monotonic):
        self._engine = engine
        self._wake = wake
        self._clock = clock
        self._loads: deque[_Load] = deque()
        self._readers = ThreadPoolExecutor(max_workers=NUM_READERS, thread_name_prefix="adapter")

    @property
    def is_waiting(self) -> bool:
        """Whether an adapter that was read waits for its place."""
        return any(load.adapter is not None and load.adapter.done() for load in self._loads)

    def submit(self, message: LoadAdapter) -> list[AdapterLoaded | CallFailed]:
        """Take a load over; its answer comes from `place`, or at once when there are too many."""
        if len(self._loads) >= MAX_LOADS:
            error = OverloadedError(f"{len(self._loads)} adapters wait to be loaded; retry shortly", status=503)
            return [CallFailed(message.call_id, error.info())]
        self._loads.append(_Load(message, self._clock() + WAIT_S))
        self._read()
        return []

    def place(self) -> list[AdapterLoaded | CallFailed]:
        """The answers to loads that have ended, one way or the other."""
        answers = []
        is_full = False  # whoever came later does not overtake one that waits
        now = self._clock()
        for load in list(self._loads):
            answer: AdapterLoaded | CallFailed | None = None
            if load.adapter is not None and load.adapter.done():
                answer = self._end(load, load.adapter, is_full)
                is_full = is_full or answer is None
            if answer is None and now > load.deadline:
                answer = CallFailed(load.message.call_id, self._late(load).info())
            if answer is not None:
                self._loads.remove(load)
                answers.append(answer)
        self._read()
        return answers

    def _end(self, load: _Load, done: Future[LoraAdapter], is_full: bool) -> AdapterLoaded | CallFailed | None:
        call_id = load.message.call_id
        try:
            adapter = done.result()
            if is_full and not self._engine.registry.is_staying(adapter.content_hash):
                return None
            info = self._engine.place_adapter(adapter)
            return AdapterLoaded(call_id, info) if info is not None else None
        except UserError as error:
            return CallFailed(call_id, error.info())
        except Exception as error:
            logger.exception("loading an adapter failed")
            message = f"the adapter could not be loaded: {type(error).__name__}: {error}"
            return CallFailed(call_id, ErrorInfo(message, 500, "server_error", None, "adapter_load_failed"))

    def _read(self) -> None:
        num_read = sum(load.adapter is not None for load in self._loads)
        for load in self._loads:
            if num_read >= MAX_READ:
                return
            if load.adapter is None:
                load.deadline = self._clock() + READ_S
                load.adapter = self._readers.submit(self._read_one, load)
                load.adapter.add_done_callback(lambda _: self._wake())
                num_read += 1

    def _read_one(self, load: _Load) -> LoraAdapter:
        """On a reader's thread: how long it takes is no part of the wait for a place."""
        try:
            return self._engine.read_adapter(load.message.name, load.message.path)
        finally:
            give_memory_back()  # what the adapters before it left in pieces: half a gigabyte after sixty of 2 to 150 MB
            load.deadline = self._clock() + WAIT_S

    def _late(self, load: _Load) -> OverloadedError:
        if load.adapter is not None and not load.adapter.done():
            return OverloadedError(
                f"adapter {load.message.name!r} was not read in {READ_S:g} s; is its disk slow or away?", status=503
            )
        return OverloadedError(
            f"the adapter found no place in {WAIT_S:g} s: all {self._engine.registry.max_adapters} are in use; "
            "retry later or raise --max-adapters",
            status=503,
        )
