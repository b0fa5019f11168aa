"""What a source of drafts is: something that guesses the next token of a sequence, cheaply and without promise.

Sources never decide what is generated; the verifier does. A source that is wrong or broken only costs the rows of its
drafts. Guesses are made position by position: after each, every source is told which token was proposed, its own or
another's, and goes on from there. Sources import kernels at most, never the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Guess(NamedTuple):
    """The token that may come next; `level` is the source's class of confidence, an index into its `prior`."""

    token: int
    level: int


class DraftSource(Protocol):
    """Guesses for one sequence. State is per sequence; tokens are only ever appended."""

    @property
    def source(self) -> str:
        """The name in metrics."""
        ...

    @property
    def prior(self) -> Sequence[float]:
        """By level: how often such a guess is right, before anything was seen."""
        ...

    def begin(self, tokens: Sequence[int]) -> None:
        """Start a draft that continues `tokens`, the prompt and output so far, newest last."""
        ...

    def peek(self) -> Guess | None:
        """Guess the next token of the draft; None when there is nothing to say."""
        ...

    def follow(self, token: int) -> None:
        """The draft goes on with `token`."""
        ...
