"""What a request is expected to cost a replica: tokens, those of its prompt at a quarter, as the scheduler charges."""

from __future__ import annotations

import math
from typing import Any

from ..messages import Delta, GenerateRequest
from ..pooling_messages import PoolRequest
from .policy import PREFIX_WEIGHT

FIRST_GUESS = 128.0  # tokens of an answer for an adapter that none has had yet
LEARNING = 0.1
MAX_KNOWN = 1 << 16  # adapters


class ExpectedCost:
    """Learns how long the answers of each adapter are."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}  # used last last

    def of(self, request: GenerateRequest | PoolRequest) -> int:
        """Whole tokens, so that what is owed adds up to nothing again."""
        expected = min(self._means.get(request.adapter_hash or "", FIRST_GUESS), request.sampling.max_tokens)
        return math.ceil(PREFIX_WEIGHT * len(request.prompt_token_ids) + expected)

    def learn(self, request: GenerateRequest | PoolRequest, answer: Any) -> None:
        """Of an answer's last part."""
        if not isinstance(answer, Delta) or answer.usage is None:
            return
        key, num = request.adapter_hash or "", float(answer.usage.completion_tokens)
        mean = self._means.pop(key, num)
        self._means[key] = mean + LEARNING * (num - mean)
        if len(self._means) > MAX_KNOWN:
            del self._means[next(iter(self._means))]
