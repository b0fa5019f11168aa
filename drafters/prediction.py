"""Predicted outputs: the client sends the text that it expects, and drafts are read from it.

While output follows the prediction, the pointer walks along. After a divergence the newest output tokens are looked up
in the prediction, nearest to where the pointer was, and drafting goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

from .acceptance import AcceptanceModel
from .protocol import Proposal
from .suffix_index import SuffixIndex


class PredictionDrafter:
    """Reads drafts from `prediction`, the token ids of the client's expected output."""

    source = "prediction"

    def __init__(self, prediction: Sequence[int], prompt_len: int):
        self._prediction = list(prediction)
        self._index = SuffixIndex()
        self._index.extend(self._prediction)
        self._acceptance = AcceptanceModel()
        self._num_seen = prompt_len  # tokens of the sequence that the pointer has taken into account
        self._next: int | None = 0  # index in the prediction that should come next; None while out of step
        self._last = 0  # where it was last in step
        self._match_len = 8  # before anything was generated the client's word counts as a good match

    def propose(self, tokens: Sequence[int], max_tokens: int) -> Proposal | None:
        self._follow(tokens)
        if self._next is None or self._next >= len(self._prediction):
            return None
        drafts = self._prediction[self._next : self._next + max_tokens]
        return Proposal(drafts, self._acceptance.survival(self._match_len, len(drafts)), self.source)

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        self._acceptance.observe(self._match_len, num_drafted, num_accepted)

    def _follow(self, tokens: Sequence[int]) -> None:
        prediction = self._prediction
        for idx in range(self._num_seen, len(tokens)):
            if self._next is not None and self._next < len(prediction) and prediction[self._next] == tokens[idx]:
                self._next += 1
                self._last = self._next
                self._match_len += 1
            else:
                self._next = None
        if self._next is None and len(tokens) > self._num_seen:
            match = self._index.longest_match(prediction, tokens[-64:], near=self._last)
            if match is not None:
                self._next, self._match_len = match
                self._last = self._next
        self._num_seen = len(tokens)
