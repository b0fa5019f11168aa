"""Who gets room in a memory, and who leaves for it: the half of the registry that decides.

Knows sizes, counts and values of adapters, never the adapters. Any thread may ask. Invariants: held and reserved bytes
and places are within the limits; what is in use or pinned stays; room is given in the order of `room_queue`; loads for
rows of batches take no room from what requests that somebody waits for use, or used lately.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..errors import OverloadedError, UserError
from ..messages import AWAY_S
from .held import Counts, Held, Reservation
from .reuse import ReuseScores
from .room_queue import RoomQueue

STAY_S = 1.0  # an adapter in use makes room for others after so long at the earliest
PATIENCE_S = 5.0  # when one that was asked to make room has not, another is asked in its stead
ASKED_SHARE = 0.25  # of those held that are asked at the same time, however many wait
ASK_EVERY_S = 0.02  # between looks for some to ask, which go through all that are held
NO_LIMIT = 1 << 62  # bytes


class Residency:
    """Room for at most `max_adapters` adapters of at most `max_bytes` together.

    Idle ones make room, the least valuable first. Where too few are idle the least valuable ones in use are asked to:
    they take no new request, and their server loads them again in turn, behind those that wait already.
    """

    def __init__(
        self,
        max_adapters: int,
        clock: Callable[[], float] = time.monotonic,
        max_bytes: int = NO_LIMIT,
        bytes_flag: str = "--adapter-memory-gib",
    ):
        self.max_adapters, self.max_bytes = max_adapters, max_bytes
        self.counts = Counts()
        self.scores, self.background_scores = ReuseScores(), ReuseScores()
        self._clock = clock
        self.bytes_flag = bytes_flag
        self._held: dict[str, Held] = {}
        self._waiting = RoomQueue()
        self._left: dict[str, int] = {}  # of `_held`, with their placements, until somebody takes note of it
        self._used_bytes = 0  # held and reserved
        self._num_reserved = 0
        self._is_asking, self._next_ask = False, 0.0
        self.lock = threading.RLock()

    def ask(self, num_bytes: int, key: str | None = None, *, is_patient: bool = True, priority: int = 0) -> Reservation:
        """Room for an adapter, granted at once if idle ones can make it and nobody else is first; else it waits if it
        shall.

        `key` is its content hash, where that is known. Raises `UserError` for what can never be granted.
        """
        with self.lock:
            reservation = Reservation(num_bytes, self._clock(), key, priority)
            if self.is_staying(key) and self._take(reservation):
                return reservation
            self._waiting.put(reservation)
            if self._waiting.first(reservation.asked_at) is reservation and self._take(reservation):
                self._waiting.take(reservation)
                return reservation
            try:
                if key not in self._held:
                    self._check_size(num_bytes)
            except UserError:
                self._waiting.remove(reservation)
                raise
            if is_patient:
                self.counts.num_waits += 1
            else:
                self._waiting.remove(reservation)
            return reservation

    def prioritize(self, reservation: Reservation, priority: int) -> None:
        """That is the best of the requests that wait for it now."""
        with self.lock:
            self._waiting.prioritize(reservation, priority)

    def grant(self) -> None:
        """Give room to those that wait, in order, and ask adapters in use to make more; call it now and then."""
        with self.lock:
            now = self._clock()
            while self._waiting and self._take(reservation := self._waiting.first(now)):
                self._waiting.take(reservation)
                self.counts.wait_s += now - reservation.asked_at
            if self._waiting:
                self._ask_held()
            elif self._is_asking:  # whoever waited has given up, or found room elsewhere
                self._is_asking, self._next_ask = False, 0.0
                for held in self._held.values():
                    held.asked_at, held.is_displaced = None, False

    def give_back(self, reservation: Reservation) -> None:
        """What was not filled; a room that is not granted yet waits no more."""
        with self.lock:
            if reservation in self._waiting:
                self._waiting.remove(reservation)
            elif reservation.is_granted and not reservation.is_held:
                self._used_bytes -= reservation.num_bytes
                self._num_reserved -= 1
            reservation.is_granted = False

    def is_waiting(self, reservation: Reservation) -> bool:
        """Whether it waits for room here."""
        with self.lock:
            return reservation in self._waiting

    def resize(self, reservation: Reservation, num_bytes: int) -> None:
        """What was read has another size than expected.

        Raises `OverloadedError` where more is not free at once, or it was given back meanwhile.
        """
        with self.lock:
            if not reservation.is_granted:
                raise OverloadedError("its room was given to others while it was read; retry", status=503)
            self._check_size(num_bytes)
            if not self._evict(num_bytes - reservation.num_bytes, 0, reservation.is_background):
                raise OverloadedError(f"no room for {num_bytes - reservation.num_bytes} bytes more; retry", status=503)
            self._used_bytes += num_bytes - reservation.num_bytes
            reservation.num_bytes = num_bytes

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise UserError(
                f"the adapter takes {num_bytes} bytes in memory, but the limit for all is {self.max_bytes}; raise "
                f"{self.bytes_flag}",
                code="adapter_too_large",
            )
        pinned = [held.num_bytes for held in self._held.values() if held.is_pinned]
        pinned_bytes, problem = sum(pinned), ""
        if num_bytes > self.max_bytes - pinned_bytes:
            problem = (
                f"the adapter takes {num_bytes} bytes in memory, and pinned ones hold {pinned_bytes} of the "
                f"{self.max_bytes} that there are; unpin some or raise {self.bytes_flag}"
            )
        elif len(pinned) >= self.max_adapters:
            problem = f"all {self.max_adapters} places are pinned; unpin an adapter or raise --max-adapters"
        if problem:
            raise UserError(problem, code="adapter_places_pinned", status=503)

    def _take(self, reservation: Reservation) -> bool:
        """Reserve `reservation`, evicting idle adapters for it; False, and nobody leaves, when that is not enough."""
        held = self._held.get(reservation.key) if reservation.key is not None else None
        if held is not None and not held.is_unloaded:
            held.stay(self._clock(), reservation.is_background)
            reservation.is_granted = reservation.is_held = True
            return True
        if not self._evict(reservation.num_bytes, 1, reservation.is_background):
            return False
        self._used_bytes += reservation.num_bytes
        self._num_reserved += 1
        reservation.is_granted = True
        return True

    def _missing(self, num_bytes: int, num_places: int) -> tuple[int, int]:
        """Bytes and places that are not free for so many more."""
        num_used = len(self._held) + self._num_reserved
        return self._used_bytes + num_bytes - self.max_bytes, num_used + num_places - self.max_adapters

    def _evict(self, num_bytes: int, num_places: int, for_background: bool) -> bool:
        bytes_missing, places_missing = self._missing(num_bytes, num_places)
        if bytes_missing <= 0 and places_missing <= 0:
            return True
        now, victims = self._clock(), []
        for *_, key in sorted(
            (held.background_value if for_background else held.value, held.last_used, key)
            for key, held in self._held.items()
            if held.may_go(now, for_background)
        ):
            if bytes_missing <= 0 and places_missing <= 0:
                break
            victims.append(key)
            bytes_missing -= self._held[key].num_bytes
            places_missing -= 1
        if bytes_missing > 0 or places_missing > 0:
            return False
        for key in victims:
            self._drop(key)
            self.counts.num_evictions += 1
        return True

    def displaced(self) -> set[str]:
        """Adapters that rows of batches alone use, and that requests need the room of: the rows have to go."""
        if not self._is_asking:
            return set()
        with self.lock:
            return {key for key, held in self._held.items() if held.is_displaced and held.is_background}

    def _ask_held(self) -> None:
        """Ask adapters in use to make room for those that are next: first those that rows of batches alone use, then
        the least valuable. For rows of batches others of these are asked, and only where no request waits."""
        now = self._clock()
        if now < self._next_ask:
            return
        self._is_asking, self._next_ask = True, now + ASK_EVERY_S
        num_served = max(1, int(len(self._held) * ASKED_SHARE))
        served = self._waiting.next(num_served, now)
        if not (for_background := served[0].is_background):
            served = [reservation for reservation in served if not reservation.is_background]
        bytes_missing, places_missing = self._missing(sum(reservation.num_bytes for reservation in served), len(served))
        can_be_asked = []
        for key, held in self._held.items():
            is_leaving = held.asked_at is not None and now - held.asked_at < PATIENCE_S
            is_leaving &= for_background or held.is_displaced or not held.is_background
            if is_leaving or held.may_go(now, for_background):
                bytes_missing -= held.num_bytes
                places_missing -= 1
            elif held.num_refs and not held.is_pinned and self._may_ask(held, now, for_background):
                value = held.background_value if for_background else held.value
                can_be_asked.append((not held.is_background, value, held.last_used, key))
        for *_, key in sorted(can_be_asked):
            if bytes_missing <= 0 and places_missing <= 0:
                return
            held = self._held[key]
            held.asked_at, held.is_displaced = now, not for_background and held.is_background
            bytes_missing -= held.num_bytes
            places_missing -= 1
            self.counts.num_asked += 1

    def _may_ask(self, held: Held, now: float, for_background: bool) -> bool:
        if not for_background and held.is_background:
            return not held.is_displaced
        if for_background and not (held.is_background and now - held.wanted_at >= AWAY_S):
            return False
        return held.is_staying and now - held.since >= STAY_S

    def _values(self, key: str, load_s: float, num_bytes: int) -> tuple[float, float]:
        """To requests, and to rows of batches."""
        share = max(num_bytes / self.max_bytes, 1 / self.max_adapters)
        return self.scores.value(key, load_s, share), self.background_scores.value(key, load_s, share)

    def _drop(self, content_hash: str) -> None:
        held = self._held.pop(content_hash)
        self._used_bytes -= held.num_bytes
        self._left[content_hash] = held.placement

    def is_staying(self, content_hash: str | None) -> bool:
        """Whether requests for it would be taken now."""
        with self.lock:
            held = self._held.get(content_hash) if content_hash is not None else None
            return held is not None and held.is_staying
