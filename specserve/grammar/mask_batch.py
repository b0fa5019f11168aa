"""The masks of many sequences at once: the matchers' part in one call without the interpreter lock.

Owns what surrounds that call: what the matchers may see, the rows of those that fail, and hidden ends of text.
Invariant: the bits are those that `Grammar.fill_masks` makes for each sequence alone, and it makes them where a matcher
fails. Sequences of one compiled grammar share a lock within the matcher, so threads help with several grammars only.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from llguidance import LLExecutor, LLMatcher

from .grammar import Grammar, hide_tokens

Entry = TypeVar("Entry")
MAX_THREADS = 4


class MaskBatch:
    """Fills masks on `num_threads`, by default one in four of the machine's; one is the caller's own.

    On two busy cores a mask took 19 to 24 microseconds on the caller's thread and 23 to 49 on others.
    """

    def __init__(self, num_threads: int | None = None):
        self._num_threads = num_threads or min(MAX_THREADS, max(1, (os.cpu_count() or 1) // 4))
        self._executor = LLExecutor(self._num_threads)

    def fill(self, places: Sequence[tuple[Grammar, Sequence[int]]], bits: np.ndarray) -> None:
        """Masks behind the committed output of each of `places` and behind each of its drafts, place after place.

        `bits` [sum of len(drafts) + 1, mask_words] int32, C-contiguous. Rows behind a draft that is not allowed are
        zeros: nothing may be sampled there.
        """
        assert bits.flags.c_contiguous and bits.dtype == np.int32
        plain: list[tuple[LLMatcher, int]] = []  # matcher, row
        drafted: list[tuple[LLMatcher, int, list[int]]] = []  # matcher, first row, drafts
        first = 0
        for grammar, drafts in places:
            if (task := grammar.mask_task(drafts)) is not None:
                matcher, known = task
                if known:
                    drafted.append((matcher, first, known))
                else:
                    plain.append((matcher, first))
            first += len(drafts) + 1
        assert first == len(bits), (first, len(bits))
        bits.fill(0)
        where = (bits.ctypes.data, bits.shape[1] * bits.itemsize, len(bits))
        for plain_part in self._calls(plain):
            self._executor.unsafe_compute_mask_ptr(plain_part, *where)
        for drafted_part in self._calls(drafted):
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted_part, *where)
        _finish(places, bits)

    def _calls(self, entries: list[Entry]) -> Iterable[list[Entry]]:
        """What is computed at a time; a list of one is computed by the thread that asks."""
        if self._num_threads == 1:
            return ([entry] for entry in entries)
        return [entries] if entries else []


def _finish(places: Sequence[tuple[Grammar, Sequence[int]]], bits: np.ndarray) -> None:
    """What the matchers leave to do: rows of those that failed, and ends of text."""
    hiding: defaultdict[frozenset[int], list[int]] = defaultdict(list)  # rows by what is hidden in them
    first = 0
    for grammar, drafts in places:
        end = first + len(drafts) + 1
        if grammar.has_failed:
            grammar.fill_masks(drafts, bits[first:end])  # one by one, which says where nothing is allowed
        elif grammar.hidden:
            hiding[grammar.hidden] += range(first, end)
        first = end
    for tokens, rows in hiding.items():
        hide_tokens(bits, np.array(rows), tokens)
