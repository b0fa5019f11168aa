"""Finds where the newest tokens occurred before: the shared machinery of the drafters that copy.

An index of every bigram's positions in a text that only grows. A lookup walks back from the few most recent positions
of the newest bigram and keeps the longest match, so the continuation is the one whose context agrees furthest back.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_MATCH_LEN = 32  # context beyond this says no more about the continuation
MAX_CANDIDATES = 16  # most recent occurrences that are compared


class SuffixIndex:
    """Bigram positions of a growing token text; memory is one list entry a token."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, int], list[int]] = {}
        self._num_indexed = 1  # bigrams end at index >= 1

    def extend(self, tokens: Sequence[int]) -> None:
        """Index what was appended to `tokens` since the last call; an entry is the index after the bigram."""
        for end in range(self._num_indexed, len(tokens)):
            self._ends.setdefault((tokens[end - 1], tokens[end]), []).append(end + 1)
        self._num_indexed = max(self._num_indexed, len(tokens))

    def longest_match(
        self, text: Sequence[int], suffix: Sequence[int], *, near: int | None = None
    ) -> tuple[int, int] | None:
        """Where the end of `suffix` occurs in the indexed `text`: (index of the continuation, match length).

        Among equally long matches the one nearest to `near` wins, or the most recent one when `near` is None. An
        occurrence at the very end of `text` has no continuation and is no match.
        """
        if len(suffix) < 2:
            return None
        best: tuple[int, int, int] | None = None
        for position in reversed(self._ends.get((suffix[-2], suffix[-1]), ())[-MAX_CANDIDATES - 1 :]):
            if position >= len(text):
                continue
            length = 2
            limit = min(MAX_MATCH_LEN, position, len(suffix))
            while length < limit and text[position - length - 1] == suffix[-length - 1]:
                length += 1
            rank = -abs(position - near) if near is not None else position
            if best is None or (length, rank) > best[:2]:
                best = (length, rank, position)
        return None if best is None else (best[2], best[0])
