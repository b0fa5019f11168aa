"""Prompt lookup: the newest tokens occurred before, so what followed them then may follow them now.

Saxena 2023, "Prompt Lookup Decoding"; we match as far back as the context agrees instead of a fixed n, over prompt and
output alike, and follow whatever is proposed: after another source's token the match goes on or is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from .acceptance import MATCH_PRIOR, match_level
from .protocol import Guess
from .suffix_index import SuffixIndex

_SUFFIX_LEN = 64


class NgramSource:
    """Copies from the sequence's own prompt and output."""

    source = "ngram"
    prior = MATCH_PRIOR

    def __init__(self) -> None:
        self._index = SuffixIndex()
        self._tokens: Sequence[int] = ()
        self._draft: list[int] = []
        self._next: int | None = None  # index in the text, then in the draft, of the guess
        self._match_len = 0

    def begin(self, tokens: Sequence[int]) -> None:
        self._index.extend(tokens)
        self._tokens, self._draft = tokens, []
        self._match(tokens[-_SUFFIX_LEN:])

    def peek(self) -> Guess | None:
        token = self._at(self._next)
        return None if token is None else Guess(token, match_level(self._match_len))

    def follow(self, token: int) -> None:
        is_right = self._at(self._next) == token
        self._draft.append(token)
        if is_right and self._next is not None:
            self._next += 1
            self._match_len += 1
        else:
            self._match([*self._tokens[-_SUFFIX_LEN:], *self._draft][-_SUFFIX_LEN:])

    def _match(self, suffix: Sequence[int]) -> None:
        self._next, self._match_len = self._index.longest_match(self._tokens, suffix) or (None, 0)

    def _at(self, idx: int | None) -> int | None:
        """Token of the text that the draft makes longer: a match that reaches its end repeats itself."""
        if idx is None:
            return None
        num_tokens = len(self._tokens)
        if idx < num_tokens:
            return self._tokens[idx]
        return self._draft[idx - num_tokens] if idx - num_tokens < len(self._draft) else None
