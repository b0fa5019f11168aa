"""Which rows of a step belong to which adapter slot: built once a step, read by every LoRA launch of every layer.

Owns the row layout only and knows no weights. Invariants: the segments cover all T rows in order, neighbouring segments
have different slots, none is empty, and slot -1 (no adapter) appears in no plan, so that such rows cost
nothing and are never written.

For the torch path on the CPU; on a GPU tiles play this part (tiles.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

PlanKey = tuple[tuple[int, ...], int]

# Reading one adapter's weights costs a CPU launch as much as this many rows of work with them. Measured with 8 adapters
# of rank 16 on all modules of SmolLM2-135M, per fused linear and adapter: 23 us for 1 row, 3.6 us for each further row.
MEMBER_ROWS = 6


@dataclass(frozen=True, slots=True)
class Launch:
    """One batched product: members lo..hi of a rank group, each with `width` rows (padded where it has fewer)."""

    lo: int
    hi: int
    width: int
    rows: slice | None  # where the rows stand if they are adjacent in x and y, in order; else None
    gather: torch.Tensor | None  # [(hi - lo) * width] int64, rows of x; padding repeats a row. None: x[rows] as it is
    valid: torch.Tensor | None  # [rows] int64, which results are no padding; None: all of them
    scatter: torch.Tensor | None  # [rows] int64, rows of y; None exactly when `rows` is not


@dataclass(frozen=True, slots=True)
class Segments:
    """Maximal runs of rows with one adapter slot. Letters: T rows, S segments."""

    starts: tuple[int, ...]  # [S + 1] first row of each segment, then T
    slots: tuple[int, ...]  # [S] adapter slot, -1 = no adapter
    num_slots: int
    has_adapters: bool
    _plans: dict[PlanKey, tuple[Launch, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        return self.starts[-1]

    @classmethod
    def build(cls, runs: Sequence[tuple[int, int]], num_slots: int) -> Segments:
        """Segments of `runs`, (slot, number of rows) in row order; equal neighbours are merged, empty runs dropped.

        Slots are -1 or in [0, num_slots).
        """
        starts: list[int] = [0]
        slots: list[int] = []
        for slot, num_rows in runs:
            assert -1 <= slot < num_slots and num_rows >= 0, (slot, num_rows, num_slots)
            if num_rows == 0:
                continue
            if slots and slots[-1] == slot:
                starts[-1] += num_rows
            else:
                starts.append(starts[-1] + num_rows)
                slots.append(slot)
        return cls(tuple(starts), tuple(slots), num_slots, any(slot >= 0 for slot in slots))

    def select(self, rows: Sequence[int]) -> Segments:
        """The segments of a subset of rows, ascending: row i of the result is row `rows[i]` of these."""
        runs = [(self.slots[bisect_right(self.starts, row) - 1], 1) for row in rows]
        return Segments.build(runs, self.num_slots)

    def plan(self, members: tuple[int, ...], launch_rows: int) -> tuple[Launch, ...]:
        """How to serve the slots `members`, whose weights are stacked in this order, in few batched products.

        A launch covers adjacent members only, so that the stacked weights are sliced and never copied. Members without
        rows inside a launch, and members with fewer rows than its longest, are padded where that is cheaper than more
        launches; a launch costs as much as `launch_rows` rows of work, and padding, which copies rows, as much again.
        """
        key = members, launch_rows
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = tuple(self._launches(members, launch_rows))
        return plan

    def _launches(self, members: tuple[int, ...], launch_rows: int) -> list[Launch]:
        member_of = {slot: member for member, slot in enumerate(members)}
        rows_of: dict[int, list[int]] = {}
        for start, end, slot in zip(self.starts, self.starts[1:], self.slots, strict=False):
            if slot in member_of:
                rows_of.setdefault(member_of[slot], []).extend(range(start, end))
        active = sorted(rows_of)
        # best[j], cut[j]: the least cost of active[:j], and where its last launch begins.
        best, cut = [0], [0]
        for j in range(1, len(active) + 1):
            width = num_rows = 0
            costs = []
            for i in range(j - 1, -1, -1):
                width, num_rows = max(width, len(rows_of[active[i]])), num_rows + len(rows_of[active[i]])
                num_members = active[j - 1] + 1 - active[i]
                padding = launch_rows if num_rows < num_members * width else 0
                costs.append((best[i] + launch_rows + num_members * (MEMBER_ROWS + width) + padding, i))
            cost, i = min(costs)
            best.append(cost)
            cut.append(i)
        launches, j = [], len(active)
        while j:
            i = cut[j]
            launches.append(_launch(active[i], active[j - 1] + 1, rows_of))
            j = i
        return launches[::-1]


def _launch(lo: int, hi: int, rows_of: dict[int, list[int]]) -> Launch:
    width = max(len(rows_of.get(member, ())) for member in range(lo, hi))
    rows = [row for member in range(lo, hi) for row in rows_of.get(member, ())]
    adjacent = slice(rows[0], rows[0] + len(rows)) if rows == list(range(rows[0], rows[0] + len(rows))) else None
    full = len(rows) == (hi - lo) * width
    gather: list[int] = []
    valid: list[int] = []
    if not (full and adjacent):
        for member in range(lo, hi):
            own = rows_of.get(member, [])
            valid += range(len(gather), len(gather) + len(own))
            gather += own + [rows[0]] * (width - len(own))
    return Launch(
        lo,
        hi,
        width,
        adjacent,
        gather=torch.tensor(gather) if gather else None,
        valid=None if full else torch.tensor(valid),
        scatter=None if adjacent else torch.tensor(rows),
    )
