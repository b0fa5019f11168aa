"""The engine's side of drafting: which drafters a request gets, and which drafts a step verifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .config import EngineConfig
from .cost_model import CostModel
from .drafters.chooser import DraftChooser
from .drafters.ngram import NgramDrafter
from .drafters.prediction import PredictionDrafter
from .drafters.protocol import SequenceDrafter
from .messages import GenerateRequest
from .scheduler import ScheduledSequence, Scheduler


class Proposer:
    """Fills in the drafts of scheduled sequences, within the step's row budget and the KV blocks that are free."""

    def __init__(self, config: EngineConfig, cost_model: CostModel, vocab_size: int):
        self._config = config
        self._vocab_size = vocab_size
        self.cost_model = cost_model

    def chooser_for(self, request: GenerateRequest) -> DraftChooser:
        return DraftChooser(self.drafters_for(request) if self._max_drafts(request) else [])

    def drafters_for(self, request: GenerateRequest) -> list[SequenceDrafter]:
        drafters: list[SequenceDrafter] = [NgramDrafter()]
        if request.prediction_token_ids and request.speculation.mode == "auto":
            drafters.insert(0, PredictionDrafter(request.prediction_token_ids, len(request.prompt_token_ids)))
        return drafters

    def propose(
        self,
        items: Sequence[ScheduledSequence],
        scheduler: Scheduler,
        chooser_of: Callable[[ScheduledSequence], DraftChooser],
    ) -> None:
        """Give drafts to the items whose newest token is computed in this step."""
        num_rows = sum(item.num_rows for item in items)
        ready = [item for item in items if item.reaches_end and item.seq.sampling.max_tokens > 0]
        for item in ready:
            seq = item.seq
            budget = scheduler.max_batched_tokens - num_rows
            limit = min(self._max_drafts(seq.request), seq.max_len - len(seq.tokens) - 1, budget)
            if limit <= 0:
                continue
            price = self.cost_model.row_price(len(ready), num_rows)
            proposal = chooser_of(item).propose(seq.tokens, limit, price)
            if proposal is None or not all(0 <= token < self._vocab_size for token in proposal.tokens):
                continue
            num_drafts = scheduler.reserve_drafts(item, len(proposal.tokens))
            item.drafts = proposal.tokens[:num_drafts]
            item.draft_sources = [proposal.source] * num_drafts
            num_rows += num_drafts

    def _max_drafts(self, request: GenerateRequest) -> int:
        if self._config.speculation == "off" or request.speculation.mode == "off":
            return 0
        return min(self._config.max_draft_tokens, request.speculation.max_draft_tokens)
