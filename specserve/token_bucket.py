"""Token buckets: so many units a minute, refilled evenly, over a clock that is given.

A bucket of our own: aiolimiter waits instead of refusing, and neither it nor `limits` takes anything back;
pyrate-limiter keeps an entry in memory for every token.
"""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
MINUTE_S = 60.0
_ROUNDING = 1e-6  # of sums of refills: who waits as long as was said is served


class Bucket:
    """`per_minute` units when full. `level` is below zero while there is a debt."""

    def __init__(self, per_minute: int, clock: Clock):
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        refilled = (now - self._at) * self.per_minute / MINUTE_S
        self._level, self._at = min(self._level + refilled, float(self.per_minute)), now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there, 0 when it is; more than the bucket holds counts as all that it holds."""
        missing = min(amount, self.per_minute) - self.level
        return missing * MINUTE_S / self.per_minute if missing > _ROUNDING else 0.0

    def take(self, amount: float) -> None:
        """A negative amount gives back."""
        self._level = min(self.level - amount, float(self.per_minute))

    def resize(self, per_minute: int) -> None:
        """What is used stays used."""
        used = self.per_minute - self.level
        self.per_minute, self._level = per_minute, per_minute - used
