"""How much a drafter of one sequence can be trusted, learned from what the verifier kept.

A running mean of the acceptance of single draft tokens, per class of match length, with a prior. Survival of position i
is its (i+1)-th power: the geometric model of Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
Decoding"; we use it only to rank and cut drafts, never in verification.
"""

from __future__ import annotations

_CLASS_LIMITS = (2, 4, 8, 16)  # longest match length of each class; the last class is open
_PRIOR_RATE = (0.3, 0.5, 0.7, 0.8, 0.9)
_PRIOR_WEIGHT = 4.0  # tokens' worth of evidence
_DECAY = 0.97  # per verified proposal, so that a change of text is noticed within some dozens


class AcceptanceModel:
    """Per-sequence estimate of the chance that one more draft token is right."""

    def __init__(self) -> None:
        self._right = [rate * _PRIOR_WEIGHT for rate in _PRIOR_RATE]
        self._seen = [_PRIOR_WEIGHT] * len(_PRIOR_RATE)

    @staticmethod
    def class_of(match_len: int) -> int:
        return sum(match_len > limit for limit in _CLASS_LIMITS)

    def survival(self, match_len: int, num_tokens: int) -> list[float]:
        """Chance that drafts 0 .. i are all right; each accepted draft makes the match longer, hence more credible."""
        values, value = [], 1.0
        for idx in range(num_tokens):
            cls = self.class_of(match_len + idx)
            value *= self._right[cls] / self._seen[cls]
            values.append(value)
        return values

    def observe(self, match_len: int, num_drafted: int, num_accepted: int) -> None:
        for cls in range(len(self._seen)):
            self._right[cls] *= _DECAY
            self._seen[cls] *= _DECAY
        for idx in range(min(num_drafted, num_accepted + 1)):  # later drafts were never compared on equal terms
            cls = self.class_of(match_len + idx)
            self._seen[cls] += 1
            self._right[cls] += idx < num_accepted
