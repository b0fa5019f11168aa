"""Prometheus metrics of the server, and of the engine as of the moment of the scrape.

Each `Metrics` has a registry of its own, so that two servers in one process do not mix. Labels of adapters and of keys
are capped: after the first `MAX_MODEL_LABELS` and `MAX_KEY_LABELS` names the rest count as "other".
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..messages import AdapterDrafts, Delta, EngineStats

MAX_MODEL_LABELS = 200
MAX_KEY_LABELS = 200
# What the engine counts from its start.
CUMULATIVE = (
    *(f"engine_{name}".encode() for name in
      ("num_steps", "num_preemptions", "prompt_tokens", "generated_tokens", "cached_prompt_tokens", "draft_tokens",
       "accepted_draft_tokens", "num_kernel_builds", "cuda_graph_capture_seconds", "num_eager_parts",
       "num_undrafted_steps", "num_adapter_loads", "num_adapter_reads", "num_adapter_evictions", "num_adapters_asked",
       "num_adapter_waits", "adapter_wait_seconds", "num_grammars_compiled", "num_grammar_cache_hits",
       "grammar_compile_seconds", "grammar_mask_seconds", "drafted_by_source", "accepted_by_source")),
    b"speculation_drafted", b"speculation_accepted",
)  # fmt: skip
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Metrics:
    """All metric families; names follow Prometheus' conventions, seconds and tokens as units."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._labels: set[str] = set()
        self._key_labels: set[str] = set()
        self.requests = self._counter("http_requests", "HTTP requests by route and status", "route", "status")
        self.in_flight = Gauge("specserve_http_requests_in_flight", "HTTP requests running", registry=self.registry)
        self.key_requests = self._counter("key_requests", "requests by name of the key and status", "key", "status")
        self.key_tokens = self._counter(
            "key_tokens", "tokens by name of the key, as its limits count them: of prompts and generated", "key"
        )
        self.ttft = self._histogram("time_to_first_token_seconds", "from admission to the first token")
        self.inter_token = self._histogram("inter_token_latency_seconds", "mean gap of a delta's tokens")
        self.e2e = self._histogram("request_seconds", "from admission to the last token")
        self.prompt_tokens = self._counter("prompt_tokens", "prompt tokens of finished sequences", "model")
        self.generated_tokens = self._counter("generated_tokens", "tokens generated", "model")
        self.draft_tokens = self._counter("draft_tokens", "draft tokens verified", "model")
        self.accepted_draft_tokens = self._counter("accepted_draft_tokens", "draft tokens kept", "model")
        self.adapter_load = Histogram(
            "specserve_adapter_load_seconds",
            "from a load's begin to its end, its wait for room included",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.finished = self._counter("finished_sequences", "sequences by the reason they ended", "reason")
        self._engine: dict[str, Gauge] = {}
        self._sources = {
            kind: Gauge(f"specserve_engine_{kind}", help_text, ["source"], registry=self.registry)
            for kind, help_text in (
                ("drafted_by_source", "draft tokens verified since the engine started"),
                ("accepted_by_source", "draft tokens kept since the engine started"),
            )
        }

        self._by_model = {
            name: Gauge(f"specserve_speculation_{name}", help_text, ["model"], registry=self.registry)
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
        return _capped(name, self._labels, MAX_MODEL_LABELS)

    def key_label(self, name: str) -> str:
        return _capped(name, self._key_labels, MAX_KEY_LABELS)

    def watch(self, model: str, num_sequences: int) -> Watch:
        return Watch(self, self.model_label(model), num_sequences)

    def render(self, stats: EngineStats | None, base_model: str = "base") -> bytes:
        """The text format of everything; `stats` is None while the engine is down, `base_model` names the base."""
        self._gauge("engine_up", "1 while the engine serves").set(stats is not None)
        if stats is not None:
            for name in stats.__struct_fields__:
                value = getattr(stats, name)
                if isinstance(value, int | float):
                    self._gauge(f"engine_{name}", f"{name.replace('_', ' ')} of the engine").set(value)
            self._gauge("engine_integrity_ok", "1 while block accounting is consistent").set(not stats.integrity_error)
            used = 1 - stats.num_free_kv_blocks / stats.num_kv_blocks
            self._gauge("engine_kv_cache_usage_ratio", "share of KV blocks in use").set(used)
            for kind, gauge in self._sources.items():
                for source, value in getattr(stats, kind).items():
                    gauge.labels(source).set(value)
            self._set_by_model(stats.drafts_by_adapter, base_model)
        return _typed(generate_latest(self.registry))

    def _set_by_model(self, drafts: list[AdapterDrafts], base_model: str) -> None:
        """Adapters of one label, the capped ones or two versions of one name, are taken together."""
        by_label: dict[str, list[AdapterDrafts]] = {}
        for adapter in drafts:
            by_label.setdefault(self.model_label(adapter.name or base_model), []).append(adapter)
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

    def _gauge(self, name: str, help_text: str) -> Gauge:
        if name not in self._engine:
            self._engine[name] = Gauge(f"specserve_{name}", help_text, registry=self.registry)
        return self._engine[name]

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"specserve_{name}", help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(f"specserve_{name}", help_text, ["model"], buckets=_LATENCY_BUCKETS, registry=self.registry)


def _capped(name: str, known: set[str], most: int) -> str:
    if name in known or len(known) < most:
        known.add(name)
        return name
    return "other"


def _typed(text: bytes) -> bytes:
    """The text with what only grows typed as counters. The client library gives counters of its own the ending _total,
    which would rename these."""
    for name in CUMULATIVE:
        text = text.replace(b"# TYPE specserve_%s gauge\n" % name, b"# TYPE specserve_%s counter\n" % name)
    return text


class Watch:
    """Latencies and token counts of one request."""

    def __init__(self, metrics: Metrics, model: str, num_sequences: int):
        self._metrics = metrics
        self._model = model
        self._start = time.monotonic()
        self._last: list[float | None] = [None] * num_sequences
        self._inter_token = metrics.inter_token.labels(model)  # looked up once: there is a delta for each token
        self._generated_tokens = metrics.generated_tokens.labels(model)

    def delta(self, idx: int, delta: Delta) -> None:
        now, metrics, num = time.monotonic(), self._metrics, len(delta.token_ids)
        last = self._last[idx]
        if last is None:
            metrics.ttft.labels(self._model).observe(now - self._start)
        elif num:
            # Tokens of one verification arrive together; each is charged its share of the gap.
            for _ in range(num):
                self._inter_token.observe((now - last) / num)
        self._last[idx] = now
        self._generated_tokens.inc(num)
        if delta.finish_reason is not None:
            metrics.finished.labels(delta.finish_reason).inc()
        if delta.usage is not None:
            metrics.prompt_tokens.labels(self._model).inc(delta.usage.prompt_tokens)
            metrics.draft_tokens.labels(self._model).inc(delta.usage.draft_tokens)
            metrics.accepted_draft_tokens.labels(self._model).inc(delta.usage.accepted_draft_tokens)

    def done(self) -> None:
        self._metrics.e2e.labels(self._model).observe(time.monotonic() - self._start)
