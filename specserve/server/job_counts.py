"""What has come of one request: tokens, times and ends, counted once for the log's line and for the span."""

from __future__ import annotations

import time

from ..messages import Delta, Usage
from ..pooling_messages import Pooled


class JobCounts:
    """Of `num_sequences` that generate, or texts that are pooled, from now on."""

    def __init__(self, num_sequences: int):
        self._num_sequences = num_sequences
        self._start = time.monotonic()
        self.first_s: float | None = None  # to the first token
        self.num_generated = 0
        self.finishes: list[str] = []  # reasons
        self.usages: list[Usage] = []
        self.pooled: list[Pooled] = []

    def delta(self, delta: Delta) -> None:
        if self.first_s is None:
            self.first_s = self.seconds
        self.num_generated += len(delta.token_ids)
        if delta.finish_reason is not None:
            self.finishes.append(delta.finish_reason)
        if delta.usage is not None:
            self.usages.append(delta.usage)

    @property
    def seconds(self) -> float:
        """Until now."""
        return time.monotonic() - self._start

    @property
    def is_whole(self) -> bool:
        """Whether all sequences or texts have ended."""
        return len(self.finishes) + len(self.pooled) == self._num_sequences

    @property
    def num_cached_tokens(self) -> int:
        return sum([usage.cached_tokens for usage in self.usages] + [each.cached_tokens for each in self.pooled])
