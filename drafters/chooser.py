"""Drafts for one sequence out of all of its sources, position by position.

At each position the guess that is most likely right is proposed, and every source goes on from it: one may continue
where another stopped. Drafting ends where the chance that all of it is right falls below what the caller asks for. A
source that raises is dropped for the sequence, which goes on without it; output never depends on any of this. Under a
grammar a guess that it forbids is passed over for the next best: it could not be right.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .acceptance import Acceptance, SharedAcceptance
from .grammar_source import Constraint
from .protocol import DraftSource, Guess

logger = logging.getLogger(__name__)


class DraftChooser:
    """All sources of one sequence, and the draft that is being made."""

    def __init__(
        self,
        sources: Sequence[DraftSource],
        shared: SharedAcceptance | None = None,
        constraint: Constraint | None = None,
        is_traced: bool = False,
    ):
        self.sources = list(sources)
        self._constraint = constraint
        self._shared = shared or SharedAcceptance()
        self._acceptance = Acceptance(self._shared)
        self.guesses: list[list[tuple[DraftSource, Guess]]] = []  # by position, also those not chosen
        self._best: list[int | None] = []  # token by position asked, also the last one, which did not pay
        self.tokens: list[int] = []
        self.chosen: list[str] = []  # name of the source of each token
        self.is_traced = is_traced
        self.chances: list[float] = []  # that each is right, those before it being right; only where it is traced
        self.survival = 1.0  # chance that every token of the draft is right

    @property
    def has_head(self) -> bool:
        return any(source.source == "head" for source in self.sources)

    def begin(self, tokens: Sequence[int]) -> None:
        """Start a draft that continues `tokens`."""
        self.tokens, self.chosen, self.chances, self.guesses, self._best, self.survival = [], [], [], [], [], 1.0
        if self._constraint is not None:
            self._constraint.rewind()
        for source in tuple(self.sources):
            try:
                source.begin(tokens)
            except Exception:
                self.remove_source(source)

    def extend(self, least_survival: float) -> bool:
        """Propose one more token if all would survive with that chance; False when the draft ends here."""
        guesses: list[tuple[DraftSource, Guess]] = []
        rates: list[float] = []
        for source in tuple(self.sources):
            try:
                guess = source.peek()
                if guess is not None:
                    rates.append(self._acceptance.rate(source, guess))
                    guesses.append((source, guess))
            except Exception:
                self.remove_source(source)
        best_rate, best = self._take_best(guesses, rates, least_survival)
        self.guesses.append(guesses)
        self._best.append(best[1].token if best is not None else None)
        if best is None or self.survival * best_rate < least_survival:
            return False
        self.survival *= best_rate
        token = best[1].token
        self.tokens.append(token)
        self.chosen.append(best[0].source)
        if self.is_traced:
            self.chances.append(best_rate)
        for source in tuple(self.sources):
            try:
                source.follow(token)
            except Exception:
                self.remove_source(source)
        return True

    def _take_best(
        self, guesses: list[tuple[DraftSource, Guess]], rates: list[float], least_survival: float
    ) -> tuple[float, tuple[DraftSource, Guess] | None]:
        """The most credible guess that is allowed, the earlier source's of equal ones; forbidden ones are taken out.

        The constraint goes on by it unless the draft ends here for want of survival.
        """
        while guesses:
            best_rate = max(rates)
            idx = rates.index(best_rate)
            token = guesses[idx][1].token
            goes_on = self.survival * best_rate >= least_survival
            if self._constraint is None or (
                self._constraint.advance((token,)) if goes_on else self._constraint.allows(token)
            ):
                return best_rate, guesses[idx]
            del guesses[idx], rates[idx]
        return -1.0, None

    def next_rate(self) -> float:
        """How often the best guess of the next position is right, before any source was asked for it."""
        return self._shared.position_rate(len(self.tokens))

    def observe(self, committed: Sequence[int]) -> None:
        """Learn from the tokens that came: every guess up to the first wrong draft was made on true ground."""
        for position, (guesses, best, token) in enumerate(zip(self.guesses, self._best, committed, strict=False)):
            self._shared.observe_position(position, best == token)
            for source, guess in guesses:
                self._acceptance.observe(source, guess, guess.token == token)
        self.guesses, self._best = [], []

    def remove_source(self, source: DraftSource) -> None:
        """Go on without a source that failed; called where its exception is handled."""
        logger.exception("draft source %r failed; this sequence goes on without it", source.source)
        self.sources = [other for other in self.sources if other is not source]
