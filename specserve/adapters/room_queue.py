"""Who waits for room, and who gets it next: as requests wait (`schedule/waiting.py`), for adapters instead of seats.

By the best priority of the requests that wait for the adapter, lower is sooner, then in the order of asking. Nobody
waits for ever: every eighth room is that of whoever has waited longest, if that is more than `PATIENCE_S`; loads for
rows of batches, which nobody waits for, come behind all others. Plain bookkeeping, under the lock of its owner.
"""

from __future__ import annotations

import itertools
from bisect import insort

from .held import Reservation

PATIENCE_S = 30.0
OLDEST_EVERY = 8  # rooms


class RoomQueue:
    """Reservations that are not granted yet."""

    def __init__(self) -> None:
        self._waiting: list[Reservation] = []  # in order
        self._numbers = itertools.count()
        self._num_left = 0  # that got their room

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, reservation: Reservation) -> bool:
        return reservation in self._waiting

    def put(self, reservation: Reservation) -> None:
        reservation.number = next(self._numbers)
        insort(self._waiting, reservation, key=_rank)

    def remove(self, reservation: Reservation) -> None:
        """One that waits no more; it got no room."""
        self._waiting.remove(reservation)

    def prioritize(self, reservation: Reservation, priority: int) -> None:
        """That is the best of the requests that wait for it now."""
        if priority != reservation.priority:
            is_waiting = reservation in self._waiting
            if is_waiting:
                self._waiting.remove(reservation)
            reservation.priority = priority
            if is_waiting:
                insort(self._waiting, reservation, key=_rank)

    def first(self, now: float) -> Reservation:
        """Who gets the next room; it stays until `take`."""
        if self._num_left % OLDEST_EVERY == OLDEST_EVERY - 1:
            first_is_background = self._waiting[0].is_background
            others = (item for item in self._waiting if first_is_background or not item.is_background)
            oldest = min(others, key=lambda reservation: reservation.number)
            if now - oldest.asked_at > PATIENCE_S:
                return oldest
        return self._waiting[0]

    def next(self, num: int, now: float) -> list[Reservation]:
        """At most `num` of those that wait: `first`, then the others in order, as if no turn came up meanwhile."""
        first = self.first(now)
        others = (reservation for reservation in self._waiting if reservation is not first)
        return [first, *itertools.islice(others, num - 1)]

    def take(self, reservation: Reservation) -> None:
        """It got its room."""
        self._waiting.remove(reservation)
        self._num_left += 1


def _rank(reservation: Reservation) -> tuple[int, int]:
    return reservation.priority, reservation.number
