"""What a row of a forward costs, measured once at start, and hence what a draft must be worth.

A draft row pays when the tokens it is expected to add exceed what the same time would produce otherwise. With step time
t(rows) and n sequences decoding, that price is n * (t(rows + 1) - t(rows)) / t(rows) tokens. It grows with load: at one
sequence long shots pay, at many only near-certain drafts do.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

MEASURED_ROWS = (1, 2, 4, 8, 16, 32)


class CostModel:
    """Step time by number of rows, interpolated between measurements and extrapolated beyond the last."""

    def __init__(self, seconds_by_rows: dict[int, float]):
        self._rows = sorted(seconds_by_rows)
        times = [seconds_by_rows[rows] for rows in self._rows]
        # More rows never cost less; a dip is noise of the measurement.
        self._times = [max(times[: idx + 1]) for idx in range(len(times))]

    @classmethod
    def measure(cls, timed_step: Callable[[int], float], repeats: int = 3) -> CostModel:
        """`timed_step(rows)` runs a step of that many rows and returns its seconds; the fastest repeat counts."""
        timed_step(MEASURED_ROWS[0])
        return cls({rows: min(timed_step(rows) for _ in range(repeats)) for rows in MEASURED_ROWS})

    def seconds(self, num_rows: int) -> float:
        rows, times = self._rows, self._times
        if len(rows) == 1:
            return times[0]
        idx = min(max(bisect.bisect_left(rows, num_rows), 1), len(rows) - 1)
        slope = (times[idx] - times[idx - 1]) / (rows[idx] - rows[idx - 1])
        return times[idx - 1] + slope * (num_rows - rows[idx - 1])

    def row_price(self, num_decoding: int, num_rows: int, num_drafts: int = 4) -> float:
        """Expected tokens that one more draft row must add, averaged over `num_drafts` rows: steps are not smooth."""
        base = self.seconds(num_rows)
        marginal = (self.seconds(num_rows + num_drafts) - base) / num_drafts
        return num_decoding * marginal / base
