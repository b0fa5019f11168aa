"""Prompt lookup: the newest tokens occurred before, so what followed them then may follow them now.

Saxena 2023, "Prompt Lookup Decoding"; we match as far back as the context agrees instead of a fixed n, over prompt and
output alike, and stop drafting when a sequence's own record says that copies do not pay.
"""

from __future__ import annotations

from collections.abc import Sequence

from .acceptance import AcceptanceModel
from .protocol import Proposal
from .suffix_index import SuffixIndex


class NgramDrafter:
    """Copies from the sequence's own prompt and output."""

    source = "ngram"

    def __init__(self) -> None:
        self._index = SuffixIndex()
        self._acceptance = AcceptanceModel()
        self._match_len = 0

    def propose(self, tokens: Sequence[int], max_tokens: int) -> Proposal | None:
        self._index.extend(tokens)
        match = self._index.longest_match(tokens, tokens[-64:])
        if match is None:
            return None
        start, self._match_len = match
        drafts = list(tokens[start : start + max_tokens])
        period = len(tokens) - start
        while len(drafts) < max_tokens:  # the match reaches the end of the text: it repeats itself
            drafts.append(drafts[len(drafts) - period])
        return Proposal(drafts, self._acceptance.survival(self._match_len, len(drafts)), self.source)

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        self._acceptance.observe(self._match_len, num_drafted, num_accepted)
