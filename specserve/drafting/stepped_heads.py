"""The heads that guess between positions, where the host asks them: one batched step for all that still grow.

If it fails, those sequences go on without their heads. Owns what such a step costs.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..drafters.head_source import HeadSource
from ..drafters.protocol import SteppedHeads
from .cost_model import MeanSeconds
from .drafts import Chooser, Clock


class HeadSteps:
    def __init__(self, heads: SteppedHeads | None, clock: Clock):
        self.heads = heads
        self._clock = clock
        self._seconds: dict[int, MeanSeconds] = {}  # one step of the heads, by bit length of their number
        self._num_asked = 0  # heads, in the latest draft

    def run(self, choosers: Sequence[Chooser], starts: bool) -> bool:
        """One step of the heads among the sources of `choosers`; False if it failed."""
        sources = [(chooser, s) for chooser in choosers for s in chooser.sources if isinstance(s, HeadSource)]
        if self.heads is None or not sources:
            return True
        try:
            if starts:
                self.heads.begin([source for _, source in sources])
                self._num_asked = len(sources)
            start = self._clock()
            self.heads.step([source for _, source in sources])
            times = self._seconds.setdefault(self._num_asked.bit_length(), MeanSeconds())
            times.observe(self._clock() - start)
        except Exception:
            self.heads.clear()
            for chooser, source in sources:
                chooser.remove_source(source)
            return False
        return True

    def clear(self) -> None:
        """The step's drafts are done."""
        if self.heads is not None:
            self.heads.clear()

    @property
    def seconds(self) -> float:
        """What a step of as many heads as in the latest draft takes, or of the number nearest to it that was seen."""
        bucket = self._num_asked.bit_length()
        nearest = min(self._seconds, key=lambda b: abs(b - bucket), default=None)
        return self._seconds[nearest].seconds if nearest is not None else 0.0
