"""The engine's side of drafting: who is asked in a step, and what came of it.

`request_sources` knows what may draft for a request, `growth` decides how far drafts go, `step_costs` what they may
cost. Here every adapter's switch says whether its sources are asked at all; after the step, costs, switches and the
counts by adapter learn from it. On a device that runs by itself the way of whole steps (`step_ways`) stands above.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..adapters.lookahead import Lookahead
from ..adapters.lora import LoraAdapter
from ..config import EngineConfig
from ..drafters.grammar_source import GrammarSource
from ..drafters.head_source import HeadSource
from ..drafters.native import NativeDrafts
from ..drafters.protocol import Heads, SteppedHeads
from ..kernels.native_build import NativeError
from ..messages import GenerateRequest
from ..schedule.scheduler import ScheduledSequence, Scheduler
from ..schedule.sequence import Sequence as EngineSequence
from .cost_model import CostModel
from .counts import AdapterCounts
from .drafts import Clock, GrowingDraft, Growth, StepPlan, no_draft
from .growth import DraftGrowth
from .native_growth import NativeGrowth
from .request_sources import RequestSources
from .step_costs import StepCosts, StepSeconds, Verified
from .step_ways import Live, Load, StepWays
from .switch import DraftSwitch
from .way_trial import TimedStep, Way

logger = logging.getLogger(__name__)

_BACKLOG = 0.9  # of the rows that a step has for prompts beside decodes: more wait


class Proposed(NamedTuple):
    """What was proposed for a step."""

    plan: StepPlan
    num_asked: int  # sequences that were asked for drafts
    load: Load | None = None  # whose way it went
    is_half: bool = False  # of the sequences; the other half's step runs meanwhile


class Proposer:
    """Fills in the drafts of scheduled sequences, within the step's row budget and the KV blocks that are free."""

    def __init__(
        self,
        config: EngineConfig,
        cost_model: CostModel,
        heads: Heads,
        stepped_heads: SteppedHeads | None,
        vocab_size: int,
        adapters: Mapping[str, LoraAdapter],
        *,
        clock: Clock | None = None,
        is_asynchronous: bool = False,
        max_logits: int | None = None,
        base_lookahead: Lookahead | None = None,
        base_hash: str,
    ):
        self._config = config
        self._vocab_size = vocab_size
        self.sources = RequestSources(config, heads, vocab_size, adapters, base_lookahead, base_hash)
        self.cost_model, self._costs = cost_model, StepCosts(cost_model, is_asynchronous, max_logits)
        self.growth = make_growth(stepped_heads, clock)
        self.num_undrafted_steps = 0
        self.counts = AdapterCounts(adapters)
        self._switches: dict[tuple[str | None, str, bool, bool], DraftSwitch] = {}
        self._ways = StepWays() if is_asynchronous else None
        self._live = Live()

    def start(self, seq: EngineSequence) -> GrowingDraft:
        """What drafts for a new sequence, until `end`; whatever that holds is freed when nobody holds it any more."""
        request = seq.request
        if not isinstance(request, GenerateRequest):
            return no_draft()
        draft = GrowingDraft(
            chooser=None,
            max_tokens=self._max_drafts(request),
            is_fixed=request.speculation.mode == "fixed",
            switch=self._switch(request),
            counts=self.counts.of(request.adapter_hash),
            holds_up=not seq.gets_any_token,
        )
        way = self._ways.latest if self._ways is not None else None
        if draft.max_tokens and (way is None or way.drafts or self.growth.heads is not None):
            self._make_chooser(draft, seq)  # now, while the device runs; else when it is asked, which may be never
        self._count_live(draft, 1)
        return draft

    def end(self, draft: GrowingDraft) -> None:
        """A sequence has left."""
        self._count_live(draft, -1)

    def _count_live(self, draft: GrowingDraft, change: int) -> None:
        self._live.num_drafting += change * (draft.max_tokens > 0)
        self._live.num_fixed += change * (draft.max_tokens > 0 and draft.is_fixed)
        self._live.num_held_up += change * draft.holds_up

    def _make_chooser(self, draft: GrowingDraft, seq: EngineSequence) -> None:
        request = seq.request
        assert isinstance(request, GenerateRequest)  # others never draft
        sources = self.sources.of(request)
        if seq.grammar is not None and request.speculation.mode != "ngram":
            sources.insert(0, GrammarSource(seq.grammar))
        draft.chooser = self.growth.chooser(sources, self.sources.acceptance_of(request), seq.grammar, seq.is_traced)
        draft.head = next((source for source in sources if isinstance(source, HeadSource)), None)

    def propose(
        self,
        items: Sequence[ScheduledSequence],
        drafts: Iterable[GrowingDraft],
        scheduler: Scheduler,
        is_ahead: bool = False,
        is_half: bool = False,
    ) -> Proposed | None:
        """Give drafts to the items whose newest token is computed in this step; `drafts` are theirs, in order.

        None where nobody may draft; else what `end_step` learns from. Nobody is asked in a step that is queued
        `is_ahead` of the tokens of the last: a head would draft for it before the last one's chains were collected.
        """
        if not self._live.num_drafting:
            return None
        plan = self._costs.plan(items, scheduler.max_batched_tokens, is_half)
        load = self._plan_way(len(scheduler.running))
        if self._ways is not None and plan.num_decoding:
            num_prompt_rows = plan.num_rows - plan.num_decoding
            self._ways.note_prompts(num_prompt_rows >= _BACKLOG * scheduler.max_prefill_rows)
        if load is not None and not load.way.drafts:
            self.num_undrafted_steps += 1
            return Proposed(plan, 0, load, is_half)
        asked: list[GrowingDraft] = []
        could_draft = False
        asks: dict[DraftSwitch, bool] = {}
        for item, draft in zip(items, drafts, strict=True):
            seq = item.seq
            num_tokens = len(seq.tokens)
            limit = seq.max_len - num_tokens - 1
            if limit > draft.max_tokens:
                limit = draft.max_tokens
            if limit <= 0 or not item.reaches_end:
                continue
            could_draft = not is_ahead
            if not draft.is_fixed:
                switch = draft.switch
                if (is_asked := asks.get(switch)) is None:
                    is_asked = asks[switch] = switch.asks(plan.num_decoding)
                if not is_asked:
                    continue
            if is_ahead:  # its switch counts the step all the same
                continue
            if draft.chooser is None:
                self._make_chooser(draft, seq)
            draft.item, draft.limit = item, limit
            asked.append(draft)
        num_drafted = 0
        if asked:
            self.growth.grow(asked, plan)
            vocab_size = self._vocab_size if self.growth.has_beyond(self._vocab_size) else None
            num_drafted = sum([self._propose(draft, scheduler, vocab_size) for draft in asked if draft.num_admitted])
        if could_draft and not num_drafted:
            self.num_undrafted_steps += 1
        return Proposed(plan, len(asked), load, is_half)

    def _propose(self, draft: GrowingDraft, scheduler: Scheduler, vocab_size: int | None) -> int:
        """Give its item as many drafts as were admitted, and there is room for; tokens may go beyond a `vocab_size`."""
        item, chooser, num = draft.item, draft.chooser, draft.num_admitted
        assert item is not None and chooser is not None
        tokens = chooser.tokens[:num] if num < len(chooser.tokens) else chooser.tokens
        if (grammar := item.seq.grammar) is not None:
            grammar.rewind()
            tokens = tokens[: grammar.num_allowed(tokens)]  # a row that cannot be kept is not worth its time
        if vocab_size is not None and not all(0 <= token < vocab_size for token in tokens):
            return 0
        num = scheduler.reserve_drafts(item, len(tokens))
        item.drafts = tokens[:num] if num < len(tokens) else tokens
        item.draft_sources = chooser.chosen[:num] if num < len(chooser.chosen) else chooser.chosen
        if item.seq.is_traced:
            item.draft_chances = chooser.chances[:num]
        return num

    def would_ask(self, num_seqs: int, drafts: Iterable[GrowingDraft]) -> bool:
        """Whether a next step of `num_seqs` sequences, whose drafts these are, would ask any of them."""
        if not self._live.num_drafting:
            return False
        load = self._plan_way(num_seqs)
        if load is not None and not load.way.drafts:
            return False
        return any(draft.max_tokens and (draft.is_fixed or draft.switch.would_ask(num_seqs)) for draft in drafts)

    def in_halves(self, num_running: int) -> bool:
        """Whether a step shall be of half of the sequences, so that the device runs while the host sees to the others.

        Only where they draft: else steps are queued ahead.
        """
        load = self._plan_way(num_running)
        return load is not None and load.way.halves

    def _plan_way(self, num_running: int) -> Load | None:
        return self._ways.plan(num_running, self._live) if self._ways is not None else None

    def observe(self, verified: Verified) -> None:
        """Learn from what a step's verification kept of those that were asked, before the next step is proposed for."""
        if verified.drafts:
            self.growth.observe(verified.drafts, verified.tokens)

    @property
    def row_price(self) -> float:
        """Tokens that the next row of the latest step had to bring."""
        return self.growth.row_price

    def end_step(self, proposed: Proposed, verified: Verified, seconds: StepSeconds) -> None:
        """Learn from a step, at any time before the next one ends."""
        plan, num_asked, load, is_half = proposed
        if not plan.num_decoding:
            return
        num_drafts = sum(verified.num_drafts)
        self._costs.learn(plan, num_drafts, seconds)
        if load is not None and self._ways is not None:
            step = TimedStep(
                num_seqs=plan.num_decoding,
                num_tokens=plan.num_decoding + sum(verified.num_accepted),
                prompt_s=plan.prompt_seconds(num_drafts),
                seconds=seconds.total,
            )
            if self._ways.observe(load, Way(num_asked > 0, is_half), step):
                self._retry()
        if num_asked:
            self._costs.judge(plan, num_asked, verified, num_drafts)

    def _retry(self) -> None:
        """Drafts are about to be tried for all: if all sources are switched off, that tries them as well."""
        if not any(switch.is_on for switch in self._switches.values()):
            for switch in self._switches.values():
                switch.retry()

    def adapter_left(self, content_hash: str) -> None:
        """Let go of an adapter that has left."""
        self.sources.adapter_left(content_hash)
        self.counts.forget(content_hash)
        self._switches = {key: switch for key, switch in self._switches.items() if key[0] != content_hash}

    def _switch(self, request: GenerateRequest) -> DraftSwitch:
        mode, has_grammar = request.speculation.mode, request.grammar is not None
        key = (request.adapter_hash, mode, bool(request.prediction_token_ids), has_grammar)
        return self._switches.setdefault(key, DraftSwitch())

    def _max_drafts(self, request: GenerateRequest) -> int:
        if self._config.speculation == "off" or request.speculation.mode == "off":
            return 0
        return min(self._config.max_draft_tokens, request.speculation.max_draft_tokens)


def make_growth(heads: SteppedHeads | None, clock: Clock | None = None) -> Growth:
    """Growth in native code, or in Python, much slower, where that cannot be had; `clock` None is the machine's."""
    try:
        library = NativeDrafts()
    except NativeError as error:
        logger.warning("drafts grow in Python, slower: %s", error)
        return DraftGrowth(heads, clock or time.perf_counter)
    if library.build_s:
        logger.info("built the native drafts in %.1f s; they are cached", library.build_s)
    return NativeGrowth(library, heads, clock)
