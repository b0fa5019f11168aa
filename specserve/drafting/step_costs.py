"""What steps cost, learned from each: the device's part by rows, the host's by sequences and drafts, drafting's own.

Plans of steps are made of it, and every adapter's switch is told what its sources brought for what they took. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..schedule.scheduler import ScheduledSequence
from .cost_model import CostModel, MeanSeconds, StepShape
from .drafts import GrowingDraft, StepPlan
from .host_cost import HostCost
from .switch import DraftSwitch

LEAST_WAIT = 0.1  # share of a step, from which on the host was waiting for the device and not only reading tokens


class StepSeconds(NamedTuple):
    """What a step took, drafting included."""

    total: float
    gap: float = 0.0  # of it the device did nothing, for want of what to do
    wait: float = 0.0  # of it the host did nothing, for want of the tokens


class Verified:
    """What a step's verification made of the drafts that were asked for."""

    def __init__(self) -> None:
        self.drafts: list[GrowingDraft] = []
        self.num_drafts: list[int] = []
        self.num_accepted: list[int] = []
        self.tokens: list[Sequence[int]] = []  # that their sequences have now

    def add(self, draft: GrowingDraft, num_drafts: int, num_accepted: int, tokens: Sequence[int]) -> None:
        self.drafts.append(draft)
        self.num_drafts.append(num_drafts)
        self.num_accepted.append(num_accepted)
        self.tokens.append(tokens)


@dataclass(slots=True)
class _Asked:
    """What a step's sequences of one switch came to."""

    num_seqs: int = 0
    drafted: int = 0
    accepted: int = 0


class StepCosts:
    """`table` is of what computes; `max_logits` rows have logits where a device's heads draft, None: any number."""

    def __init__(self, table: CostModel, is_asynchronous: bool, max_logits: int | None):
        self.table, self._max_logits = table, max_logits
        self._host = HostCost() if is_asynchronous else None  # before a step
        self._host_beside = HostCost() if is_asynchronous else None  # while the other half's step runs
        self._draft_s = MeanSeconds()  # all of drafting, one sequence

    def plan(self, items: Sequence[ScheduledSequence], max_rows: int, is_half: bool) -> StepPlan:
        """Of a step of these items before its drafts, or of half of the sequences while the others' step runs."""
        num_decoding = sum([item.reaches_end and item.seq.sampling.max_tokens > 0 for item in items])
        num_rows = sum([item.num_rows for item in items])
        if self._max_logits is not None:
            max_rows = min(max_rows, num_rows + max(0, self._max_logits - num_decoding))
        shape = StepShape(
            num_seqs=len(items),
            num_adapters=len({item.seq.adapter_hash for item in items} - {None}),
            num_keys=sum([item.seq.num_computed for item in items]),
        )
        host = self._host_beside if is_half else self._host
        return StepPlan(self.table, shape, num_decoding, num_rows, max_rows, host, is_half)

    def learn(self, plan: StepPlan, num_drafts: int, seconds: StepSeconds) -> None:
        """From what a step took."""
        if self._host is None or self._host_beside is None:
            if plan.num_rows == plan.num_decoding == plan.shape.num_seqs:  # no prompts
                self._learn_device(plan, num_drafts, seconds.total - plan.draft_s)
            return
        if seconds.gap:
            self._host.observe(plan.num_decoding, num_drafts, seconds.gap - plan.draft_s)
        elif plan.is_hidden:
            self._host_beside.observe(plan.num_decoding, num_drafts, seconds.total - seconds.wait - plan.draft_s)
        if seconds.gap or seconds.wait > LEAST_WAIT * seconds.total:  # else the device was not what took so long
            self._learn_device(plan, num_drafts, seconds.total - seconds.gap)

    def _learn_device(self, plan: StepPlan, num_drafts: int, seconds: float) -> None:
        num_rows = plan.num_rows + num_drafts
        self.table.observe(num_rows, plan.shape, seconds, plan.device.seconds(num_rows))

    def judge(self, plan: StepPlan, num_asked: int, verified: Verified, num_drafts: int) -> None:
        """Tell the switch of each that was asked what its sources brought, and what they took."""
        self._draft_s.observe(plan.draft_s / num_asked)
        sums: dict[DraftSwitch, _Asked] = {}
        for draft, num, accepted in zip(verified.drafts, verified.num_drafts, verified.num_accepted, strict=True):
            if not draft.is_fixed:
                asked = sums.get(draft.switch)
                if asked is None:
                    asked = sums[draft.switch] = _Asked()
                asked.num_seqs += 1
                asked.drafted += num
                asked.accepted += accepted
        # Without drafts the step would have given each sequence a token in `alone_s`.
        alone_s = plan.seconds(0)
        row_s = (plan.seconds(num_drafts) - alone_s) / num_drafts if num_drafts else 0.0
        for switch, asked in sums.items():
            spent_s = row_s * asked.drafted + self._draft_s.seconds * asked.num_seqs
            gain = asked.accepted - spent_s * plan.num_decoding / alone_s
            switch.observe(gain / asked.num_seqs, plan.num_decoding)
