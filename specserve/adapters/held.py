"""What is known of an adapter that a memory holds, of room that was asked for, and of what came of it. Plain values.

The registry alone changes them, under its lock.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..messages import AWAY_S, BACKGROUND_PRIORITY

ARRIVAL_S = 2.0  # how long an adapter that nobody used yet is kept for the request that it was loaded for


@dataclass(slots=True, eq=False)
class Reservation:
    """Bytes and a place, for a load that asked for them; reserved for it once `is_granted`.

    `is_held`: the adapter `key` is here already and stays, so nothing was reserved and nothing needs to be read.
    """

    num_bytes: int
    asked_at: float
    key: str | None = None
    priority: int = 0  # the best of the requests that wait for it; lower is sooner
    is_granted: bool = False
    is_held: bool = False
    number: int = 0  # in the order of asking

    @property
    def is_background(self) -> bool:
        """Whether rows of batches alone wait for it."""
        return self.priority >= BACKGROUND_PRIORITY


@dataclass(slots=True)
class Held:
    """An adapter that is here."""

    num_bytes: int
    load_s: float  # that it took to get here
    value: float  # `ReuseScores.value` at its last use
    background_value: float  # the same by uses of rows of batches alone
    since: float  # it came, or was given its place again
    awaited_until: float  # a request that it was loaded for is to come
    last_used: float
    wanted_at: float  # a request that somebody waits for used it, or asked for it, the last time
    num_refs: int = 0  # requests that run with it, or wait to
    num_background: int = 0  # of these, rows of batches
    placement: int = 0  # of the newest load that was told that it is here
    is_pinned: bool = False
    pin_placement: int = 0  # that the newest pin knew of
    is_unloaded: bool = False  # it goes with its last request
    asked_at: float | None = None  # to make room, likewise
    is_displaced: bool = False  # asked for requests, while rows of batches alone use it: they have to go at once

    @property
    def is_staying(self) -> bool:
        """Whether it takes requests."""
        return not self.is_unloaded and self.asked_at is None

    @property
    def is_background(self) -> bool:
        """Whether rows of batches alone use it."""
        return self.num_refs == self.num_background > 0

    def may_go(self, now: float, for_background: bool = False) -> bool:
        """Whether nobody needs it at this moment; for rows of batches, nobody else lately either."""
        if self.num_refs or self.is_pinned:
            return False
        if for_background:
            return now >= max(self.awaited_until, self.wanted_at + AWAY_S)
        return now >= self.awaited_until or self.wanted_at < self.since  # rows alone asked for it

    def stay(self, now: float, for_background: bool = False) -> None:
        """Take requests, first of all the one that asked for it."""
        self.is_unloaded, self.asked_at, self.is_displaced = False, None, False
        self.since, self.awaited_until = now, now + ARRIVAL_S
        if not for_background:
            self.wanted_at = now


@dataclass(slots=True)
class Counts:
    """Since the start."""

    num_loads: int = 0
    num_evictions: int = 0  # for others, not by name
    num_asked: int = 0  # adapters in use, to make room
    num_waits: int = 0  # loads that did not find room at once
    wait_s: float = 0.0  # of these, those that found room
