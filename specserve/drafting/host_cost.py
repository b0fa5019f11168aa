"""What the host costs between the tokens of one step and the launch of the next, while the device stands idle.

Seconds fixed + a * sequences + b * drafts; the time of the guesses themselves is known apart and left out. All three
are learned from the steps that had to wait, each by its share of a surprise, as a logarithm: so none becomes negative,
and a stall counts as one slow step. No torch.
"""

from __future__ import annotations

import math

_FIRST = (2e-4, 1e-5, 1.5e-6)  # seconds: a step, a sequence, a draft
_NUM_FIRST = 3  # steps that set the scale; later ones correct it
_RATE = 0.2
_MAX_SURPRISE = 0.3  # natural log


class HostCost:
    """Seconds of a step by its sequences and drafts."""

    def __init__(self) -> None:
        self._weights = list(_FIRST)
        self._num_seen = 0

    @property
    def draft_s(self) -> float:
        """What one more draft adds."""
        return self._weights[2]

    def seconds(self, num_seqs: int, num_drafts: int = 0) -> float:
        fixed, of_sequence, of_draft = self._weights
        return fixed + of_sequence * num_seqs + of_draft * num_drafts

    def observe(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        if seconds <= 0.0:
            return
        expected, self._num_seen = self.seconds(num_seqs, num_drafts), self._num_seen + 1
        surprise = math.log(seconds / expected)
        if self._num_seen <= _NUM_FIRST:
            # The least counts: the first steps are slow.
            scale = math.exp(surprise) if self._num_seen == 1 else min(1.0, math.exp(surprise))
            self._weights = [weight * scale for weight in self._weights]
            return
        surprise = max(-_MAX_SURPRISE, min(_MAX_SURPRISE, surprise))
        counts = (1, num_seqs, num_drafts)
        shares = [weight * count / expected for weight, count in zip(self._weights, counts, strict=True)]
        step = _RATE * surprise / sum(share * share for share in shares)
        self._weights = [w * math.exp(step * share) for w, share in zip(self._weights, shares, strict=True)]
