"""What a step costs: a table seconds[rows][distinct adapters], measured at start and refined by every real step.

The rows axis, a sequence's fixed share and the cost of attention over long contexts are measured at start, on the bare
base. The adapter axis is learned online: at start nobody knows the ranks and modules of the adapters to come, a draft
never changes how many adapters its step holds, and so all that matters of a column is its shape over rows.

A machine's speed drifts as a whole; that is one factor, which follows fast, so that the cells, which follow slowly,
learn from contrasts between steps that lie close in time. Logarithms of the surprise are clipped before either moves:
a step that was not scheduled for a second counts as one slow step. Invariant: more rows never cost less. No torch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
MEASURED_ROWS = NODES[:7]
MEASURED_SEQS = 8  # of the step that measures what a sequence costs
_CONTEXT_LEN = 512  # keys of the steps that measure what context costs
_SPEED_RATE, _CELL_RATE = 0.2, 0.1  # share of a surprise that each takes over
_MAX_SURPRISE = 0.3  # natural log: a step counts as at most 35% slower or faster than expected
# Cells further off move this share of their neighbour's move. If they stood still, one that no step visits, such
# as that of 2 rows where steps have 1 or 13, would come to look dear or free beside those that are visited.
_SPREAD = 0.7
_MAX_CORRECTION = 2.0  # and a cell as at most 7 times what was measured at start


MeasuredShape = tuple[int, int, int]  # rows, sequences, keys of each sequence's context
APART, ONE_AHEAD, ROWS_AHEAD = (8, MEASURED_SEQS, 0), (1, 1, _CONTEXT_LEN), (8, 1, _CONTEXT_LEN)
MEASURED_SHAPES: tuple[MeasuredShape, ...] = (
    *((rows, 1, 0) for rows in MEASURED_ROWS),
    APART,
    ONE_AHEAD,
    ROWS_AHEAD,
)


class TimedStep(Protocol):
    """Seconds of a step of `num_rows` rows, split evenly over sequences that have `context_len` keys each already."""

    def __call__(self, num_rows: int, num_seqs: int = 1, context_len: int = 0) -> float: ...


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's time depends on beside its rows."""

    num_seqs: int = 1
    num_adapters: int = 0  # distinct
    num_keys: int = 0  # of all contexts together


class StepCurve:
    """Seconds by rows of steps of one shape, straight between the nodes and beyond the last one."""

    __slots__ = ("_rows", "_times")

    def __init__(self, rows: list[int], times: list[float]):
        self._rows, self._times = rows, times

    @property
    def nodes(self) -> tuple[list[int], list[float]]:
        """Rows and seconds."""
        return self._rows, self._times

    def seconds(self, num_rows: int) -> float:
        rows, times = self._rows, self._times
        idx = bisect.bisect_left(rows, num_rows)
        idx = 1 if idx < 1 else min(idx, len(rows) - 1)
        low = rows[idx - 1]
        if num_rows <= low:
            return times[idx - 1]
        return times[idx - 1] + (times[idx] - times[idx - 1]) * (num_rows - low) / (rows[idx] - low)

    def row_seconds(self, num_rows: int, room: int) -> float:
        """The least that one more row may cost: the cheapest average over the next 1, 2, 4 .. up to `room` rows.

        Steps of time by rows are not smooth: a row that costs much may open a region where the next ones cost little.
        """
        here, ahead, least = self.seconds(num_rows), 1, math.inf
        while ahead <= room:
            least = min(least, (self.seconds(num_rows + ahead) - here) / ahead)
            ahead *= 2
        return least


class MeasuredCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured at start, in seconds, as it may be kept for the next one (`kept_costs.py`)."""

    by_rows: dict[int, float]
    sequence_s: float
    key_s: float
    row_key_s: float

    @classmethod
    def measure(cls, timed_step: TimedStep, repeats: int = 5) -> MeasuredCosts:
        """Time steps of several shapes; the fastest repeat counts.

        The shapes take turns, so that a busy moment of the machine spoils one repeat of each and not all of one: a
        shape that came out too dear would hardly be visited, and so stay so.
        """
        timed_step(MEASURED_ROWS[0])
        return cls.of(fastest_of(timed_step, MEASURED_SHAPES, repeats))

    @classmethod
    def of(cls, fastest: Mapping[MeasuredShape, float]) -> MeasuredCosts:
        """From the seconds of all `MEASURED_SHAPES`."""
        by_rows = {rows: fastest[rows, 1, 0] for rows in MEASURED_ROWS}
        key_s = max(0.0, fastest[ONE_AHEAD] - by_rows[1]) / _CONTEXT_LEN
        return cls(
            by_rows,
            sequence_s=max(0.0, fastest[APART] - by_rows[8]) / 7,
            key_s=key_s,
            row_key_s=max(0.0, (fastest[ROWS_AHEAD] - by_rows[8]) / _CONTEXT_LEN - key_s) / 7,
        )

    def seconds(self, shape: MeasuredShape) -> float:
        """What these say of a step of one of the `MEASURED_SHAPES`."""
        rows, num_seqs, context_len = shape
        attention_s = context_len * (self.key_s + (rows - 1) * self.row_key_s)
        return self.by_rows[rows] + (num_seqs - 1) * self.sequence_s + attention_s

    def scaled(self, factor: float) -> MeasuredCosts:
        """On a machine where everything takes `factor` times as long."""
        by_rows = {rows: factor * seconds for rows, seconds in self.by_rows.items()}
        return MeasuredCosts(by_rows, factor * self.sequence_s, factor * self.key_s, factor * self.row_key_s)


def fastest_of(timed_step: TimedStep, shapes: Sequence[MeasuredShape], repeats: int) -> dict[MeasuredShape, float]:
    """Seconds of the fastest repeat of each; they take turns."""
    turns = [[timed_step(*shape) for shape in shapes] for _ in range(repeats)]
    return dict(zip(shapes, map(min, zip(*turns, strict=True)), strict=True))


class CostModel:
    """The table; `seconds_by_rows` is what was measured at start, of one sequence without context or adapter."""

    def __init__(
        self,
        seconds_by_rows: Mapping[int, float],
        *,
        sequence_s: float = 0.0,
        key_s: float = 0.0,
        row_key_s: float = 0.0,
    ):
        self._begin(seconds_by_rows, sequence_s, key_s, row_key_s)

    def _begin(self, seconds_by_rows: Mapping[int, float], sequence_s: float, key_s: float, row_key_s: float) -> None:
        measured = sorted(seconds_by_rows)
        # More rows never cost less; a dip is noise of the measurement.
        times = [max(seconds_by_rows[rows] for rows in measured[: idx + 1]) for idx in range(len(measured))]
        known = StepCurve(measured, times) if len(measured) > 1 else StepCurve([*measured, NODES[-1]], times * 2)
        self._rows = measured + [rows for rows in NODES if rows > measured[-1]]
        self._base = [known.seconds(rows) for rows in self._rows]
        self._sequence_s, self._key_s, self._row_key_s = sequence_s, key_s, row_key_s
        self._columns: dict[int, list[float]] = {0: [0.0] * len(self._rows)}  # natural logs of corrections
        self._seconds = {0: list(self._base)}  # corrected, by column
        self._spreads = [_SPREAD**steps for steps in range(len(self._rows))]
        self._log_speed = 0.0

    @classmethod
    def of(cls, costs: MeasuredCosts) -> CostModel:
        return cls(costs.by_rows, sequence_s=costs.sequence_s, key_s=costs.key_s, row_key_s=costs.row_key_s)

    def replace(self, costs: MeasuredCosts) -> None:
        """Begin anew with what was measured now; what steps have taught was of the old numbers."""
        self._begin(costs.by_rows, costs.sequence_s, costs.key_s, costs.row_key_s)

    def seconds(self, num_rows: int, shape: StepShape = StepShape()) -> float:
        return self.curve(shape).seconds(num_rows)

    def curve(self, shape: StepShape) -> StepCurve:
        """Seconds by rows of steps of `shape`."""
        fixed = self._sequence_s * (shape.num_seqs - 1) + self._key_s * shape.num_keys
        row_s = self._row_key_s * shape.num_keys / max(1, shape.num_seqs)
        speed, times, top = math.exp(self._log_speed), [], 0.0
        num_seqs = shape.num_seqs
        for rows, seconds in zip(self._rows, self._seconds[self._nearest(shape.num_adapters)], strict=True):
            this = speed * (seconds + fixed + row_s * (rows - num_seqs))
            if this > top:
                top = this
            times.append(top)
        return StepCurve(self._rows, times)

    def observe(self, num_rows: int, shape: StepShape, seconds: float, expected: float | None = None) -> None:
        """Learn from a step of decodes and verifications; one that read prompts says nothing about its rows.

        `expected` is what `seconds` says of it, where the caller has asked already.
        """
        expected = self.seconds(num_rows, shape) if expected is None else expected
        if seconds <= 0.0 or expected <= 0.0:
            return
        surprise = math.log(seconds / expected)
        surprise = max(-_MAX_SURPRISE, min(_MAX_SURPRISE, surprise))
        self._log_speed += _SPEED_RATE * surprise
        bucket, nearest = _bucket(shape.num_adapters), self._nearest(shape.num_adapters)
        column = self._columns.setdefault(bucket, self._columns[nearest][:])
        times = self._seconds.setdefault(bucket, self._seconds[nearest][:])
        high = max(1, min(bisect.bisect_left(self._rows, num_rows), len(self._rows) - 1))
        low_rows, high_rows = self._rows[high - 1], self._rows[high]
        share = max(0.0, min(1.0, (num_rows - low_rows) / (high_rows - low_rows)))
        lower, upper = _CELL_RATE * (1.0 - share) * surprise, _CELL_RATE * share * surprise
        spreads = self._spreads
        for idx, base in enumerate(self._base):
            moved = column[idx] + (lower * spreads[high - 1 - idx] if idx < high else upper * spreads[idx - high])
            moved = column[idx] = max(-_MAX_CORRECTION, min(_MAX_CORRECTION, moved))
            times[idx] = base * math.exp(moved)

    def _nearest(self, num_adapters: int) -> int:
        """The column of so many adapters, or the nearest that was seen."""
        bucket = _bucket(num_adapters)
        return bucket if bucket in self._columns else min(self._columns, key=lambda b: abs(b - bucket))


class MeanSeconds:
    """A running mean of times that is not thrown off by a few that were long; the first ones count by their least."""

    _RATE = 0.1
    _FIRST = 3

    def __init__(self) -> None:
        self.seconds = 0.0
        self._num_seen = 0

    def observe(self, seconds: float) -> None:
        self._num_seen += 1
        if self._num_seen <= self._FIRST:
            self.seconds = min(seconds, self.seconds) if self._num_seen > 1 else seconds
        else:
            self.seconds += self._RATE * (min(seconds, 2 * self.seconds) - self.seconds)


def _bucket(num_adapters: int) -> int:
    """0, 1, 2-3, 4-7, 8-15 .. 64 and more."""
    return min(num_adapters, 64).bit_length()
