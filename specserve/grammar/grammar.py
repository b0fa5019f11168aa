"""One sequence's place in a grammar: what may come next, what must come next, and whether anything may.

Owns the matcher of one sequence. Its place is the committed output plus, while drafts are made or verified, some tokens
ahead; `rewind` goes back, and nothing but `commit` commits. Invariant: a matcher that fails on tokens that were only
tried is made anew from the committed ones, so drafts can spoil nothing; one that fails on committed tokens allows
nothing any more. llguidance never raises: `is_error` is asked after everything that may have failed, because a failed
matcher's mask allows the end of text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """What all sequences of one grammar share; `prototype` is never advanced. Masks have `mask_words` int32 words."""

    prototype: LLMatcher
    vocab_size: int  # ids that the matcher knows; it must never see another
    eos_token_ids: tuple[int, ...]

    @property
    def mask_words(self) -> int:
        return (self.vocab_size + 31) // 32

    def start(self, ignore_eos: bool = False) -> Grammar:
        """A sequence's place before its first token; with `ignore_eos` it ends only where nothing else may come."""
        return Grammar(self, ignore_eos)


class Grammar:
    """The place of one sequence. Token ids may be any integers; those outside the vocabulary are not allowed."""

    def __init__(self, compiled: CompiledGrammar, ignore_eos: bool = False):
        self.compiled = compiled
        self.error = ""  # why nothing is allowed any more, once that is so
        self.problem = ""  # what the matcher said when it last had no mask to give
        self._vocab_size = compiled.vocab_size
        self._matcher = compiled.prototype.deep_copy()
        self._committed: list[int] = []
        self._num_ahead = 0
        self._never = frozenset(compiled.eos_token_ids) if ignore_eos else frozenset()

    @property
    def is_terminated(self) -> bool:
        """Whether the committed output is complete and nothing can be added."""
        self.rewind()
        return not self.error and self._matcher.is_stopped()

    def commit(self, tokens: Sequence[int]) -> int:
        """Commit as many of `tokens` as are allowed, in order, and say how many; none behind a complete output.

        When a token is forbidden although the output can go on, nothing is allowed from then on.
        """
        self.rewind()
        if self.error:
            return 0
        known = self._known(tokens)
        num = self._matcher.try_consume_tokens(known)
        self._committed += known[:num]
        if num < len(tokens) and not self.is_terminated:
            self._fail(self._matcher.get_error() or f"token {tokens[num]} is not allowed here")
        return num

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, in order, may come next."""
        known = self._known(tokens)
        return self._matcher.validate_tokens(known) if known and not self.error else 0

    def allows(self, token: int) -> bool:
        return self.num_allowed((token,)) == 1

    def advance(self, tokens: Sequence[int]) -> bool:
        """Go ahead of the committed output; False, at the first token that is not allowed."""
        known = self._known(tokens)
        if self.error or len(known) < len(tokens):
            return False
        num = self._matcher.try_consume_tokens(known)
        self._num_ahead += num
        return num == len(tokens)

    def rewind(self) -> None:
        """Back to the committed output."""
        if self._num_ahead or self._matcher.is_error():
            if self._matcher.is_error() or not self._matcher.rollback(self._num_ahead):
                self._start_again()
            self._num_ahead = 0

    def forced_tokens(self) -> list[int]:
        """Tokens of the text that must come next, as the tokenizer would write it; the model may write it otherwise."""
        return [] if self.error else self._matcher.compute_ff_tokens()

    def fill_mask(self, row: np.ndarray) -> bool:
        """Write what may come next, a bit a token, into row [mask_words] int32; False, and zeros, if nothing may."""
        if not self.error:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self.error or self._matcher.is_error():
            self.problem = self.error or self._matcher.get_error().partition("\n")[0]
            row[:] = 0
            return False
        if self._never:
            hide_tokens(row[np.newaxis], np.zeros(1, dtype=np.intp), self._never)
        return bool(row.any())

    def fill_masks(self, drafts: Sequence[int], rows: np.ndarray) -> None:
        """Masks behind the committed output and each of `drafts` into rows [len(drafts) + 1, mask_words].

        Rows behind the first draft that is not allowed are zeros: nothing may be sampled there.
        """
        self.rewind()
        rows[:] = 0
        for idx, row in enumerate(rows):
            if not self.fill_mask(row) or idx == len(drafts) or not self.advance(drafts[idx : idx + 1]):
                break
        self.rewind()

    @property
    def hidden(self) -> frozenset[int]:
        """Ends of text that may come only where nothing else may."""
        return self._never

    @property
    def has_failed(self) -> bool:
        """Whether the matcher failed since the last `rewind`."""
        return self._matcher.is_error()

    def mask_task(self, drafts: Sequence[int]) -> tuple[LLMatcher, list[int]] | None:
        """The matcher, at the committed output, and those of `drafts` that it may see; None if nothing is allowed.

        For `MaskBatch`, which moves the matcher and brings it back.
        """
        self.rewind()
        if self.error:
            self.problem = self.error
            return None
        return self._matcher, self._known(drafts) if drafts else []

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """`tokens` up to the first that the matcher must not see."""
        size, never = self._vocab_size, self._never
        for idx, token in enumerate(tokens):
            if not 0 <= token < size or token in never:
                return list(tokens[:idx])
        return list(tokens)

    def _start_again(self) -> None:
        matcher = self.compiled.prototype.deep_copy()
        if matcher.try_consume_tokens(self._committed) != len(self._committed) or matcher.is_error():
            self._fail(matcher.get_error() or "the committed output is not allowed")
        self._matcher = matcher

    def _fail(self, reason: str) -> None:
        self.error = reason.partition("\n")[0]


def hide_tokens(masks: np.ndarray, rows: np.ndarray, tokens: Collection[int]) -> None:
    """Take `tokens` out of those `rows` (indices) of masks [R, mask_words] int32 that allow anything else."""
    words = masks.view(np.uint32)
    places = [(token // 32, np.uint32(1 << token % 32)) for token in tokens]
    has_some = np.zeros(len(rows), dtype=np.bool_)
    for word, bit in places:
        has_some |= words[rows, word] & bit != 0
    if not has_some.any():  # the rule within a JSON value
        return
    rows = rows[has_some]
    kept = words[rows]
    for word, bit in places:
        kept[:, word] &= ~bit
    other = kept.any(axis=1)
    words[rows[other]] = kept[other]
