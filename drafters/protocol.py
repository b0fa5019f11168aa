"""What a source of drafts is: something that guesses the next token of a sequence, cheaply and without promise.

Sources never decide what is generated; the verifier does. A source that is wrong or broken only costs the rows of its
drafts. Guesses are made position by position: after each, every source is told which token was proposed, its own or
another's, and goes on from there. Sources import kernels at most, never the engine.

A lookahead head is one source of its sequence, but the heads of all sequences run together: `Heads` gives sequences
their sources, and where the host asks heads for each position of a draft they are `SteppedHeads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from .head_files import LookaheadHeadFile
    from .head_source import HeadSource


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


class Heads(Protocol):
    """The lookahead heads of all adapters, wherever they run."""

    def source(self, request_id: str, head: LookaheadHeadFile, prompt: Sequence[int]) -> DraftSource:
        """The head's voice for a sequence."""
        ...

    def release_weights(self) -> None:
        """Let go of the weights of adapters that have left."""
        ...


class SteppedHeads(Heads, Protocol):
    """Heads that guess position by position, those of a step's sequences together, between the other sources."""

    def begin(self, sources: Sequence[HeadSource]) -> None:
        """Start the drafts of those sources that are ready."""
        ...

    def step(self, sources: Sequence[HeadSource]) -> None:
        """Feed each source what it was told to follow, and give it its next guess."""
        ...

    def clear(self) -> None:
        """The step's drafts are done."""
        ...
