"""How often guesses are right, by source and its own class of confidence, learned from what the verifier kept.

One `SharedAcceptance` an adapter learns from all of its sequences; each sequence's `Acceptance` starts from it and
learns faster. Estimates only rank and cut drafts (the role of the acceptance rate in Leviathan et al. 2023, "Fast
Inference from Transformers via Speculative Decoding"); they never touch verification. An average by position stands in
for a guess that was not made yet, when asking for it has to be worth its time.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from .protocol import DraftSource, Guess

_PRIOR_WEIGHT = 8.0  # guesses' worth of evidence that a source's own prior has
_SHARED_WEIGHT = 4.0  # and that the adapter's record has for a new sequence
_SHARED_DECAY = 0.999  # a guess: about a thousand are remembered
_SEQUENCE_DECAY = 0.98
_POSITION_PRIOR = 0.8  # before anything was seen, one more position is worth a try
MAX_POSITIONS = 64  # the longest draft that the engine may be set to
_MAX_LOADED = 200.0  # a record read from a file gives way to what is seen


class _Table:
    """Counts by source: right and seen of level 0, right and seen of level 1, ..; native code reads them."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.counts: dict[str, array[float]] = {}

    def of(self, source: DraftSource) -> array[float]:
        """Of all levels of `source`. It stays where it is in memory unless a source of the name comes with more."""
        counts, num = self.counts.get(source.source), 2 * len(source.prior)
        if counts is None or len(counts) < num:
            old = counts or array("d")
            counts = self.counts[source.source] = old + array("d", bytes(8 * (num - len(old))))
        return counts

    def observe(self, source: DraftSource, level: int, is_right: bool) -> None:
        _observe(self.of(source), level, self._decay, is_right)


def _observe(counts: array[float], level: int, decay: float, is_right: bool) -> None:
    counts[2 * level] = counts[2 * level] * decay + is_right
    counts[2 * level + 1] = counts[2 * level + 1] * decay + 1.0


class SharedAcceptance(_Table):
    """The record of one adapter, or of the base model."""

    def __init__(self, loaded: Mapping[str, Sequence[tuple[float, float]]] | None = None) -> None:
        super().__init__(_SHARED_DECAY)
        self.positions = array("d", bytes(16 * MAX_POSITIONS))  # of the best guess there, as counts of levels
        for source, levels in (loaded or {}).items():
            counts = self.counts[source] = array("d")
            for right, seen in levels:
                scale = min(1.0, _MAX_LOADED / seen) if seen > 0 else 0.0
                counts.extend((min(right, seen) * scale, seen * scale))

    def rate(self, source: DraftSource, level: int) -> float:
        counts = self.of(source)
        right, seen = counts[2 * level], counts[2 * level + 1]
        return (right + source.prior[level] * _PRIOR_WEIGHT) / (seen + _PRIOR_WEIGHT)

    def position_rate(self, position: int) -> float:
        """How often the best guess at this position was right, those before it being right."""
        idx = 2 * min(position, MAX_POSITIONS - 1)
        right, seen = self.positions[idx], self.positions[idx + 1]
        return (right + _POSITION_PRIOR * _PRIOR_WEIGHT) / (seen + _PRIOR_WEIGHT)

    def observe_position(self, position: int, is_right: bool) -> None:
        if position < MAX_POSITIONS:
            _observe(self.positions, position, _SHARED_DECAY, is_right)

    def dump(self) -> dict[str, list[tuple[float, float]]]:
        """The record as it is stored beside a head; sources that were never right or wrong are left out."""
        return {
            source: [(round(counts[idx], 2), round(counts[idx + 1], 2)) for idx in range(0, len(counts), 2)]
            for source, counts in self.counts.items()
            if any(counts)
        }


class Acceptance:
    """One sequence's estimate, started from its adapter's."""

    def __init__(self, shared: SharedAcceptance) -> None:
        self._shared = shared
        self._own = _Table(_SEQUENCE_DECAY)

    def rate(self, source: DraftSource, guess: Guess) -> float:
        own = self._own.of(source)
        right, seen = own[2 * guess.level], own[2 * guess.level + 1]
        prior = self._shared.rate(source, guess.level)
        return (right + prior * _SHARED_WEIGHT) / (seen + _SHARED_WEIGHT)

    def observe(self, source: DraftSource, guess: Guess, is_right: bool) -> None:
        self._own.observe(source, guess.level, is_right)
        self._shared.observe(source, guess.level, is_right)


MATCH_LIMITS = (2, 4, 8, 16)  # longest match length of each level of a copying source; the last level is open
MATCH_PRIOR = (0.3, 0.5, 0.7, 0.8, 0.9)


def match_level(match_len: int) -> int:
    return sum(match_len > limit for limit in MATCH_LIMITS)
