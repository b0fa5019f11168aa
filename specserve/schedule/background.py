"""What background sequences get beside others: those are rows of batches, which nobody waits for.

While others run, background sequences join a step now and then, as many as take at most `SHARE` of the time with the
whole of such steps counted as theirs. In these steps, and in steps of their own until others have been away for
`AWAY_S`, a share of the seats and of the rows of prompts is all that they get, so that who comes next does not find a
long step under way. Without others they are sequences like any. Owns no sequence, only the time that was taken.
"""

from __future__ import annotations

from bisect import bisect_left

from ..messages import AWAY_S
from .sequence import Sequence

SHARE = 0.05  # of the time
SMALL = 4  # one in so many seats, and rows of prompts
_MOST_SAVED_S = 0.5  # of time that was not taken


class Background:
    """Of one scheduler with so many seats, and rows of prompts beside decodes."""

    def __init__(self, max_num_seqs: int, max_prefill_rows: int):
        self._most_seqs, self._most_rows = max(1, max_num_seqs // SMALL), max(1, max_prefill_rows // SMALL)
        self._saved_s = 0.0  # below 0: of what others were kept from
        self._at = 0.0  # when the latest step was scheduled
        self._were_others = self._was_along = False  # in that step
        self._others_at = -AWAY_S

    def admits(self, running: list[Sequence], now: float) -> bool:
        """Whether one more may run; more than get anything beside others would only hold seats and blocks."""
        if now - self._others_at > AWAY_S and (not running or running[0].is_background):
            return True
        return len(running) - num_others(running) < self._most_seqs

    def choose(
        self, sequences: list[Sequence], running: list[Sequence], now: float
    ) -> tuple[list[Sequence], int | None]:
        """Those of `sequences` that the next step may take, and how many rows of background prompts, None: any.

        Both lists are by priority, so that background sequences come last.
        """
        elapsed_s, self._at = now - self._at, now
        if self._were_others:
            saved_s = self._saved_s + (-elapsed_s if self._was_along else SHARE * elapsed_s)
            self._saved_s = min(saved_s, _MOST_SAVED_S)
        self._were_others, self._was_along = bool(running) and not running[0].is_background, False
        if self._were_others:
            self._others_at = now
        if not sequences or not sequences[-1].is_background or now - self._others_at > AWAY_S:
            return sequences, None
        num_others = next(idx for idx, seq in enumerate(sequences) if seq.is_background)
        if self._were_others and self._saved_s <= 0.0:
            return sequences[:num_others], 0
        self._was_along = self._were_others
        return sequences[: num_others + self._most_seqs], self._most_rows


def num_others(running: list[Sequence]) -> int:
    """How many of `running`, which are by priority, are no background sequences."""
    return bisect_left(running, True, key=_is_background)


def _is_background(seq: Sequence) -> bool:
    return seq.is_background
