"""What a drafter is: something that guesses the next tokens of a sequence, cheaply and without promise.

Drafters never decide what is generated; the verifier does. A drafter that is wrong, slow to learn or broken only costs
the rows of its drafts. Drafters import kernels at most, never the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next, and how likely each one is to be reached and right.

    `survival[i]` estimates the probability that tokens 0 .. i are all accepted; it never grows with i.
    """

    tokens: list[int]
    survival: list[float]
    source: str


class SequenceDrafter(Protocol):
    """Drafts for one sequence from its own text. State is per sequence; tokens are only ever appended."""

    source: str

    def propose(self, tokens: Sequence[int], max_tokens: int) -> Proposal | None:
        """Guess what follows `tokens` (prompt and output, newest last); None when there is nothing to say."""
        ...

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learn how many of its last drafts were verified and how many of them were right."""
        ...
