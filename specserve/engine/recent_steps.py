"""The latest steps, for those who watch: what each took and gave, and what the cost table says of it without drafts.

Owns a ring of them and two sums since the engine started. Costs a step some microseconds; what a reader gets is made
when somebody asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from msgspec.structs import replace

from ..drafting.cost_model import CostModel, StepShape
from ..drafting.drafts import StepPlan
from ..stats_messages import CostTable, RecentStep
from .queued_step import QueuedStep

MAX_STEPS = 64


class RecentSteps:
    """`table` is what steps without drafts are priced by; times are of a monotonic clock."""

    def __init__(self, table: CostModel, clock: Callable[[], float] = time.monotonic):
        self.seconds = 0.0
        self.no_draft_tokens = 0.0
        self._table, self._clock = table, clock
        self._steps: deque[tuple[float, RecentStep]] = deque(maxlen=MAX_STEPS)
        self._plan: StepPlan | None = None  # of the latest step that had one

    def add(self, step: QueuedStep, seconds: float) -> None:
        """A step that is over and took so long, drafting included."""
        if seconds <= 0.0:
            return
        num_drafts = sum(step.verified.num_drafts)
        rate = step.num_tokens / seconds
        if step.proposed is not None:
            self._plan = plan = step.proposed.plan
            if step.proposed.num_asked:  # else nothing was spent on drafts: it is such a step
                rate = plan.num_decoding / (plan.seconds(0) + plan.prompt_seconds(0))
        self.seconds += seconds
        self.no_draft_tokens += rate * seconds
        told = RecentStep(
            ago_s=0.0,
            num_sequences=len(step.items),
            num_rows=step.num_rows + num_drafts,
            num_drafts=num_drafts,
            seconds=seconds,
            no_draft_tokens_per_s=rate,
            tokens=step.num_tokens,
        )
        self._steps.append((self._clock(), told))

    def taken(self) -> list[RecentStep]:
        """Those of the ring, oldest first."""
        now = self._clock()
        return [replace(step, ago_s=now - ended_at) for ended_at, step in self._steps]

    def cost_table(self) -> CostTable:
        """Of steps like the latest that was planned: its sequences, adapters and contexts; beside a device its host."""
        plan = self._plan
        if plan is None:
            return CostTable(*self._table.curve(StepShape()).nodes)
        return CostTable(*plan.curve.nodes, plan.shape.num_seqs, plan.shape.num_adapters)
