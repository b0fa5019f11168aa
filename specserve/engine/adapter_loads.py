"""Adapters on their way into the engine: each goes its way on a thread (`adapter_memory`), and waits without one.

Room is given by the priority of the requests that wait, then in the order of asking; whoever finds none waits, and
adapters in use make some. A load that takes long or fails holds up nobody else. What waits too long or is too many is
refused; while others get room no wait is too long.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..adapter_messages import AdapterLoaded, LoadAdapter
from ..adapters.registry import Reservation
from ..errors import NO_IDLE_ROOM, ErrorInfo, OverloadedError, UserError
from ..memory import give_memory_back
from ..messages import CallFailed
from ..readers import Readers
from .adapter_memory import Brought
from .engine_adapters import EngineAdapters

MAX_LOADS = 1024  # that wait or are read
NUM_READERS = 8  # threads; one that reads from a slow disk mostly waits
STUCK_S = 30.0  # a read that takes longer is none of these any more
MAX_STUCK, MAX_STUCK_A_MOUNT = 32, 4
WAIT_S = 60.0  # for room, while nobody else gets any
READ_S = 600.0  # a disk that has not given an adapter by then is away; a wait for a thread has the same limit
TRIM_BYTES = 64 << 20  # of adapters that were read, after which memory goes back to the system

logger = logging.getLogger(__name__)

Answer = AdapterLoaded | CallFailed


@dataclass(slots=True, eq=False)
class _Load:
    message: LoadAdapter
    since: float  # it waits for a thread, is read, or waits for room
    own_priority: int  # the best of the requests that wait for it
    priority: int  # the best of the requests that wait for it, or for another load of the same content
    is_awaited: bool  # by a request; else it does not wait for room
    way: Generator[Reservation, None, Brought] = field(init=False)
    running: Future[Reservation | Brought] | None = None
    reservation: Reservation | None = None  # that it waits for
    is_answered: bool = False

    @property
    def result(self) -> Future[Reservation | Brought] | None:
        """What a thread has left it with, if that is new."""
        return self.running if self.reservation is None and self.running is not None and self.running.done() else None


class AdapterLoads:
    """Loads begin on any thread and end on any: neither waits for a step. The engine's thread does what else there is.

    `answer` is told of an adapter that can be used, `wake` that there is something to `place`, from other threads.
    """

    def __init__(
        self,
        adapters: EngineAdapters,
        wake: Callable[[], None],
        answer: Callable[[AdapterLoaded], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._adapters = adapters
        self._wake = wake
        self._answer = answer
        self._clock = clock
        self._loads: list[_Load] = []  # in order of arrival
        self._given_up: list[_Load] = []  # while a thread is still at it
        self._last_given = clock()  # when a load ended with room
        self._untrimmed_bytes = 0
        self._lock = threading.Lock()  # of the lists, and of who sends a load on its way or gives it up
        self._readers = Readers(
            NUM_READERS, STUCK_S, max_stuck=MAX_STUCK, max_stuck_a_mount=MAX_STUCK_A_MOUNT, clock=clock
        )

    @property
    def is_waiting(self) -> bool:
        """Whether a load waits for room."""
        return any(load.reservation is not None for load in self._loads)

    def submit(self, message: LoadAdapter) -> list[Answer]:
        """Take a load over; its answer comes from `place`, or at once when there are too many."""
        with self._lock:
            if len(self._loads) >= MAX_LOADS:
                error = OverloadedError(f"{len(self._loads)} adapters wait to be loaded; retry shortly", status=503)
                return [CallFailed(message.call_id, error.info())]
            load = _Load(message, self._clock(), message.priority, message.priority, not message.is_prefetch)
            self._begin(load)
            self._loads.append(load)
            self._share_priorities()
            self._go_on()
        return []

    def _begin(self, load: _Load) -> None:
        load.way, load.running = self._adapters.memory.bring(load.message, lambda: load.priority), None

    def prioritize(self, path: str, priority: int) -> None:
        """That is the best of the requests that wait for the loads of the directory `path` now."""
        with self._lock:
            for load in self._loads:
                if load.message.path == path:
                    load.own_priority = priority
            self._share_priorities()

    def forsake(self, path: str) -> None:
        """Nobody waits any more for the loads of the directory `path`."""
        with self._lock:
            for load in self._loads:
                if load.message.path == path:
                    load.is_awaited = False
        self._wake()

    def _share_priorities(self) -> None:
        """Loads of the same content wait for each other, so all have the best priority of them. Under the lock."""
        best: dict[str | None, int] = {}
        for load in self._loads:
            key = load.message.content_hash
            best[key] = min(best.get(key, load.own_priority), load.own_priority)
        for load in self._loads:
            key = load.message.content_hash
            load.priority = best[key] if key is not None else load.own_priority
            if load.reservation is not None:
                self._adapters.memory.prioritize(load.reservation, load.priority)

    def place(self) -> list[Answer]:
        """The answers to loads that have ended, one way or the other; those that wait go on when there is room."""
        if not self._loads and not self._given_up:
            return []
        answers, now = [], self._clock()
        self._readers.look()
        self._adapters.memory.num_stuck_reads = self._readers.num_stuck()
        for load in list(self._loads):
            with self._lock:
                answer = self._look_at(load, now)
                if answer is not None or load.is_answered:
                    self._loads.remove(load)
            if answer is not None:
                answers.append(answer)
        for load in list(self._given_up):
            if load.result is not None:
                self._given_up.remove(load)
                self._give_back(load)
        self._adapters.memory.grant()
        with self._lock:
            self._go_on()
        return answers

    def _look_at(self, load: _Load, now: float) -> Answer | None:
        """Its answer, if there is one now. Under the lock."""
        message = load.message
        if load.is_answered:
            self._last_given = now
            return None
        try:
            if load.result is not None:
                result = load.result.result()
                if isinstance(result, Brought):
                    self._last_given = now
                    self._adapters.forget_left()
                    placement = self._adapters.place(result, message.is_pinned)
                    if placement is not None:
                        return AdapterLoaded(message.call_id, result.adapter.info(), placement)
                    if result.reservation.is_held:  # what it had found here has left since
                        self._begin(load)
                    return None
                load.reservation, load.since = result, now
                self._adapters.memory.prioritize(result, load.priority)  # it may be another since it asked
            if load.reservation is not None:
                if not load.reservation.is_granted and not load.is_awaited:
                    load.way.close()
                    text = f"no idle adapter makes room for {message.name!r}, and no request waits for it"
                    raise OverloadedError(text, status=503, code=NO_IDLE_ROOM)
                if not load.reservation.is_granted and now - max(load.since, self._last_given) > WAIT_S:
                    error = self._adapters.memory.no_room(load.reservation, WAIT_S)
                    load.way.close()
                    raise error
            elif (
                load.running is not None
                and now - load.since > WAIT_S
                and self._readers.is_held_back(message.mount)
                and load.running.cancel()
            ):
                load.way.close()
                text = (
                    f"adapter {message.name!r} is not read: {self._readers.num_stuck(message.mount)} reads from its "
                    f"disk have not ended in {STUCK_S:g} s; is it away? Retry when it answers"
                )
                raise OverloadedError(text, status=503)
            elif load.running is not None and now - load.since > READ_S:
                if load.running.cancel():
                    load.way.close()
                    text = (
                        f"adapter {message.name!r} waited {READ_S:g} s for others to be read; are disks slow or away?"
                    )
                    raise OverloadedError(text, status=503)
                self._given_up.append(load)
                self._adapters.memory.give_up(message)
                raise OverloadedError(
                    f"adapter {message.name!r} was not read in {READ_S:g} s; is its disk slow or away?", status=503
                )
        except UserError as error:
            return CallFailed(message.call_id, error.info())
        except Exception as error:
            logger.exception("loading an adapter failed")
            text = f"the adapter could not be loaded: {type(error).__name__}: {error}"
            return CallFailed(message.call_id, ErrorInfo(text, 500, "server_error", None, "adapter_load_failed"))
        return None

    def _go_on(self) -> None:
        """Send loads on their way: new ones, and those that have got their room. Under the lock."""
        under_way: set[str] = set()
        for load in self._loads:
            key = load.message.content_hash
            # One of the same content is under way, under another name: this one will find it there.
            is_double = load.running is None and key in under_way
            if key is not None and not load.is_answered:
                under_way.add(key)
            if not is_double and (
                load.running is None or (load.reservation is not None and load.reservation.is_granted)
            ):
                load.reservation, load.since = None, self._clock()
                load.running = self._readers.submit(functools.partial(self._advance, load), load.message.mount)
                load.running.add_done_callback(lambda _: self._wake())

    def _advance(self, load: _Load) -> Reservation | Brought:
        """On a reader's thread: as far as it gets without waiting."""
        load.since = self._clock()
        try:
            return next(load.way)
        except StopIteration as end:
            brought: Brought = end.value
        with self._lock:
            is_wanted = load not in self._given_up
            placement = self._adapters.place(brought, load.message.is_pinned) if is_wanted else None
            if placement is not None:
                load.is_answered = True
                self._go_on()  # with those of the same content
        if placement is not None:
            self._answer(AdapterLoaded(load.message.call_id, brought.adapter.info(), placement))
        self._untrimmed_bytes += brought.adapter.num_bytes
        if self._untrimmed_bytes > TRIM_BYTES:  # 60 adapters of 2 to 150 MB left half a gigabyte in pieces
            self._untrimmed_bytes = 0
            give_memory_back()
        return brought

    def _give_back(self, load: _Load) -> None:
        """What a load that was given up has come to hold."""
        assert load.running is not None
        if load.running.exception() is None and isinstance(result := load.running.result(), Brought):
            self._adapters.memory.registry.give_back(result.reservation)
        load.way.close()
