"""What a step took, from the tokens of the one before to its own, and how much of that device or host stood idle.

On a CPU a step is what its own call took. On a device that runs by itself the work that the host does between two steps
belongs to the later one, which had to wait for it unless it was queued ahead.
"""

from __future__ import annotations

from collections.abc import Callable

from ..drafting.step_costs import StepSeconds
from .queued_step import QueuedStep


class StepTimes:
    """Of one step after the other, in seconds of `clock`."""

    def __init__(self, clock: Callable[[], float], is_asynchronous: bool):
        self.clock, self._is_asynchronous = clock, is_asynchronous
        self._last: float | None = None  # when the step before was over; None: nothing was there to do since
        self._waits_from = self._known_at = 0.0

    def start_waiting(self) -> None:
        self._waits_from = self._known_at = self.clock()

    def know(self) -> None:
        """The tokens are here."""
        self._known_at = self.clock()

    def end(self, step: QueuedStep, goes_on: bool) -> StepSeconds:
        """Of a step that is committed; whether another one follows at once."""
        last = step.queued_at if self._last is None else self._last
        if not self._is_asynchronous:
            self._last = now = self.clock()
            return StepSeconds(now - max(step.queued_at, last))
        self._last = self._known_at if goes_on else None
        gap = 0.0 if step.is_ahead else max(0.0, step.launched_at - last)
        return StepSeconds(self._known_at - last, gap, self._known_at - self._waits_from)
