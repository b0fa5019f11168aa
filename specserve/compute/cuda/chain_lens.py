"""How many guesses the heads make behind a step: as many as the drafts' budget takes, of a few lengths.

What the budget takes shows in the drafts that were verified. A draft that ended before its chain did wanted no longer
one; one that ended with it may have, and only a longer chain can tell. So sequences that are below a length's end get
that length, and where the longest draft reaches the end, the next length is tried: at once, and then ever more seldom
while nobody takes more.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

_MOST_WAIT = 64  # launches between two trials


class ChainLens:
    """Of launches that make one of `lens` guesses, ascending, for sequences on `num_seats` seats."""

    def __init__(self, lens: Seq[int], num_seats: int):
        self._lens = np.array(lens)
        self._longest = int(self._lens[-1])  # draft lately: falls by one a launch
        self._lately = np.full(num_seats, self._longest)  # the same, by seat
        self._tried = 0  # drafts reached the end of this length, and the next one is tried now and then
        self._wait = self._left = 0  # launches between the latest two trials, and to the next one

    def start(self, seats: Seq[int]) -> None:
        """Other sequences have these seats now; they are taken to be like the rest."""
        self._lately[seats] = self._longest

    def plan(self, seats: np.ndarray, num_drafts: np.ndarray) -> tuple[int, np.ndarray]:
        """(Guesses of the launch, how many of them each sequence wants [S]) behind drafts of so many tokens [S]."""
        lately = self._lately[seats] = np.maximum(self._lately[seats] - 1, num_drafts)
        most = int(num_drafts.max())
        self._longest = max(self._longest - 1, most)
        if self._longest > self._tried:
            self._tried = 0  # somebody takes more
        num = self._at_least(self._longest)
        if most == num and self._tries(num):
            num = self._at_least(num + 1)
        return num, np.minimum(self._lens[np.searchsorted(self._lens[:-1], lately, side="right")], num)

    def _at_least(self, num: int) -> int:
        return int(self._lens[np.searchsorted(self._lens[:-1], num)])

    def _tries(self, reached: int) -> bool:
        """Whether this launch is longer than `reached`, whose end the drafts have come to."""
        if reached != self._tried:
            self._tried, self._wait, self._left = reached, 0, 0
        if self._left:
            self._left -= 1
            return False
        self._wait = self._left = min(_MOST_WAIT, 2 * self._wait + 1)
        return True
