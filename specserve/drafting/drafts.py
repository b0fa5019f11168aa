"""What grows in a step: the draft of each sequence, within the step's plan; and what it takes to grow them.

`Growth` has two implementations: `growth.py` in Python is the reference, `native_growth.py` is what serves wherever
there is a C++ compiler. Both make the same drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..drafters.acceptance import SharedAcceptance
from ..drafters.grammar_source import Constraint
from ..drafters.head_source import HeadSource
from ..drafters.protocol import DraftSource, SteppedHeads
from ..schedule.scheduler import ScheduledSequence
from .cost_model import CostModel, StepCurve, StepShape
from .counts import Counts
from .host_cost import HostCost
from .switch import DraftSwitch


class Chooser(Protocol):
    """All sources of one sequence, and the draft that was made of them."""

    sources: list[DraftSource]  # those that have not failed
    tokens: list[int]
    chosen: list[str]  # name of the source of each token
    chances: list[float]  # that each is right, those before it being right; only where it is traced

    def remove_source(self, source: DraftSource) -> None: ...


@dataclass(slots=True, eq=False)
class GrowingDraft:
    """One sequence's drafting; `item` and what follows are of the latest step that asked for a draft of it."""

    chooser: Chooser | None  # None: it was never asked
    max_tokens: int  # of a draft; 0: it never drafts
    is_fixed: bool  # takes what its sources say, whatever it costs
    switch: DraftSwitch
    counts: Counts = field(default_factory=Counts)
    holds_up: bool = False  # its tokens must be known before the next step is queued
    head: HeadSource | None = None  # wants to know what the model's layers say
    item: ScheduledSequence | None = None
    limit: int = 0  # tokens
    num_admitted: int = 0


def no_draft() -> GrowingDraft:
    """Of a sequence that generates nothing."""
    return GrowingDraft(chooser=None, max_tokens=0, is_fixed=False, switch=DraftSwitch())


class StepPlan:
    """What a step was before its drafts; seconds are expected ones but for `draft_s`.

    `host` is what the host takes for the step; None where it computes it. A device waits for it before the step, unless
    it runs another one meanwhile (`is_hidden`).
    """

    __slots__ = (
        "_cost_model", "_curve", "_device", "draft_s", "host", "is_hidden", "max_rows", "num_decoding", "num_rows",
        "shape",
    )  # fmt: skip

    def __init__(
        self,
        cost_model: CostModel,
        shape: StepShape,
        num_decoding: int,
        num_rows: int,
        max_rows: int,
        host: HostCost | None = None,
        is_hidden: bool = False,
    ):
        self._cost_model, self.shape, self.host, self.is_hidden = cost_model, shape, host, is_hidden
        self.num_decoding = num_decoding  # sequences whose newest token is among the rows
        self.num_rows, self.max_rows = num_rows, max_rows
        self.draft_s = 0.0
        self._device: StepCurve | None = None
        self._curve: StepCurve | None = None

    @property
    def device(self) -> StepCurve:
        """By rows, of what computes."""
        if self._device is None:
            self._device = self._cost_model.curve(self.shape)
        return self._device

    @property
    def curve(self) -> StepCurve:
        """By rows, of all of the step."""
        if self._curve is None:
            self._curve = self.device
            if (host := self.host) is not None:
                rows, seconds = self.device.nodes
                host_s, draft_s = host.seconds(self.num_decoding), host.draft_s
                hosts = [max(0.0, host_s + draft_s * (num - self.num_decoding)) for num in rows]
                pairs = zip(seconds, hosts, strict=True)
                self._curve = StepCurve(rows, [max(pair) if self.is_hidden else sum(pair) for pair in pairs])
        return self._curve

    def seconds(self, num_drafts: int) -> float:
        """Rows of prompts that share the step make a draft's row as costly as it is on top of them, but are no part of
        the step's time: without the draft, its token would come from a later step that only decodes."""
        curve, rows = self.curve, self.num_rows
        return curve.seconds(self.num_decoding) + curve.seconds(rows + num_drafts) - curve.seconds(rows)

    def prompt_seconds(self, num_drafts: int) -> float:
        """Of the step, for rows of prompts."""
        if self.num_rows == self.num_decoding:
            return 0.0
        return self.device.seconds(self.num_rows + num_drafts) - self.device.seconds(self.num_decoding + num_drafts)


class Growth(Protocol):
    """Grows the drafts of a step and learns from what became of them."""

    heads: SteppedHeads | None

    @property
    def row_price(self) -> float:
        """Tokens that the next row of the latest step had to bring."""
        ...

    def chooser(
        self,
        sources: Sequence[DraftSource],
        shared: SharedAcceptance,
        constraint: Constraint | None,
        is_traced: bool = False,
    ) -> Chooser: ...

    def grow(self, drafts: Sequence[GrowingDraft], plan: StepPlan) -> None:
        """Set `num_admitted` of every draft, the first tokens of its chooser's draft, and the plan's `draft_s`."""
        ...

    def has_beyond(self, vocab_size: int) -> bool:
        """Whether the latest step's drafts may hold a token outside of 0..vocab_size-1: some source is broken."""
        ...

    def observe(self, drafts: Sequence[GrowingDraft], committed: Sequence[Sequence[int]]) -> None:
        """The step made these tokens of these sequences, which it grew drafts for; they have them now."""
        ...


Clock = Callable[[], float]
