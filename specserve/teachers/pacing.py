"""When the next request may leave: requests and tokens a minute, and pauses that the endpoint asks for.

All requests to one endpoint wait here in the order in which they came. A pause holds for all of them: an endpoint that
answers one with 429 answers the others so, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from ..token_bucket import Bucket, Clock
from .spec import TeacherSpec


class Pacing:
    """Made and used on one event loop."""

    def __init__(self, spec: TeacherSpec, clock: Clock = time.monotonic):
        self._clock = clock
        self._requests = Bucket(spec.requests_per_minute, clock) if spec.requests_per_minute else None
        self._tokens = Bucket(spec.tokens_per_minute, clock) if spec.tokens_per_minute else None
        self._paused_until = 0.0
        self._first = asyncio.Lock()  # whose turn it is
        self._ended = asyncio.Event()

    async def turn(self, num_tokens: int) -> None:
        """Wait until a request of about so many tokens may leave; `settle` says what it came to."""
        async with self._first:
            while (wait_s := self._wait_s(num_tokens)) > 0 and not self._ended.is_set():
                await self.sleep(wait_s)
            for bucket, amount in self._buckets(num_tokens):
                bucket.take(amount)

    def settle(self, num_reserved: int, num_used: int) -> None:
        if self._tokens is not None:
            self._tokens.take(num_used - num_reserved)

    def pause(self, seconds: float) -> None:
        """No request leaves for so long."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    def end(self) -> None:
        """Nobody waits any more: the run is over."""
        self._ended.set()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    async def sleep(self, seconds: float) -> None:
        """Until then, or until the end."""
        try:
            await asyncio.wait_for(self._ended.wait(), seconds)
        except TimeoutError:
            return

    def _wait_s(self, num_tokens: int) -> float:
        waits = [bucket.wait_s(amount) for bucket, amount in self._buckets(num_tokens)]
        return max([self._paused_until - self._clock(), *waits])

    def _buckets(self, num_tokens: int) -> Iterator[tuple[Bucket, int]]:
        if self._requests is not None:
            yield self._requests, 1
        if self._tokens is not None:
            yield self._tokens, num_tokens
