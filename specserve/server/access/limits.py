"""What one key may use: requests and tokens a minute, and requests at a time.

Token buckets over a clock that is given: a minute's worth at most, refilled evenly. Tokens are taken when a request is
tokenised, as many as it may come to, and what it did not use is given back when it ends, however it ends; what it used
beyond that is a debt that the next ones wait for. One thread owns all of it, so that looking and taking are one act.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from ...errors import RateLimitedError
from ...token_bucket import MINUTE_S, Bucket, Clock

BUSY_RETRY_S = 1.0  # when one of the running requests may have ended


class Limits(msgspec.Struct, frozen=True):
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


class Reservation:
    """Tokens that a request took before it ran."""

    def __init__(self, bucket: Bucket | None, num_tokens: int):
        self._bucket = bucket
        self._num_tokens = num_tokens

    def settle(self, num_used: int) -> None:
        """Charge what was used instead of what was reserved; once."""
        if self._bucket is not None:
            self._bucket.take(num_used - self._num_tokens)
            self._bucket = None


class Allowance:
    """What is left of one key's limits; `name` is the key's, for messages."""

    def __init__(self, name: str, limits: Limits, clock: Clock):
        self._name = name
        self._clock = clock
        self._limits = Limits()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.num_running = 0
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """New limits, with what has been used under the old ones."""
        self._limits = limits
        self._requests = self._resized(self._requests, limits.requests_per_minute)
        self._tokens = self._resized(self._tokens, limits.tokens_per_minute)

    def _resized(self, bucket: Bucket | None, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        if bucket is None:
            return Bucket(per_minute, self._clock)
        bucket.resize(per_minute)
        return bucket

    @contextmanager
    def running(self) -> Iterator[None]:
        """One request, from before its body is read until it is answered. Raises `RateLimitedError`."""
        limit = self._limits.max_concurrent
        if limit is not None and self.num_running >= limit:
            raise RateLimitedError(
                f"key {self._name!r}: {self.num_running} requests are running and max_concurrent is {limit}; retry "
                "when one has ended",
                limit="concurrent",
                retry_after_s=BUSY_RETRY_S,
            )
        if self._requests is not None:
            self._check(self._requests, 1, "requests")
            self._requests.take(1)
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    def check_tokens(self) -> None:
        """Raises `RateLimitedError` where none are left, for those who are about to read a request for tokens."""
        if self._tokens is not None:
            self._check(self._tokens, 1, "tokens")

    def reserve(self, num_tokens: int) -> Reservation:
        """Take `num_tokens`, at most a minute's worth. Raises `RateLimitedError` when they are not there."""
        if self._tokens is None:
            return Reservation(None, 0)
        num_tokens = min(num_tokens, self._tokens.per_minute)
        self._check(self._tokens, num_tokens, "tokens")
        self._tokens.take(num_tokens)
        return Reservation(self._tokens, num_tokens)

    def _check(self, bucket: Bucket, amount: int, what: str) -> None:
        if wait_s := bucket.wait_s(amount):
            raise RateLimitedError(
                f"key {self._name!r}: {amount} {what} are needed, {max(0, math.floor(bucket.level))} are left of "
                f"{what}_per_minute {bucket.per_minute}; retry in {math.ceil(wait_s)} s",
                limit=what,
                retry_after_s=wait_s,
            )

    def headers(self) -> dict[str, str]:
        """OpenAI's: the limits, what is left, and when all of it is back."""
        found = {}
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{what}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level)))
                found[f"x-ratelimit-reset-{what}"] = duration(bucket.wait_s(bucket.per_minute))
        return found


def duration(seconds: float) -> str:
    """As OpenAI writes it: 6m0s, 1.2s, 20ms."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < MINUTE_S:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"
