"""The engine's side of drafting: which sources a request gets, and which drafts a step verifies.

Drafts of all sequences grow together, one position at a time, so that the heads of all adapters run as one batch and
the row budget is shared out evenly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import EngineConfig
from .cost_model import CostModel
from .drafters.acceptance import SharedAcceptance
from .drafters.chooser import DraftChooser
from .drafters.head_source import HeadRunner, HeadSource
from .drafters.history_source import HistorySource
from .drafters.ngram import NgramSource
from .drafters.prediction import PredictionSource
from .drafters.protocol import DraftSource
from .lora import LoraAdapter
from .messages import GenerateRequest
from .scheduler import ScheduledSequence, Scheduler
from .served_history import ServedHistories

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Draft:
    item: ScheduledSequence
    chooser: DraftChooser
    limit: int


class Proposer:
    """Fills in the drafts of scheduled sequences, within the step's row budget and the KV blocks that are free."""

    def __init__(
        self, config: EngineConfig, cost_model: CostModel, vocab_size: int, adapters: Mapping[str, LoraAdapter]
    ):
        self._config = config
        self._vocab_size = vocab_size
        self._adapters = adapters
        self._base_acceptance = SharedAcceptance()
        self.cost_model = cost_model
        self.heads = HeadRunner()
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

    def chooser_for(self, request: GenerateRequest) -> DraftChooser:
        sources = self.drafters_for(request) if self._max_drafts(request) else []
        adapter = self._adapters.get(request.adapter_hash or "")
        ahead = adapter.lookahead if adapter is not None else None
        return DraftChooser(sources, ahead.acceptance if ahead is not None else self._base_acceptance)

    def drafters_for(self, request: GenerateRequest) -> list[DraftSource]:
        sources: list[DraftSource] = [NgramSource()]
        if request.speculation.mode == "ngram":
            return sources
        if request.prediction_token_ids:
            sources.insert(0, PredictionSource(request.prediction_token_ids, len(request.prompt_token_ids)))
        adapter = self._adapters.get(request.adapter_hash or "")
        ahead = adapter.lookahead if adapter is not None else None
        history = ahead.history if ahead is not None else None
        if self._served is not None and adapter is not None:
            history = self._served.current(adapter.content_hash, request.cache_salt, history)
        if history is not None:
            sources.append(HistorySource(history, len(request.prompt_token_ids)))
        if ahead is not None and ahead.head is not None:
            sources.append(HeadSource(ahead.head, ahead.local, request.prompt_token_ids))
        return sources

    def propose(
        self,
        items: Sequence[ScheduledSequence],
        scheduler: Scheduler,
        chooser_of: Callable[[ScheduledSequence], DraftChooser],
    ) -> None:
        """Give drafts to the items whose newest token is computed in this step."""
        num_rows = sum(item.num_rows for item in items)
        ready = [item for item in items if item.reaches_end and item.seq.sampling.max_tokens > 0]
        drafts = []
        for item in ready:
            seq = item.seq
            limit = min(self._max_drafts(seq.request), seq.max_len - len(seq.tokens) - 1)
            if limit > 0:
                draft = _Draft(item, chooser_of(item), limit)
                draft.chooser.begin(seq.tokens)
                drafts.append(draft)
        self._grow(drafts, len(ready), num_rows, scheduler.max_batched_tokens)
        for draft in drafts:
            tokens = draft.chooser.tokens
            if not tokens or not all(0 <= token < self._vocab_size for token in tokens):
                continue
            num_drafts = scheduler.reserve_drafts(draft.item, len(tokens))
            draft.item.drafts = tokens[:num_drafts]
            draft.item.draft_sources = draft.chooser.chosen[:num_drafts]

    def _grow(self, drafts: list[_Draft], num_decoding: int, num_rows: int, max_rows: int) -> None:
        """Add one position to every draft that pays for it, until none does."""
        decode_rows, expected = num_decoding, float(num_decoding)
        growing = drafts
        self._run_heads(growing, starts=True)
        while growing:
            still = []
            for draft in growing:
                if num_rows >= max_rows:
                    break
                chooser = draft.chooser
                if not chooser.extend(self.cost_model.row_price(expected, decode_rows, num_rows)):
                    continue
                num_rows, decode_rows, expected = num_rows + 1, decode_rows + 1, expected + chooser.survival
                if len(chooser.tokens) < draft.limit:
                    still.append(draft)
            # What no certain guess could pay for needs no step of its head.
            price = self.cost_model.row_price(expected, decode_rows, num_rows)
            growing = [draft for draft in still if draft.chooser.survival >= price] if num_rows < max_rows else []
            if growing:
                self._run_heads(growing)
        self.heads.clear()

    def _run_heads(self, drafts: Sequence[_Draft], starts: bool = False) -> None:
        """One step of the heads; if it fails, these sequences go on without theirs."""
        sources = [(d.chooser, s) for d in drafts for s in d.chooser.sources if isinstance(s, HeadSource)]
        if not sources:
            return
        try:
            if starts:
                self.heads.begin([source for _, source in sources])
            self.heads.step()
        except Exception:
            self.heads.clear()
            for chooser, source in sources:
                chooser.drop(source)

    def _max_drafts(self, request: GenerateRequest) -> int:
        if self._config.speculation == "off" or request.speculation.mode == "off":
            return 0
        return min(self._config.max_draft_tokens, request.speculation.max_draft_tokens)
