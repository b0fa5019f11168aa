"""What asking costs: counts of requests and tokens, prices, and the most that may be spent.

Invariant: a `Budget` is never exceeded, since what an attempt may come to at most is set aside before it is sent, and
counts as spent where it brings no answer and may have been charged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from .asks import Ask, Reply
from .errors import TeacherError
from .spec import Price

LIMITS = ("max_tokens", "max_completion_tokens")  # fields of the longest answer


@dataclass(slots=True)
class Usage:
    """Of one teacher in one run. `cost` is of this run, `cached_cost` what the cached answers had cost before.

    `lost` attempts may have been charged and brought no answer: a timeout, a cut, nonsense. `lost_cost` is part of
    `cost`: what the endpoint says, or the most that they can have come to.
    """

    requests: int = 0  # that were answered now, attempts not counted
    cached: int = 0  # asks that the cache answered
    retries: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    cached_cost: float = 0.0
    lost: int = 0
    lost_cost: float = 0.0

    def add(self, reply: Reply, price: Price | None, most: float) -> float:
        """Count a reply that was paid for now; returns what it cost, `most` where the endpoint does not say."""
        return self._add((reply.prompt_tokens, reply.completion_tokens) if reply.is_counted else None, price, most)

    def add_lost(self, tokens: tuple[int, int] | None, price: Price | None, most: float) -> float:
        """The same of an attempt that brought no answer."""
        cost = self._add(tokens, price, most)
        self.lost += 1
        self.lost_cost += cost
        return cost

    def _add(self, tokens: tuple[int, int] | None, price: Price | None, most: float) -> float:
        cost = most if tokens is None else price.of(*tokens) if price is not None else 0.0
        if tokens is not None:
            self.prompt_tokens += tokens[0]
            self.completion_tokens += tokens[1]
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
    async def room_for(self, most: float) -> AsyncIterator[None]:
        """While an attempt runs, the `most` that it may come to is set aside.

        Waits for others that may have come to less. Raises `TeacherError` when it could exceed the limit.
        """
        if self.limit is None or not most:
            yield
            return
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


def most_tokens(ask: Ask, n: int, fields: Mapping[str, Any]) -> tuple[int, int]:
    """More than the prompt and the answers can have, of `n` samples; `fields` go into the body and may ask for more.

    A byte is a token at most, and a template adds a few for each message. Endpoints that give one sample at a time are
    sent the prompt with each.
    """
    given = [value for name in LIMITS if isinstance(value := fields.get(name), int)]
    n = max([n, *(value for value in (fields.get("n"),) if isinstance(value, int))])
    texts = [str(message.get("content") or "") for message in ask.messages]
    schema = msgspec.json.encode(ask.schema) if ask.schema is not None else b""
    prompt_tokens = sum(len(text.encode()) + 16 for text in texts) + 64 + len(schema)
    return prompt_tokens * n, max([ask.max_tokens, *given]) * n
