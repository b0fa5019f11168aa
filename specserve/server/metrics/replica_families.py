"""What /metrics says of each of several replicas, by their names; nothing where there is one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ...stats_messages import EngineStats
from ..engine_client.serving_engine import ReplicaState

LABELS = ["replica"]
GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("sequences that run on a replica", lambda stats: stats.num_running),
    "num_requests_waiting": ("sequences that wait on a replica", lambda stats: stats.num_waiting),
    "kv_cache_usage_perc": (
        "share of a replica's KV blocks in use, from 0 to 1",
        lambda stats: 1 - stats.num_free_kv_blocks / stats.num_kv_blocks,
    ),
}


class ReplicaFamilies:
    """A collector; `replicas` is set before each scrape."""

    def __init__(self, prefix: str):
        self.replicas: Mapping[str, ReplicaState] = {}
        self._prefix = f"{prefix}replica_"

    def collect(self) -> Iterator[Metric]:
        if not self.replicas:
            return
        owed = GaugeMetricFamily(f"{self._prefix}owed_tokens", "tokens that a replica was sent for", labels=LABELS)
        held = GaugeMetricFamily(f"{self._prefix}num_adapters", "adapters that requests find there", labels=LABELS)
        for name, state in self.replicas.items():
            owed.add_metric([name], state.owed_tokens)
            held.add_metric([name], state.num_adapters)
        yield owed
        yield held
        known = {name: state.stats for name, state in self.replicas.items() if state.stats is not None}
        for metric, (help_text, value) in GAUGES.items():
            family = GaugeMetricFamily(self._prefix + metric, help_text, labels=LABELS)
            for name, stats in known.items():
                family.add_metric([name], value(stats))
            yield family
        generated = CounterMetricFamily(
            f"{self._prefix}generated_tokens", "tokens that a replica generated", labels=LABELS
        )
        for name, stats in known.items():
            generated.add_metric([name], stats.generated_tokens)
        yield generated

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not collect."""
        return []
