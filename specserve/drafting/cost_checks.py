"""Looks now and then whether steps still stand to each other as the table says; else all of it is timed again.

What was measured beside other processes makes rows that arithmetic takes look too dear, and rows that look dear are
never tried, so no step would find out. Owns when to look: soon after the start, then ever more seldom, and so that
looks take little of the time. Each turn times one shape, so that whoever comes meanwhile waits for no more than that.
No torch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from .cost_model import MEASURED_SHAPES, CostModel, MeasuredCosts, MeasuredShape
from .kept_costs import ALWAYS, CHECKS, has_tilted

logger = logging.getLogger(__name__)

FIRST_S, MOST_S = 5.0, 300.0  # between looks
_PAUSES = 100.0  # and as many times as long as they took
_REPEATS = 5  # of each shape; the fastest counts

Fastest = dict[MeasuredShape, float]


class SpareStep(Protocol):
    """Seconds of a step as `TimedStep` has it, None if it was ended for a request."""

    def __call__(self, num_rows: int, num_seqs: int = 1, context_len: int = 0) -> float | None: ...


class CostChecks:
    """Of one table; `keep` takes what was measured anew."""

    def __init__(
        self,
        table: CostModel,
        timed_step: SpareStep,
        keep: Callable[[MeasuredCosts], None] = lambda costs: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._table, self._timed_step, self._keep, self._clock = table, timed_step, keep, clock
        self._is_busy, self._spent_s = False, 0.0
        self._turns = self._look_again()

    def take_turn(self, is_busy: bool = False) -> None:
        """To be called again and again while there is nothing to do, and once a second where it `is_busy`."""
        self._is_busy = is_busy
        next(self._turns)

    def _look_again(self) -> Generator[None, None, None]:
        pause_s = FIRST_S
        while True:
            due = self._clock() + max(pause_s, _PAUSES * self._spent_s)
            while self._clock() < due:
                yield
            self._spent_s = 0.0
            found = yield from self._fastest(ALWAYS, CHECKS)
            if found is None:
                continue
            pause_s = min(2 * pause_s, MOST_S)
            changes = [math.log(seconds / self._table.seconds(shape[0])) for shape, seconds in found.items()]
            if not has_tilted(changes):
                continue
            found = yield from self._fastest(MEASURED_SHAPES, _REPEATS)
            if found is not None:
                logger.info("steps stand to each other in another way than at the start, and were timed again")
                costs = MeasuredCosts.of(found)
                self._table.replace(costs)
                self._keep(costs)
                pause_s = FIRST_S

    def _fastest(self, shapes: Sequence[MeasuredShape], repeats: int) -> Generator[None, None, Fastest | None]:
        """Seconds of the fastest repeat of each, a turn of its own; None once one was ended."""
        found: Fastest = {}
        for _ in range(repeats):
            for shape in shapes:
                for _ in range(1 if self._is_busy else 2):  # the first one wakes cores and threads
                    seconds = self._timed_step(*shape)
                    if seconds is None:
                        yield  # to whoever has come
                        return None
                    self._spent_s += seconds
                    found[shape] = min(seconds, found.get(shape, seconds))
                yield
        return found
