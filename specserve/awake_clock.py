"""Time that a process was awake, for timeouts that must not count the time in which it was stopped itself.

A process that was suspended, or whose loop a handler held up, sees one long gap on waking. What others did meanwhile
it cannot know yet: their messages still wait to be read.
"""

from __future__ import annotations

import time


class AwakeClock:
    """Seconds, counted at every `tick`; of a longer gap than two usual ones only those two count."""

    def __init__(self, tick_s: float):
        self._longest_s = 2 * tick_s
        self._last = time.monotonic()
        self.seconds = 0.0

    def tick(self) -> float:
        """Call about every `tick_s`; returns the seconds so far."""
        now = time.monotonic()
        self.seconds += min(now - self._last, self._longest_s)
        self._last = now
        return self.seconds
