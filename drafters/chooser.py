"""Drafts for one sequence out of all of its sources, position by position.

At each position the guess that is most likely right is proposed, and every source goes on from it: one may continue
where another stopped. Drafting ends where the chance that all of it is right falls below the price of a row. A source
that raises is dropped for the sequence, which goes on without it; output never depends on any of this.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .acceptance import Acceptance, SharedAcceptance
from .protocol import DraftSource, Guess

logger = logging.getLogger(__name__)


class DraftChooser:
    """All sources of one sequence, and the draft that is being made."""

    def __init__(self, sources: Sequence[DraftSource], shared: SharedAcceptance | None = None):
        self.sources = list(sources)
        self._acceptance = Acceptance(shared or SharedAcceptance())
        self.guesses: list[list[tuple[DraftSource, Guess]]] = []  # by position, also those not chosen
        self.tokens: list[int] = []
        self.chosen: list[str] = []  # name of the source of each token
        self.survival = 1.0  # chance that every token of the draft is right

    def begin(self, tokens: Sequence[int]) -> None:
        """Start a draft that continues `tokens`."""
        self.tokens, self.chosen, self.guesses, self.survival = [], [], [], 1.0
        for source in list(self.sources):
            try:
                source.begin(tokens)
            except Exception:
                self.drop(source)

    def extend(self, row_price: float) -> bool:
        """Propose one more token if it is worth `row_price`; False when the draft ends here."""
        guesses: list[tuple[DraftSource, Guess]] = []
        for source in list(self.sources):
            try:
                guess = source.peek()
            except Exception:
                self.drop(source)
                continue
            if guess is not None:
                guesses.append((source, guess))
        self.guesses.append(guesses)
        best_rate, best = -1.0, None
        for source, guess in guesses:
            rate = self._acceptance.rate(source, guess)
            if rate > best_rate:
                best_rate, best = rate, (source, guess)
        if best is None or self.survival * best_rate < row_price:
            return False
        self.survival *= best_rate
        token = best[1].token
        self.tokens.append(token)
        self.chosen.append(best[0].source)
        for source in list(self.sources):
            try:
                source.follow(token)
            except Exception:
                self.drop(source)
        return True

    def observe(self, committed: Sequence[int]) -> None:
        """Learn from the tokens that came: every guess up to the first wrong draft was made on true ground."""
        for guesses, token in zip(self.guesses, committed, strict=False):
            for source, guess in guesses:
                self._acceptance.observe(source, guess, guess.token == token)
        self.guesses = []

    def drop(self, source: DraftSource) -> None:
        """Go on without a source that failed; called where its exception is handled."""
        logger.exception("draft source %r failed; this sequence goes on without it", source.source)
        self.sources = [other for other in self.sources if other is not source]
