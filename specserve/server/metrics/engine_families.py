"""What /metrics says of the engine as of the moment of the scrape under vLLM's names, so that routers and dashboards
that read those fit: the endpoint pickers of Kubernetes' inference gateways, vLLM's own load generator and dashboards.

Nothing is said while no engine serves. Counters are the engine's, and begin again with each process.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ...messages import EngineInfo
from ...stats_messages import EngineStats
from .request_watch import LABELS

MAX_LISTED = 200  # adapters in a label


class EngineFamilies:
    """A collector; `stats`, `info` and `loading` are set before each scrape."""

    def __init__(self, prefix: str, base_name: str, has_prefix_caching: bool):
        self.stats: EngineStats | None = None
        self.info: EngineInfo | None = None
        self.loading: Mapping[str, int] = {}  # names of adapters on their way, and how many requests wait for each
        self._prefix, self._base_name, self._has_prefix_caching = prefix, base_name, has_prefix_caching

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        if stats is None:
            return
        used = 1 - stats.num_free_kv_blocks / stats.num_kv_blocks
        yield self._gauge("num_requests_running", "sequences that run", stats.num_running)
        num_waiting = stats.num_waiting + sum(self.loading.values())  # vLLM's queue has those without a slot, too
        yield self._gauge("num_requests_waiting", "sequences that wait to run, or for their adapter", num_waiting)
        yield self._gauge("kv_cache_usage_perc", "share of KV blocks in use, from 0 to 1", used)
        num_asked = stats.prompt_tokens + stats.cached_prompt_tokens
        yield self._counter("prefix_cache_queries", "prompt tokens that were looked up", num_asked)
        yield self._counter("prefix_cache_hits", "of those, tokens that were cached", stats.cached_prompt_tokens)
        yield self._counter("num_preemptions", "sequences that had to give their blocks back", stats.num_preemptions)
        num_drafts = stats.drafted_per_pos[0] if stats.drafted_per_pos else 0
        yield self._counter("spec_decode_num_drafts", "drafts verified, of a token or more", num_drafts)
        yield self._counter("spec_decode_num_draft_tokens", "draft tokens verified", stats.draft_tokens)
        yield self._counter("spec_decode_num_accepted_tokens", "draft tokens kept", stats.accepted_draft_tokens)
        per_pos = CounterMetricFamily(
            f"{self._prefix}spec_decode_num_accepted_tokens_per_pos",
            "draft tokens kept, by position in the draft",
            labels=[*LABELS, "position"],
        )
        for position, num in enumerate(stats.accepted_per_pos):
            per_pos.add_metric([self._base_name, "0", str(position)], num)
        yield per_pos
        if self.info is not None:
            yield from self._of_info(self.info, stats)

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not collect."""
        return []

    def _of_info(self, info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
        cache = GaugeMetricFamily(
            f"{self._prefix}cache_config_info",
            "the KV cache, in labels; num_gpu_blocks: wherever it lies",
            labels=["block_size", "num_gpu_blocks", "enable_prefix_caching", "engine"],
        )
        cache.add_metric([str(info.block_size), str(info.num_kv_blocks), str(self._has_prefix_caching), "0"], 1)
        yield cache
        adapters = [entry for entry in stats.requests_by_adapter if entry.name is not None]
        running = {entry.name for entry in adapters if entry.num_running}
        waiting = {entry.name for entry in adapters if entry.num_waiting} | set(self.loading)
        lora = GaugeMetricFamily(
            f"{self._prefix}lora_requests_info",
            "adapters whose requests run or wait, in labels; the value is the time",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        lora.add_metric([str(info.max_adapters), _listed(running), _listed(waiting)], time.time())
        yield lora

    def _gauge(self, name: str, help_text: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, help_text, labels=LABELS)
        family.add_metric([self._base_name, "0"], value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> Metric:
        family = CounterMetricFamily(self._prefix + name, help_text, labels=LABELS)
        family.add_metric([self._base_name, "0"], value)
        return family


def _listed(names: Collection[str | None]) -> str:
    return ",".join(sorted(name for name in names if name is not None)[:MAX_LISTED])
