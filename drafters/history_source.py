"""Drafts from an adapter's task history: what its other outputs said after the same words.

A suffix table over completions in the manner of SuffixDecoding (Oliaro et al. 2024), one per adapter; the candidates
whose context agrees furthest back vote, and their agreement is the confidence.
"""

from __future__ import annotations

from collections.abc import Sequence

from .acceptance import MATCH_LIMITS, match_level
from .protocol import Guess
from .task_history import HistoryCursor, TaskHistory

_SHARES = (0.5, 0.8, 0.95)  # lowest share of votes of the second, third and fourth level
_MANY = 4  # candidates that make a unanimous vote worth more than a single occurrence


class HistorySource:
    """One sequence's place in its adapter's history. Levels: length of the match x agreement of the votes."""

    source = "history"
    prior = tuple(
        min(0.97, base + 0.08 * length) for length in range(len(MATCH_LIMITS) + 1) for base in (0.3, 0.5, 0.7, 0.8, 0.6)
    )

    def __init__(self, history: TaskHistory, prompt_len: int):
        self.history, self.prompt_len = history, prompt_len
        self._cursor = HistoryCursor(history)

    def begin(self, tokens: Sequence[int]) -> None:
        self._cursor.begin(tokens[self.prompt_len :])

    def peek(self) -> Guess | None:
        found = self._cursor.peek()
        if found is None:
            return None
        token, match_len, votes, num_candidates = found
        share = votes / num_candidates
        agreement = 4 if num_candidates < _MANY and votes == num_candidates else sum(share >= s for s in _SHARES)
        return Guess(token, match_level(match_len) * 5 + agreement)

    def follow(self, token: int) -> None:
        self._cursor.follow(token)
