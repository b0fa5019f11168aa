"""What a row of a forward costs, measured once at start, and hence what a draft must be worth.

A step that verifies e expected tokens (one a sequence and the survival of each draft so far) in t seconds makes e / t
tokens a second. One more draft row raises that if its survival exceeds e * dt / t, where dt is the time that the row
adds: its price. It grows with load, and with what is drafted already: at one sequence long shots pay, at many only
near-certain drafts do.

Rows of prompts that share the step add to dt, as the row comes on top of them, but not to t: without the draft its
token would be decoded in a later step, at the price of decoding.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64)


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

    def row_price(self, expected_tokens: float, decode_rows: int, num_rows: int, num_drafts: int = 4) -> float:
        """Tokens that one more row must be expected to add to a step of `num_rows`, `decode_rows` of them decoding.

        Its cost is the average over `num_drafts` rows: step times are not smooth.
        """
        marginal = (self.seconds(num_rows + num_drafts) - self.seconds(num_rows)) / num_drafts
        return expected_tokens * marginal / self.seconds(decode_rows)
