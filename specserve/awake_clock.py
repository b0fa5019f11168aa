"""Time that a process had for itself, for timeouts that must not count what others took from it.

A process that was suspended, or whose loop a handler held up, sees one long gap on waking. What others did meanwhile
it cannot know yet: their messages still wait to be read. And on a machine with more to do than cores, a thread that
could go on waits for its turn; Linux counts for how long.
"""

from __future__ import annotations

import os
import time


class AwakeClock:
    """Seconds, counted at every `tick`; of a longer gap than two usual ones only those two count."""

    def __init__(self, tick_s: float):
        self._longest_s = 2 * tick_s
        self._last = time.monotonic()
        self.seconds = 0.0

    def tick(self, without_core_s: float = 0.0) -> float:
        """Call about every `tick_s`; returns the seconds so far, of which those without a core are none."""
        now = time.monotonic()
        self.seconds += max(0.0, min(now - self._last, self._longest_s) - without_core_s)
        self._last = now
        return self.seconds


class CoreWaits:
    """How long threads of this process were ready to run and had no core; nothing where the system does not say."""

    def __init__(self, tasks: str = "/proc/self/task"):
        self._tasks = tasks
        self._last: dict[str, int] = {}  # thread -> nanoseconds
        self.take()

    def take(self) -> float:
        """Seconds since the last call of the thread that waited longest: a step goes on when its last thread does."""
        waits: dict[str, int] = {}
        try:
            for thread in os.listdir(self._tasks):
                try:
                    with open(f"{self._tasks}/{thread}/schedstat") as file:
                        waits[thread] = int(file.read().split()[1])
                except (FileNotFoundError, ProcessLookupError):  # it has ended, or the system does not count
                    continue
        except (OSError, ValueError, IndexError):
            return 0.0
        longest = max((wait - self._last.get(thread, 0) for thread, wait in waits.items()), default=0)
        self._last = waits
        return longest / 1e9
