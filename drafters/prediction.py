"""Predicted outputs: the client sends the text that it expects, and drafts are read from it.

While output follows the prediction, the pointer walks along. After a divergence the newest output tokens are looked up
in the prediction, nearest to where the pointer was, and drafting goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

from .acceptance import MATCH_PRIOR, match_level
from .protocol import Guess
from .suffix_index import SuffixIndex


class PredictionSource:
    """Reads drafts from `prediction`, the token ids of the client's expected output."""

    source = "prediction"
    prior = MATCH_PRIOR

    def __init__(self, prediction: Sequence[int], prompt_len: int):
        self.prediction, self.prompt_len = list(prediction), prompt_len
        self._index = SuffixIndex()
        self._num_seen = prompt_len  # tokens of the sequence that the pointer has taken into account
        self._next: int | None = 0  # index in the prediction that should come next; None while out of step
        self._last = 0  # where it was last in step
        self._match_len = 8  # before anything was generated the client's word counts as a good match
        self._draft_next: int | None = None  # the same pointer within a draft
        self._draft_len = 0

    def begin(self, tokens: Sequence[int]) -> None:
        prediction = self.prediction
        for idx in range(self._num_seen, len(tokens)):
            if self._next is not None and self._next < len(prediction) and prediction[self._next] == tokens[idx]:
                self._next += 1
                self._last = self._next
                self._match_len += 1
            else:
                self._next = None
        if self._next is None and len(tokens) > self._num_seen:
            self._index.extend(prediction)
            match = self._index.longest_match(prediction, tokens[-64:], near=self._last)
            if match is not None:
                self._next, self._match_len = match
                self._last = self._next
        self._num_seen = len(tokens)
        self._draft_next, self._draft_len = self._next, 0

    def peek(self) -> Guess | None:
        if self._draft_next is None or self._draft_next >= len(self.prediction):
            return None
        return Guess(self.prediction[self._draft_next], match_level(self._match_len + self._draft_len))

    def follow(self, token: int) -> None:
        if self._draft_next is None:
            return
        is_right = self._draft_next < len(self.prediction) and self.prediction[self._draft_next] == token
        self._draft_next = self._draft_next + 1 if is_right else None
        self._draft_len += 1
