"""Grows the drafts of a step, position by position, and decides how many rows each gets.

All sequences grow together because their heads run as one batch. A draft goes on while its survival is not far below
the price of a row and the guesses of the next position are expected to bring more than their own time costs. From what
was grown the best prefix in order of survival is verified (`budget`): the order in which a heap over the sequences'
next positions would admit them, since survival never rises within a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..drafters.chooser import DraftChooser
from ..drafters.head_source import HeadSource
from ..drafters.protocol import SteppedHeads
from ..schedule.scheduler import ScheduledSequence
from .budget import ENTER_GAIN, best_prefix
from .cost_model import CostModel, MeanSeconds, StepCurve, StepShape
from .switch import DraftSwitch

_LEAST_LOOK = 8  # rows ahead, at least, over which a cheap region counts
# A draft grows down to this share of a row's price: dear rows may be paid for by cheap ones behind them. On random
# staircases 0.5 loses 0.24% of the best rate on average, 1 loses 0.35% and asks for a tenth fewer guesses.
_SLACK = 0.5


@dataclass(slots=True)
class GrowingDraft:
    """One sequence's draft in this step."""

    item: ScheduledSequence
    chooser: DraftChooser
    limit: int  # tokens
    is_fixed: bool  # takes what its sources say, whatever it costs
    switch: DraftSwitch
    num_admitted: int = 0
    num_accepted: int = 0


@dataclass(slots=True)
class StepPlan:
    """What a step was before its drafts; seconds are expected ones but for `draft_s`."""

    shape: StepShape
    curve: StepCurve
    num_decoding: int  # sequences whose newest token is among the rows
    num_rows: int
    max_rows: int
    draft_s: float = 0.0

    def seconds(self, num_drafts: int) -> float:
        """Rows of prompts that share the step make a draft's row as costly as it is on top of them, but are no part of
        the step's time: without the draft, its token would come from a later step that only decodes."""
        curve, rows = self.curve, self.num_rows
        return curve.seconds(self.num_decoding) + curve.seconds(rows + num_drafts) - curve.seconds(rows)


class DraftGrowth:
    """Owns what drafting itself costs; `cost_model` says what rows cost.

    `heads` are those that guess here, between the other sources; None where heads draft by themselves.
    """

    def __init__(self, cost_model: CostModel, heads: SteppedHeads | None) -> None:
        self.cost_model = cost_model
        self.heads = heads
        self.row_price = 0.0  # tokens that the next row of the latest step had to bring
        self._ask_s = MeanSeconds()  # one position of one sequence, heads left out
        self._head_s: dict[int, MeanSeconds] = {}  # one step of the heads, by bit length of their number
        self._num_asked = 0  # heads, in the latest draft
        self._drafted_last = True

    def grow(self, drafts: Sequence[GrowingDraft], plan: StepPlan) -> None:
        """Set `num_admitted` of every draft."""
        start = time.perf_counter()
        for draft in drafts:
            draft.chooser.begin(draft.item.seq.tokens)
        candidates = self._candidates(list(drafts), plan)
        num_fixed = sum(draft.is_fixed for _, draft in candidates)
        base_tokens = plan.num_decoding + sum(survival for survival, draft in candidates if draft.is_fixed)
        # Stable: of one sequence's equal survivals the earlier position comes first.
        auto = sorted((c for c in candidates if not c[1].is_fixed), key=lambda c: -c[0])
        plan.draft_s = time.perf_counter() - start
        num_auto = best_prefix(
            [survival for survival, _ in auto],
            base_tokens,
            lambda num: plan.seconds(num_fixed + num) + plan.draft_s,
            enter_gain=0.0 if self._drafted_last else ENTER_GAIN,
        )
        for draft in drafts:
            draft.num_admitted = len(draft.chooser.tokens) if draft.is_fixed else 0
        expected = base_tokens
        for survival, draft in auto[:num_auto]:
            draft.num_admitted += 1
            expected += survival
        if drafts:
            self._drafted_last = num_fixed + num_auto > 0
        self._set_price(plan, num_fixed + num_auto, expected)

    def _candidates(self, growing: list[GrowingDraft], plan: StepPlan) -> list[tuple[float, GrowingDraft]]:
        """Every position worth considering: (survival, draft), position by position."""
        candidates: list[tuple[float, GrowingDraft]] = []
        expected, num_rows = float(plan.num_decoding), plan.num_rows
        price = self._price(plan, expected, num_rows, len(growing))
        self._run_heads(growing, starts=True)
        while growing:
            start, still = time.perf_counter(), []
            for draft in growing:
                if num_rows >= plan.max_rows:
                    break
                chooser = draft.chooser
                if not chooser.extend(0.0 if draft.is_fixed else _SLACK * price):
                    continue
                num_rows, expected = num_rows + 1, expected + chooser.survival
                candidates.append((chooser.survival, draft))
                if len(chooser.tokens) < draft.limit:
                    still.append(draft)
            self._ask_s.observe((time.perf_counter() - start) / len(growing))
            if num_rows >= plan.max_rows:
                break
            price = self._price(plan, expected, num_rows, len(still))
            rate = expected / plan.seconds(num_rows - plan.num_rows)
            growing = self._worth_going_on(still, price, rate)
            self._run_heads(growing)
        if self.heads is not None:
            self.heads.clear()
        return candidates

    def _price(self, plan: StepPlan, expected: float, num_rows: int, num_growing: int) -> float:
        """Tokens that a further row has to bring to raise the rate."""
        room = min(plan.max_rows - num_rows, max(_LEAST_LOOK, num_growing))
        if room < 1 or not num_growing:
            return 1.0
        return expected / plan.seconds(num_rows - plan.num_rows) * plan.curve.row_seconds(num_rows, room)

    def _worth_going_on(self, drafts: list[GrowingDraft], price: float, rate: float) -> list[GrowingDraft]:
        """The drafts whose next position is worth a guess: it has to bring more tokens than its time would.

        Guesses are near certain or worth nothing, by and large, so the expected gain is the share of certain ones.
        """
        fixed = [draft for draft in drafts if draft.is_fixed]
        auto = [draft for draft in drafts if not draft.is_fixed and draft.chooser.survival >= _SLACK * price]
        gain = sum(draft.chooser.next_rate() * max(0.0, draft.chooser.survival - price) for draft in auto)
        head_s = self._head_seconds() if any(draft.chooser.has_head for draft in auto) else 0.0
        if gain < rate * (head_s + self._ask_s.seconds * len(auto)):
            return fixed
        return [*fixed, *auto]

    def _head_seconds(self) -> float:
        bucket = self._num_asked.bit_length()
        nearest = min(self._head_s, key=lambda b: abs(b - bucket), default=None)
        return self._head_s[nearest].seconds if nearest is not None else 0.0

    def _run_heads(self, drafts: Sequence[GrowingDraft], starts: bool = False) -> None:
        """One step of the heads; if it fails, these sequences go on without theirs."""
        if self.heads is None:
            return
        sources = [(d.chooser, s) for d in drafts for s in d.chooser.sources if isinstance(s, HeadSource)]
        if not sources:
            return
        try:
            if starts:
                self.heads.begin([source for _, source in sources])
                self._num_asked = len(sources)
            start = time.perf_counter()
            self.heads.step([source for _, source in sources])
            times = self._head_s.setdefault(self._num_asked.bit_length(), MeanSeconds())
            times.observe(time.perf_counter() - start)
        except Exception:
            self.heads.clear()
            for chooser, source in sources:
                chooser.remove_source(source)

    def _set_price(self, plan: StepPlan, num_drafts: int, expected: float) -> None:
        room = plan.max_rows - plan.num_rows - num_drafts
        if room > 0 and plan.num_decoding:
            row_s = plan.curve.row_seconds(plan.num_rows + num_drafts, min(room, _LEAST_LOOK))
            self.row_price = expected * row_s / plan.seconds(num_drafts)
