"""Grows the drafts of a step, position by position, and decides how many rows each gets.

All sequences grow together because their heads run as one batch. A draft goes on while its survival is not far below
the price of a row and the guesses of the next position are expected to bring more than their own time costs. From what
was grown the best prefix in order of survival is verified (`budget`): the order in which a heap over the sequences'
next positions would admit them, since survival never rises within a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from ..drafters.acceptance import SharedAcceptance
from ..drafters.chooser import DraftChooser
from ..drafters.grammar_source import Constraint
from ..drafters.protocol import DraftSource, SteppedHeads
from .budget import ENTER_GAIN, best_prefix
from .cost_model import MeanSeconds
from .drafts import Clock, GrowingDraft, StepPlan
from .stepped_heads import HeadSteps

_LEAST_LOOK = 8  # rows ahead, at least, over which a cheap region counts
# A draft grows down to this share of a row's price: dear rows may be paid for by cheap ones behind them. On random
# staircases 0.5 loses 0.24% of the best rate on average, 1 loses 0.35% and asks for a tenth fewer guesses.
_SLACK = 0.5


class DraftGrowth:
    """The reference of `Growth`, and what serves without a C++ compiler. Owns what drafting itself costs.

    `heads` are those that guess here, between the other sources; None where heads draft by themselves.
    """

    def __init__(self, heads: SteppedHeads | None, clock: Clock = time.perf_counter) -> None:
        self.heads = heads
        self.row_price = 0.0
        self._clock = clock
        self._ask_s = MeanSeconds()  # one position of one sequence, heads left out
        self._head_steps = HeadSteps(heads, clock)
        self._drafted_last = True
        self._grown: list[list[int]] = []  # in the latest step

    def chooser(
        self,
        sources: Sequence[DraftSource],
        shared: SharedAcceptance,
        constraint: Constraint | None,
        is_traced: bool = False,
    ) -> DraftChooser:
        return DraftChooser(sources, shared, constraint, is_traced)

    def observe(self, drafts: Sequence[GrowingDraft], committed: Sequence[Sequence[int]]) -> None:
        for draft, tokens in zip(drafts, committed, strict=True):
            _chooser_of(draft).observe(tokens)

    def grow(self, drafts: Sequence[GrowingDraft], plan: StepPlan) -> None:
        """Set `num_admitted` of every draft."""
        start = self._clock()
        for draft in drafts:
            assert draft.item is not None
            _chooser_of(draft).begin(draft.item.seq.tokens)
        candidates = self._candidates(list(drafts), plan)
        num_fixed = sum(draft.is_fixed for _, draft in candidates)
        base_tokens = plan.num_decoding + _sum(survival for survival, draft in candidates if draft.is_fixed)
        # Stable: of one sequence's equal survivals the earlier position comes first.
        auto = sorted((c for c in candidates if not c[1].is_fixed), key=lambda c: -c[0])
        plan.draft_s = self._clock() - start
        num_auto = best_prefix(
            [survival for survival, _ in auto],
            base_tokens,
            lambda num: plan.seconds(num_fixed + num) + plan.draft_s,
            enter_gain=0.0 if self._drafted_last else ENTER_GAIN,
        )
        for draft in drafts:
            draft.num_admitted = len(_chooser_of(draft).tokens) if draft.is_fixed else 0
        expected = base_tokens
        for survival, draft in auto[:num_auto]:
            draft.num_admitted += 1
            expected += survival
        self._drafted_last = num_fixed + num_auto > 0
        self._grown = [_chooser_of(draft).tokens for draft in drafts]
        self._set_price(plan, num_fixed + num_auto, expected)

    def has_beyond(self, vocab_size: int) -> bool:
        return any(not 0 <= token < vocab_size for tokens in self._grown for token in tokens)

    def _candidates(self, growing: list[GrowingDraft], plan: StepPlan) -> list[tuple[float, GrowingDraft]]:
        """Every position worth considering: (survival, draft), position by position."""
        candidates: list[tuple[float, GrowingDraft]] = []
        expected, num_rows = float(plan.num_decoding), plan.num_rows
        price = self._price(plan, expected, num_rows, len(growing))
        self._run_heads(growing, True)
        while growing:
            start, still = self._clock(), []
            for draft in growing:
                if num_rows >= plan.max_rows:
                    break
                chooser = _chooser_of(draft)
                if not chooser.extend(0.0 if draft.is_fixed else _SLACK * price):
                    continue
                num_rows, expected = num_rows + 1, expected + chooser.survival
                candidates.append((chooser.survival, draft))
                if len(chooser.tokens) < draft.limit:
                    still.append(draft)
            self._ask_s.observe((self._clock() - start) / len(growing))
            if num_rows >= plan.max_rows:
                break
            price = self._price(plan, expected, num_rows, len(still))
            rate = expected / plan.seconds(num_rows - plan.num_rows)
            growing = self._worth_going_on(still, price, rate)
            self._run_heads(growing, False)
        self._head_steps.clear()
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
        auto = [draft for draft in drafts if not draft.is_fixed and _chooser_of(draft).survival >= _SLACK * price]
        choosers = [_chooser_of(draft) for draft in auto]
        gain = _sum(chooser.next_rate() * max(0.0, chooser.survival - price) for chooser in choosers)
        head_s = self._head_steps.seconds if any(chooser.has_head for chooser in choosers) else 0.0
        if gain < rate * (head_s + self._ask_s.seconds * len(auto)):
            return fixed
        return [*fixed, *auto]

    def _run_heads(self, drafts: Sequence[GrowingDraft], starts: bool) -> None:
        self._head_steps.run([_chooser_of(draft) for draft in drafts], starts)

    def _set_price(self, plan: StepPlan, num_drafts: int, expected: float) -> None:
        room = plan.max_rows - plan.num_rows - num_drafts
        if room > 0 and plan.num_decoding:
            row_s = plan.curve.row_seconds(plan.num_rows + num_drafts, min(room, _LEAST_LOOK))
            self.row_price = expected * row_s / plan.seconds(num_drafts)


def _chooser_of(draft: GrowingDraft) -> DraftChooser:
    assert isinstance(draft.chooser, DraftChooser)
    return draft.chooser


def _sum(values: Iterable[float]) -> float:
    """One after the other, as native code does it; newer Pythons' own sum is another one."""
    total = 0.0
    for value in values:
        total += value
    return total
