"""How many tokens a second a replica can give, by what it gave while it owed some.

A replica with little to do gives few however fast it is, so the best recent stretch counts; it is forgotten slowly.
"""

from __future__ import annotations

FIRST_PACE = 500.0  # tokens a second, until something was given
STRETCH_S = 2.0  # of time in which it owed something
KEPT = 0.95  # of the pace, with each stretch that was no better


class Pace:
    """Of one replica."""

    def __init__(self, tokens_per_s: float = FIRST_PACE):
        self.tokens_per_s = tokens_per_s
        self._last_s: float | None = None
        self._busy_s, self._done = 0.0, 0

    def moved(self, now_s: float, *, is_busy: bool, done: int = 0) -> None:
        """A request came or ended; it owed something since the last one did if it `is_busy`."""
        if is_busy and self._last_s is not None:
            self._busy_s += max(0.0, now_s - self._last_s)
        self._last_s = now_s
        self._done += done
        if self._busy_s >= STRETCH_S:
            self.tokens_per_s = max(self._done / self._busy_s, KEPT * self.tokens_per_s, 1.0)
            self._busy_s, self._done = 0.0, 0
