"""What asking costs: counts of requests and tokens, prices, and the most that may be spent.

Invariant: a `Budget` is never exceeded, since what a request may come to at most is set aside before it is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from .asks import Ask, Reply
from .errors import TeacherError
from .spec import Price


@dataclass(slots=True)
class Usage:
    """Of one teacher in one run. `cost` is of this run, `cached_cost` what the cached answers had cost before."""

    requests: int = 0  # that were answered now, attempts not counted
    cached: int = 0  # asks that the cache answered
    retries: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    cached_cost: float = 0.0

    def add(self, reply: Reply, price: Price | None) -> float:
        """Count a reply that was paid for now; returns what it cost."""
        cost = price.of(reply.prompt_tokens, reply.completion_tokens) if price is not None else 0.0
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.cost += cost
        return cost

    def add_cached(self, reply: Reply, price: Price | None) -> None:
        self.cached += 1
        if price is not None:
            self.cached_cost += price.of(reply.prompt_tokens, reply.completion_tokens)


class Budget:
    """At most `limit` of the price's currency, over all teachers that share it; None: no limit."""

    def __init__(self, limit: float | None = None):
        self.limit = limit
        self.spent = 0.0
        self._set_aside = 0.0
        self._freed = asyncio.Condition()

    def spend(self, cost: float) -> None:
        self.spent += cost

    @asynccontextmanager
    async def room_for(self, ask: Ask, price: Price | None) -> AsyncIterator[None]:
        """While a request runs, what it may come to at most is set aside.

        Waits for others that may have come to less. Raises `TeacherError` when it could exceed the limit.
        """
        if self.limit is None or price is None:
            yield
            return
        # Endpoints that give one sample at a time are sent the prompt with each.
        most = price.of(most_prompt_tokens(ask) * ask.n, ask.max_tokens * ask.n)
        async with self._freed:
            while self.spent + self._set_aside + most > self.limit:
                if not self._set_aside:
                    raise TeacherError(
                        f"the limit of cost is reached: {self.spent:.4f} of {self.limit:.4f} is spent, and the next "
                        f"request may cost {most:.4f}; what was paid for is kept, and the same command with a higher "
                        "limit goes on from there",
                        ends_run=True,
                    )
                await self._freed.wait()
            self._set_aside += most
        try:
            yield
        finally:
            self._set_aside -= most
            if self._set_aside < 1e-12:  # sums of differences
                self._set_aside = 0.0
            async with self._freed:
                self._freed.notify_all()


def most_prompt_tokens(ask: Ask) -> int:
    """More than a prompt can have: a byte is a token at most, and a template adds a few for each message."""
    texts = (str(message.get("content") or "") for message in ask.messages)
    return sum(len(text.encode()) + 16 for text in texts) + 64
