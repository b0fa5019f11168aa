"""How many replicas the load asks for, by what replicas say of their queues; when to follow is Ray Serve's to decide.

A replica's worth of seats for the sequences that run, and one more replica for each `replica_waiting_tokens` that wait.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def replicas_wanted(used_seats: float, waiting_tokens: float, tokens_a_replica: float) -> int:
    """`used_seats` in replicas: 1.5 are all seats of one, and half of another's."""
    return max(1, math.ceil(used_seats + waiting_tokens / tokens_a_replica - 1e-9))


class QueuedTokensPolicy:
    """A Ray Serve autoscaling policy."""

    def __init__(self, tokens_a_replica: int):
        self._tokens_a_replica = tokens_a_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        if "used_seats" not in metrics:
            return context.target_num_replicas, {}  # nobody has said anything yet
        used, waiting = (sum(metrics.get(name, {}).values()) for name in ("used_seats", "waiting_tokens"))
        return replicas_wanted(used, waiting, self._tokens_a_replica), {}
