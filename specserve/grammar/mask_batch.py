"""The masks of many sequences at once, on the matcher's own threads, with the interpreter lock let go.

Owns what surrounds that one call: what the matchers may see, the rows of those that fail, and hidden ends of text.
Invariant: the bits are those that `Grammar.fill_masks` makes for each sequence alone, and it makes them where a matcher
fails. Sequences of one compiled grammar share a lock within the matcher, so threads help with several.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher

from .grammar import Grammar, hide_tokens

MAX_THREADS = 4


def make_executor() -> LLExecutor:
    """The threads that batches are computed on."""
    return LLExecutor(min(MAX_THREADS, os.cpu_count() or 1))


class MaskBatch:
    """Masks behind the committed outputs of `places` and behind each of their drafts.

    `bits` [sum of len(drafts) + 1, mask_words] int32, C-contiguous, gets them place after place; rows behind a draft
    that is not allowed are zeros. From here to `finish` nothing else may ask the places anything; only `compute` may
    run on another thread.
    """

    def __init__(self, places: Sequence[tuple[Grammar, Sequence[int]]], bits: np.ndarray):
        assert bits.flags.c_contiguous and bits.dtype == np.int32
        self._places, self._bits = places, bits
        self._plain: list[tuple[LLMatcher, int]] = []
        self._drafted: list[tuple[LLMatcher, int, list[int]]] = []
        first = 0
        for grammar, drafts in places:
            if (task := grammar.mask_task(drafts)) is not None:
                matcher, known = task
                if known:
                    self._drafted.append((matcher, first, known))
                else:
                    self._plain.append((matcher, first))
            first += len(drafts) + 1
        assert first == len(bits), (first, len(bits))

    def compute(self, executor: LLExecutor) -> None:
        """The matchers' part."""
        bits = self._bits
        bits.fill(0)
        where = (bits.ctypes.data, bits.shape[1] * bits.itemsize, len(bits))
        if self._plain:
            executor.unsafe_compute_mask_ptr(self._plain, *where)
        if self._drafted:
            executor.unsafe_compute_mask_ptr_with_draft_token(self._drafted, *where)

    def finish(self) -> None:
        """What the matchers leave to do; the places may be asked again."""
        hiding: dict[frozenset[int], list[int]] = {}  # rows by what is hidden in them
        first = 0
        for grammar, drafts in self._places:
            num_rows = len(drafts) + 1
            if grammar.end_task(drafts, self._bits[first : first + num_rows]) and grammar.hidden:
                hiding.setdefault(grammar.hidden, []).extend(range(first, first + num_rows))
            first += num_rows
        for tokens, rows in hiding.items():
            hide_tokens(self._bits, np.array(rows), tokens)
