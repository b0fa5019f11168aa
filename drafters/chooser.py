"""Picks one proposal for a sequence out of all of its sources, and how much of it is worth verifying.

The proposal with the highest expected number of accepted tokens wins. It is cut where survival falls below the price of
a row: a draft row must be worth at least that share of a decode step. A source that raises is dropped for the sequence,
which then decodes plainly; output never depends on any of this.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .protocol import Proposal, SequenceDrafter

logger = logging.getLogger(__name__)


class DraftChooser:
    """All drafters of one sequence."""

    def __init__(self, drafters: Sequence[SequenceDrafter]):
        self._drafters = list(drafters)
        self._chosen: SequenceDrafter | None = None

    def propose(self, tokens: Sequence[int], max_tokens: int, row_price: float) -> Proposal | None:
        """The best proposal of at most `max_tokens`, cut where survival is below `row_price`; None: decode plainly."""
        self._chosen = None
        if max_tokens <= 0:
            return None
        best: Proposal | None = None
        best_value = 0.0
        for drafter in list(self._drafters):
            try:
                proposal = drafter.propose(tokens, max_tokens)
            except Exception:
                self._drop(drafter)
                continue
            if proposal is None:
                continue
            num_kept = sum(value >= row_price for value in proposal.survival[:max_tokens])
            value = sum(proposal.survival[:num_kept]) - row_price * num_kept
            if num_kept and value > best_value:
                best = Proposal(proposal.tokens[:num_kept], proposal.survival[:num_kept], proposal.source)
                best_value, self._chosen = value, drafter
        return best

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Report the verdict on the last proposal to the drafter that made it."""
        if self._chosen is None or num_drafted == 0:
            return
        try:
            self._chosen.observe(num_drafted, num_accepted)
        except Exception:
            self._drop(self._chosen)

    def _drop(self, drafter: SequenceDrafter) -> None:
        logger.exception("drafter %r failed; this sequence goes on without it", drafter.source)
        self._drafters = [other for other in self._drafters if other is not drafter]
