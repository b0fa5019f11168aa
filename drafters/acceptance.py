"""How often guesses are right, by source and its own class of confidence, learned from what the verifier kept.

One `SharedAcceptance` an adapter learns from all of its sequences; each sequence's `Acceptance` starts from it and
learns faster. Estimates only rank and cut drafts (the role of the acceptance rate in Leviathan et al. 2023, "Fast
Inference from Transformers via Speculative Decoding"); they never touch verification. An average by position stands in
for a guess that was not made yet, when asking for it has to be worth its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .protocol import DraftSource, Guess

_PRIOR_WEIGHT = 8.0  # guesses' worth of evidence that a source's own prior has
_SHARED_WEIGHT = 4.0  # and that the adapter's record has for a new sequence
_SHARED_DECAY = 0.999  # a guess: about a thousand are remembered
_SEQUENCE_DECAY = 0.98
_POSITION_PRIOR = 0.8  # before anything was seen, one more position is worth a try
_MAX_LOADED = 200.0  # a record read from a file gives way to what is seen


class _Table:
    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.counts: dict[str, list[list[float]]] = {}  # source -> level -> [right, seen]

    def level(self, source: DraftSource, level: int) -> list[float]:
        counts = self.counts.get(source.source)
        if counts is None:
            counts = self.counts[source.source] = [[0.0, 0.0] for _ in source.prior]
        return counts[level]

    def observe(self, source: DraftSource, level: int, is_right: bool) -> None:
        count = self.level(source, level)
        count[0] = count[0] * self._decay + is_right
        count[1] = count[1] * self._decay + 1.0


class SharedAcceptance(_Table):
    """The record of one adapter, or of the base model."""

    def __init__(self, loaded: Mapping[str, Sequence[tuple[float, float]]] | None = None) -> None:
        super().__init__(_SHARED_DECAY)
        self._positions: list[list[float]] = []  # of a draft -> [right, seen] of the best guess there
        for source, levels in (loaded or {}).items():
            self.counts[source] = []
            for right, seen in levels:
                scale = min(1.0, _MAX_LOADED / seen) if seen > 0 else 0.0
                self.counts[source].append([min(right, seen) * scale, seen * scale])

    def rate(self, source: DraftSource, level: int) -> float:
        right, seen = self.level(source, level)
        return (right + source.prior[level] * _PRIOR_WEIGHT) / (seen + _PRIOR_WEIGHT)

    def position_rate(self, position: int) -> float:
        """How often the best guess at this position was right, those before it being right."""
        right, seen = self._positions[position] if position < len(self._positions) else (0.0, 0.0)
        return (right + _POSITION_PRIOR * _PRIOR_WEIGHT) / (seen + _PRIOR_WEIGHT)

    def observe_position(self, position: int, is_right: bool) -> None:
        while len(self._positions) <= position:
            self._positions.append([0.0, 0.0])
        count = self._positions[position]
        count[0] = count[0] * _SHARED_DECAY + is_right
        count[1] = count[1] * _SHARED_DECAY + 1.0

    def dump(self) -> dict[str, list[tuple[float, float]]]:
        """The record as it is stored beside a head."""
        return {
            source: [(round(right, 2), round(seen, 2)) for right, seen in levels]
            for source, levels in self.counts.items()
        }


class Acceptance:
    """One sequence's estimate, started from its adapter's."""

    def __init__(self, shared: SharedAcceptance) -> None:
        self._shared = shared
        self._own = _Table(_SEQUENCE_DECAY)

    def rate(self, source: DraftSource, guess: Guess) -> float:
        right, seen = self._own.level(source, guess.level)
        prior = self._shared.rate(source, guess.level)
        return (right + prior * _SHARED_WEIGHT) / (seen + _SHARED_WEIGHT)

    def observe(self, source: DraftSource, guess: Guess, is_right: bool) -> None:
        self._own.observe(source, guess.level, is_right)
        self._shared.observe(source, guess.level, is_right)


MATCH_LIMITS = (2, 4, 8, 16)  # longest match length of each level of a copying source; the last level is open
MATCH_PRIOR = (0.3, 0.5, 0.7, 0.8, 0.9)


def match_level(match_len: int) -> int:
    return sum(match_len > limit for limit in MATCH_LIMITS)
