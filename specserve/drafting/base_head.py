"""The bare base's own lookahead head: who drafts with it, and for which adapters it is given up.

It is trained on what the base says without a LoRA. For an adapter that brings no head of its own it is a guess, judged
by that adapter's own record and left out of new sequences where it is mostly wrong, so that their other sources are not
asked less often for its sake. Owns these records; drafts never change what is generated.
"""

from __future__ import annotations

from collections import Counter

from ..adapters.lookahead import Lookahead
from ..adapters.lora import LoraAdapter
from ..drafters.acceptance import SharedAcceptance
from ..drafters.head_files import LookaheadHeadFile
from ..drafters.task_history import TaskHistory

_LEAST_SEEN = 200  # guesses before a verdict
_LEAST_RIGHT = 0.25  # of them: a step's row costs about as much as so many tokens are worth, or more
_RETRY_SEQUENCES = 64  # of one adapter: one in so many is drafted for all the same, since what is asked may change


class BaseHead:
    """`lookahead` is what --base-head names; None: there is none."""

    def __init__(self, lookahead: Lookahead | None):
        self._lookahead = lookahead
        # Of the base, and where there is no base head of all adapters that bring nothing to draft with.
        self._acceptance = lookahead.acceptance if lookahead is not None else SharedAcceptance()
        self._fallbacks: dict[str, SharedAcceptance] = {}  # by content hash, of adapters that bring nothing
        self._num_left_out: Counter[str] = Counter()  # sequences, by content hash

    @property
    def history(self) -> TaskHistory | None:
        """Of the base alone."""
        return self._lookahead.history if self._lookahead is not None else None

    def head_of(self, adapter: LoraAdapter | None) -> LookaheadHeadFile | None:
        """What drafts for a new sequence of `adapter`, or of the bare base; to be called once for each."""
        if adapter is not None and adapter.lookahead is not None and adapter.lookahead.head is not None:
            return adapter.lookahead.head
        head = self._lookahead.head if self._lookahead is not None else None
        if head is None or adapter is None or not _is_mostly_wrong(self.acceptance_of(adapter)):
            return head
        self._num_left_out[adapter.content_hash] += 1
        return head if self._num_left_out[adapter.content_hash] % _RETRY_SEQUENCES == 0 else None

    def acceptance_of(self, adapter: LoraAdapter | None) -> SharedAcceptance:
        """The record that the sequences of `adapter`, or of the bare base, share."""
        if adapter is not None and adapter.lookahead is not None:
            return adapter.lookahead.acceptance
        if adapter is None or self._lookahead is None or self._lookahead.head is None:
            return self._acceptance
        return self._fallbacks.setdefault(adapter.content_hash, SharedAcceptance())

    def adapter_left(self, content_hash: str) -> None:
        """Forget what was learned for it."""
        self._fallbacks.pop(content_hash, None)
        del self._num_left_out[content_hash]


def _is_mostly_wrong(acceptance: SharedAcceptance) -> bool:
    counts = acceptance.counts.get("head", ())
    right, seen = sum(counts[::2]), sum(counts[1::2])
    return seen >= _LEAST_SEEN and right < _LEAST_RIGHT * seen
