"""The engine's side of drafting: which sources a request gets, who is asked in a step, and what came of it.

`growth` decides how far drafts go. Here every adapter's switch says whether its sources are asked at all; after
the step, cost table, switches and the counts by adapter learn from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.lora import LoraAdapter
from ..config import EngineConfig
from ..drafters.acceptance import SharedAcceptance
from ..drafters.chooser import DraftChooser
from ..drafters.grammar_source import GrammarSource
from ..drafters.history_source import HistorySource
from ..drafters.ngram import NgramSource
from ..drafters.prediction import PredictionSource
from ..drafters.protocol import DraftSource, Heads, SteppedHeads
from ..grammar.grammar import Grammar
from ..messages import AdapterDrafts, GenerateRequest
from ..schedule.scheduler import ScheduledSequence, Scheduler
from .cost_model import CostModel, MeanSeconds, StepShape
from .growth import DraftGrowth, GrowingDraft, StepPlan
from .served_history import ServedHistories
from .switch import DraftSwitch

_PRICE_RATE = 1 / 64  # of the running mean in metrics


@dataclass(slots=True)
class _Counts:
    """Of one adapter."""

    num_verifications: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    row_price: float | None = None


@dataclass(slots=True)
class _Asked:
    """What a step's sequences of one switch came to."""

    num_seqs: int = 0
    drafted: int = 0
    accepted: int = 0


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
    ):
        self._config = config
        self._vocab_size = vocab_size
        self._adapters = adapters
        self._base_acceptance = SharedAcceptance()
        self._heads = heads
        self.growth = DraftGrowth(cost_model, stepped_heads)
        self.num_undrafted_steps = 0
        self._counts: dict[str | None, _Counts] = {}  # by adapter hash
        self._switches: dict[tuple[str | None, str, bool, bool], DraftSwitch] = {}
        self._draft_s = MeanSeconds()  # all of drafting, one sequence
        self._plan: StepPlan | None = None  # of the step that runs
        self._drafts: dict[int, GrowingDraft] = {}  # id of a scheduled sequence -> its draft in that step
        self._served: ServedHistories | None = None
        if config.learn_history:
            directory = Path(config.history_dir).expanduser() if config.history_dir else None
            self._served = ServedHistories(directory, vocab_size)

    def learn(self, request: GenerateRequest, output: Sequence[int]) -> None:
        """Remember a finished output, if the engine is set to."""
        adapter = self._adapters.get(request.adapter_hash or "")
        if self._served is None or adapter is None or len(output) < 2:
            return
        base = adapter.lookahead.history if adapter.lookahead is not None else None
        self._served.learn(adapter.content_hash, request.cache_salt, base, output)

    def close(self) -> None:
        """Save what was learned."""
        if self._served is not None:
            self._served.close()

    def chooser_for(self, request: GenerateRequest, grammar: Grammar | None = None) -> DraftChooser:
        sources = self.drafters_for(request) if self._max_drafts(request) else []
        if grammar is not None and sources and request.speculation.mode != "ngram":
            sources.insert(0, GrammarSource(grammar))
        adapter = self._adapters.get(request.adapter_hash or "")
        lookahead = adapter.lookahead if adapter is not None else None
        return DraftChooser(sources, lookahead.acceptance if lookahead is not None else self._base_acceptance, grammar)

    def drafters_for(self, request: GenerateRequest) -> list[DraftSource]:
        sources: list[DraftSource] = [NgramSource()]
        if request.speculation.mode == "ngram":
            return sources
        if request.prediction_token_ids:
            sources.insert(0, PredictionSource(request.prediction_token_ids, len(request.prompt_token_ids)))
        adapter = self._adapters.get(request.adapter_hash or "")
        lookahead = adapter.lookahead if adapter is not None else None
        history = lookahead.history if lookahead is not None else None
        if self._served is not None and adapter is not None:
            history = self._served.current(adapter.content_hash, request.cache_salt, history)
        if history is not None:
            sources.append(HistorySource(history, len(request.prompt_token_ids)))
        if lookahead is not None and lookahead.head is not None:
            sources.append(self._heads.source(request.request_id, lookahead.head, request.prompt_token_ids))
        return sources

    def propose(
        self,
        items: Sequence[ScheduledSequence],
        scheduler: Scheduler,
        chooser_of: Callable[[ScheduledSequence], DraftChooser],
    ) -> None:
        """Give drafts to the items whose newest token is computed in this step."""
        ready = [item for item in items if item.reaches_end and item.seq.sampling.max_tokens > 0]
        shape = StepShape(
            num_seqs=len(items),
            num_adapters=len({item.seq.adapter_hash for item in items} - {None}),
            num_keys=sum(item.seq.num_computed for item in items),
        )
        num_rows = sum(item.num_rows for item in items)
        curve = self.growth.cost_model.curve(shape)
        plan = self._plan = StepPlan(shape, curve, len(ready), num_rows, scheduler.max_batched_tokens)
        drafts: list[GrowingDraft] = []
        asks: dict[DraftSwitch, bool] = {}
        could_draft = False
        for item in ready:
            seq = item.seq
            limit = min(self._max_drafts(seq.request), seq.max_len - len(seq.tokens) - 1)
            if limit <= 0 or seq.tokens[-1] < 0:  # a draft follows tokens that are known
                continue
            could_draft = True
            is_fixed, switch = seq.request.speculation.mode == "fixed", self._switch(seq.request)
            if not is_fixed:
                if switch not in asks:
                    asks[switch] = switch.asks(len(ready))
                if not asks[switch]:
                    continue
            drafts.append(GrowingDraft(item, chooser_of(item), limit, is_fixed, switch))
        if drafts:
            self.growth.grow(drafts, plan)
        self._drafts = {id(draft.item): draft for draft in drafts}
        for draft in drafts:
            tokens = draft.chooser.tokens[: draft.num_admitted]
            if (grammar := draft.item.seq.grammar) is not None:
                grammar.rewind()
                tokens = tokens[: grammar.num_allowed(tokens)]  # a row that cannot be kept is not worth its time
            if not tokens or not all(0 <= token < self._vocab_size for token in tokens):
                continue
            num_drafts = scheduler.reserve_drafts(draft.item, len(tokens))
            draft.item.drafts = tokens[:num_drafts]
            draft.item.draft_sources = draft.chooser.chosen[:num_drafts]
        if could_draft and not any(item.drafts for item in ready):
            self.num_undrafted_steps += 1

    def would_ask(self, items: Sequence[ScheduledSequence]) -> bool:
        """Whether a next step of the same sequences would ask any of them for drafts."""
        for item in items:
            request = item.seq.request
            if not self._max_drafts(request):
                continue
            if request.speculation.mode == "fixed" or self._switch(request).would_ask(len(items)):
                return True
        return False

    def count(self, item: ScheduledSequence, num_drafted: int, num_accepted: int, num_tokens: int) -> None:
        """A sequence's verification gave `num_tokens`."""
        counts = self._counts.setdefault(item.seq.adapter_hash, _Counts())
        counts.num_verifications += 1
        counts.generated += num_tokens
        counts.drafted += num_drafted
        counts.accepted += num_accepted
        price, old = self.growth.row_price, counts.row_price
        counts.row_price = price if old is None else old + _PRICE_RATE * (price - old)
        draft = self._drafts.get(id(item))
        if draft is not None:
            draft.num_accepted = num_accepted

    def end_step(self, items: Sequence[ScheduledSequence], seconds: float) -> None:
        """Learn from a step that took `seconds`, drafting included."""
        plan, drafts = self._plan, list(self._drafts.values())
        self._plan, self._drafts = None, {}
        if plan is None or not plan.num_decoding:
            return
        num_drafts = sum(len(item.drafts) for item in items)
        if plan.num_rows == plan.num_decoding == len(items):  # no prompts
            self.growth.cost_model.observe(plan.num_rows + num_drafts, plan.shape, seconds - plan.draft_s)
        if not drafts:
            return
        self._draft_s.observe(plan.draft_s / len(drafts))
        sums: dict[DraftSwitch, _Asked] = {}
        for draft in drafts:
            if not draft.is_fixed:
                asked = sums.setdefault(draft.switch, _Asked())
                asked.num_seqs += 1
                asked.drafted += len(draft.item.drafts)
                asked.accepted += draft.num_accepted
        # Without drafts the step would have given each sequence a token in `alone_s`.
        alone_s = plan.seconds(0)
        row_s = (plan.seconds(num_drafts) - alone_s) / num_drafts if num_drafts else 0.0
        for switch, asked in sums.items():
            spent_s = row_s * asked.drafted + self._draft_s.seconds * asked.num_seqs
            gain = asked.accepted - spent_s * plan.num_decoding / alone_s
            switch.observe(gain / asked.num_seqs, plan.num_decoding)

    def adapter_left(self, content_hash: str) -> None:
        """Let go of an adapter that has left."""
        self._heads.release_weights()
        self._counts.pop(content_hash, None)
        self._switches = {key: switch for key, switch in self._switches.items() if key[0] != content_hash}

    def drafts_by_adapter(self) -> list[AdapterDrafts]:
        adapters = self._adapters
        return [
            AdapterDrafts(
                name=None if key is None else adapters[key].name,
                num_verifications=counts.num_verifications,
                generated_tokens=counts.generated,
                draft_tokens=counts.drafted,
                accepted_draft_tokens=counts.accepted,
                row_price=counts.row_price or 0.0,
            )
            for key, counts in self._counts.items()
            if key is None or key in adapters
        ]

    def _switch(self, request: GenerateRequest) -> DraftSwitch:
        mode, has_grammar = request.speculation.mode, request.grammar is not None
        key = (request.adapter_hash, mode, bool(request.prediction_token_ids), has_grammar)
        return self._switches.setdefault(key, DraftSwitch())

    def _max_drafts(self, request: GenerateRequest) -> int:
        if self._config.speculation == "off" or request.speculation.mode == "off":
            return 0
        return min(self._config.max_draft_tokens, request.speculation.max_draft_tokens)
