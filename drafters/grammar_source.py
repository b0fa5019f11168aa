"""Forced spans: what a grammar leaves no choice about, such as the keys of a JSON object, is drafted for nothing.

The text is certain, its division into tokens is the tokenizer's and only likely the model's own, so these are guesses
like any other: the verifier decides. Reads its sequence's place in the grammar, which the chooser moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .protocol import Guess


class Constraint(Protocol):
    """A sequence's place in its grammar, which may go ahead of the output while a draft is made."""

    def rewind(self) -> None:
        """Back to the end of the output."""
        ...

    def allows(self, token: int) -> bool: ...

    def advance(self, tokens: Sequence[int]) -> bool:
        """Go on by tokens; False at one that is not allowed."""
        ...

    def forced_tokens(self) -> list[int]:
        """Tokens of the text that must come next."""
        ...


class GrammarSource:
    """Guesses the forced tokens at the constraint's place. Levels: a span's first token, those behind it."""

    source = "grammar"
    prior = (0.9, 0.95)

    def __init__(self, constraint: Constraint):
        self._constraint = constraint
        self._forced: list[int] | None = None  # newest last; None: not asked at this place
        self._is_inside = False

    def begin(self, tokens: Sequence[int]) -> None:
        self._forced, self._is_inside = None, False

    def peek(self) -> Guess | None:
        if self._forced is None:
            self._forced = self._constraint.forced_tokens()[::-1]
        return Guess(self._forced[-1], int(self._is_inside)) if self._forced else None

    def follow(self, token: int) -> None:
        forced = self._forced or []
        self._is_inside = forced[-1:] == [token]
        if self._is_inside and len(forced) > 1:
            forced.pop()
        else:
            self._forced = None
