"""Prometheus metrics of the server, and of the engine as of the moment of the scrape.

Each `Metrics` has a registry of its own, so that two servers in one process do not mix. Labels of adapters and of keys
are capped: after the first `MAX_MODEL_LABELS` and `MAX_KEY_LABELS` names the rest count as "other".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from prometheus_client import Gauge, generate_latest

from ...messages import EngineInfo
from ...stats_messages import AdapterDrafts, EngineStats
from ..engine_client.serving_engine import ReplicaState
from .engine_families import EngineFamilies
from .families import LOAD_BUCKETS, CappedNames, Families
from .replica_families import ReplicaFamilies
from .request_watch import RequestFamilies, Watch

MAX_MODEL_LABELS = 200
MAX_KEY_LABELS = 200
# Numbers of the engine that have a name of vLLM's.
NAMED_OTHERWISE = {
    *("num_running", "num_waiting", "num_preemptions", "prompt_tokens", "cached_prompt_tokens", "draft_tokens"),
    "accepted_draft_tokens",
}
# What the engine counts from its start.
CUMULATIVE = (
    *(f"engine_{name}".encode() for name in
      ("num_steps", "step_seconds", "no_draft_tokens", "generated_tokens", "num_kernel_builds",
       "cuda_graph_capture_seconds", "num_eager_parts",
       "num_undrafted_steps", "num_adapter_loads", "num_adapter_reads", "num_adapter_evictions", "num_adapters_asked",
       "num_adapter_waits", "adapter_wait_seconds", "num_grammars_compiled", "num_grammar_cache_hits",
       "grammar_compile_seconds", "grammar_mask_seconds", "drafted_by_source", "accepted_by_source")),
    b"speculation_drafted", b"speculation_accepted",
)  # fmt: skip


class Metrics:
    """All metric families; names follow Prometheus' conventions, seconds and tokens as units.

    `base_name` is the base model's; `prefix` is --metrics-prefix.
    """

    def __init__(self, base_name: str = "base", prefix: str = "specserve", has_prefix_caching: bool = True):
        self._families = families = Families(prefix)
        self.registry, self._base_name = families.registry, base_name
        self._models, self._keys = CappedNames(MAX_MODEL_LABELS), CappedNames(MAX_KEY_LABELS)
        self.requests = families.counter("http_requests", "HTTP requests by route and status", "route", "status")
        self.in_flight = families.gauge("http_requests_in_flight", "HTTP requests running")
        self.key_requests = families.counter("key_requests", "requests by name of the key and status", "key", "status")
        self.key_tokens = families.counter(
            "key_tokens", "tokens by name of the key, as its limits count them: of prompts and generated", "key"
        )
        self.routed_requests = families.counter(
            "routed_requests", "requests with model auto by the adapter or base model that they got", "model"
        )
        self._requests = RequestFamilies(families, base_name)
        self.adapter_load = families.histogram(
            "adapter_load_seconds", "from a load's begin to its end, its wait for room included", LOAD_BUCKETS
        )
        self._of_engine = EngineFamilies(families.prefix, base_name, has_prefix_caching)
        self._of_replicas = ReplicaFamilies(families.prefix)
        for collector in (self._of_engine, self._of_replicas):
            self.registry.register(collector)  # type: ignore[arg-type]
        self._up = families.gauge("engine_up", "1 while the engine serves")
        self._engine: dict[str, Gauge] = {}
        self._sources = {
            kind: families.gauge(f"engine_{kind}", help_text, "source")
            for kind, help_text in (
                ("drafted_by_source", "draft tokens verified since the engine started"),
                ("accepted_by_source", "draft tokens kept since the engine started"),
            )
        }
        self._by_model = {
            name: families.gauge(f"speculation_{name}", help_text, "model")
            for name, help_text in (
                ("drafted", "draft tokens verified since the adapter was loaded"),
                ("accepted", "draft tokens kept since the adapter was loaded"),
                (
                    "tokens_per_verification",
                    "tokens that a forward of a sequence gave, the one without a draft included",
                ),
                ("mean_draft_length", "drafts admitted to a forward of a sequence, none included"),
                ("row_price", "tokens that one more draft had to be expected to bring, running mean"),
            )
        }

    def model_label(self, name: str) -> str:
        return self._models.label(name)

    def key_label(self, name: str) -> str:
        return self._keys.label(name)

    def watch(self, model: str, prompt_lens: Sequence[int], is_timed: bool = True) -> Watch:
        """Of a request for `model`, whose sequences have prompts of these lengths."""
        return Watch(self._requests, self.model_label(model), prompt_lens, is_timed)

    def render(
        self,
        stats: EngineStats | None,
        info: EngineInfo | None = None,
        loading: Mapping[str, int] = MappingProxyType({}),
        replicas: Mapping[str, ReplicaState] = MappingProxyType({}),
    ) -> bytes:
        """The text format of everything; `stats` is None while the engine is down, `loading` are
        adapters on their way, and how many requests wait for each."""
        self._of_replicas.replicas = replicas
        of_engine = self._of_engine
        of_engine.stats, of_engine.info, of_engine.loading = stats, info, loading
        self._up.set(stats is not None)
        if stats is not None:
            for name in stats.__struct_fields__:
                value = getattr(stats, name)
                if isinstance(value, int | float) and name not in NAMED_OTHERWISE:
                    self._gauge(f"engine_{name}", f"{name.replace('_', ' ')} of the engine").set(value)
            self._gauge("engine_integrity_ok", "1 while block accounting is consistent").set(not stats.integrity_error)
            for kind, gauge in self._sources.items():
                gauge.clear()
                for source, value in getattr(stats, kind).items():
                    gauge.labels(source).set(value)
            self._set_by_model(stats.drafts_by_adapter)
        else:
            self._forget_engine()
        return self._typed(generate_latest(self.registry))

    def _set_by_model(self, drafts: list[AdapterDrafts]) -> None:
        """Adapters of one label, the capped ones or two versions of one name, are taken together."""
        by_label: dict[str, list[AdapterDrafts]] = {}
        for adapter in drafts:
            by_label.setdefault(self.model_label(adapter.name or self._base_name), []).append(adapter)
        for gauge in self._by_model.values():
            gauge.clear()  # of adapters that have left
        for label, members in by_label.items():
            num = max(1, sum(member.num_verifications for member in members))
            drafted = sum(member.draft_tokens for member in members)
            values = {
                "drafted": drafted,
                "accepted": sum(member.accepted_draft_tokens for member in members),
                "tokens_per_verification": sum(member.generated_tokens for member in members) / num,
                "mean_draft_length": drafted / num,
                "row_price": sum(member.row_price * member.num_verifications for member in members) / num,
            }
            for name, value in values.items():
                self._by_model[name].labels(label).set(value)

    def _forget_engine(self) -> None:
        """What the engine said last is no state of one that is gone; nor is it a sum that counters go on from."""
        for gauge in self._engine.values():
            self.registry.unregister(gauge)
        self._engine.clear()
        for labelled in (*self._sources.values(), *self._by_model.values()):
            labelled.clear()

    def _gauge(self, name: str, help_text: str) -> Gauge:
        if name not in self._engine:
            self._engine[name] = self._families.gauge(name, help_text)
        return self._engine[name]

    def _typed(self, text: bytes) -> bytes:
        """The text with what only grows typed as counters. The client library gives counters of its own the ending
        _total, which would rename these."""
        prefix = self._families.prefix.encode()
        for name in CUMULATIVE:
            text = text.replace(b"# TYPE %s%s gauge\n" % (prefix, name), b"# TYPE %s%s counter\n" % (prefix, name))
        return text
