"""Decides how many drafts were right, exactly.

A draft is kept while it equals the token that the sampler drew at its position, and the first drawn token that differs
(or the one after the last draft) is kept too: each forward commits between 1 and K + 1 tokens. Drafts are deterministic
guesses, so this is the rejection rule of Leviathan et al. 2023 for a point-mass draft distribution, written so that the
random number of a position decides its token with or without drafts; not only the distribution, the tokens are equal.
"""

from __future__ import annotations

from collections.abc import Sequence


def accepted_tokens(drafts: Sequence[int], sampled: Sequence[int]) -> list[int]:
    """The tokens to commit: `sampled[i]` was drawn given drafts[:i].

    There are len(drafts) + 1 of them, or fewer where none could be drawn behind the last.
    """
    num_accepted, most = 0, min(len(drafts), len(sampled) - 1)
    while num_accepted < most and sampled[num_accepted] == drafts[num_accepted]:
        num_accepted += 1
    return list(sampled[: num_accepted + 1])
