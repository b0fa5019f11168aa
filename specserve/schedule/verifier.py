"""Decides how many drafts were right, exactly; of one sequence, and of all of a step at once.

A draft is kept while it equals the token that the sampler drew at its position, and the first drawn token that differs
(or the one after the last draft) is kept too: each forward commits between 1 and K + 1 tokens. Drafts are deterministic
guesses, so this is the rejection rule of Leviathan et al. 2023 for a point-mass draft distribution, written so that the
random number of a position decides its token with or without drafts; not only the distribution, the tokens are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .row_group import RowGroup


def accepted_tokens(drafts: Sequence[int], sampled: Sequence[int]) -> list[int]:
    """The tokens to commit: `sampled[i]` was drawn given drafts[:i].

    There are len(drafts) + 1 of them, or fewer where none could be drawn behind the last.
    """
    num_accepted, most = 0, min(len(drafts), len(sampled) - 1)
    while num_accepted < most and sampled[num_accepted] == drafts[num_accepted]:
        num_accepted += 1
    return list(sampled[: num_accepted + 1])


class Verification:
    """Which draft follows each of a step's logit rows; to be made while the rows are computed."""

    def __init__(self, groups: Sequence[RowGroup], num_rows: int) -> None:
        self.first_rows = [group.first_row for group in groups]
        self.constrained = [idx for idx, group in enumerate(groups) if group.seq.grammar is not None]
        self._drafts: np.ndarray | None = None  # if there are any
        if num_rows > len(groups):
            drafts = [-1] * num_rows  # -1 where none follows, which no token equals
            for group in groups:
                if group.drafts:
                    drafts[group.first_row : group.first_row + len(group.drafts)] = group.drafts
            self._drafts = np.array(drafts, dtype=np.int64)

    def kept(self, sampled: np.ndarray) -> list[list[int]]:
        """`accepted_tokens` of each group; `sampled` [L] int64 are the tokens of all rows."""
        tokens, firsts = sampled.tolist(), self.first_rows
        if self._drafts is None:
            return [[token] for token in tokens]
        lasts = np.flatnonzero(sampled != self._drafts)  # rows that no right draft follows
        ends = lasts[np.searchsorted(lasts, firsts)] + 1
        return [tokens[first:end] for first, end in zip(firsts, ends.tolist(), strict=True)]
