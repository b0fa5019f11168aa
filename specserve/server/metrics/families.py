"""Makes the families of one registry: their names' prefix, their buckets, and how many names a label may have.

Buckets are vLLM's, so that its dashboards fit, with finer ones below where answers here are quicker than its first one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005),  # finer
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.1, 0.2),  # finer
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
TOKEN_BUCKETS = tuple(mantissa * 10.0**exponent for exponent in range(6) for mantissa in (1, 2, 5))
LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Families:
    """Named `prefix` and an underscore, or a colon behind "vllm", as that writes its own."""

    def __init__(self, prefix: str):
        self.registry = CollectorRegistry()
        self.prefix = "vllm:" if prefix == "vllm" else f"{prefix}_"

    def counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(self.prefix + name, help_text, labels, registry=self.registry)

    def gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(self.prefix + name, help_text, labels, registry=self.registry)

    def histogram(self, name: str, help_text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(self.prefix + name, help_text, labels, buckets=buckets, registry=self.registry)


def observe_each(histogram: Histogram, value: float, num: int) -> None:
    """What `num` calls of `observe` do, which the library has no call for; there would be one for each token."""
    if num > 1:
        histogram._sum.inc(value * (num - 1))
        histogram._buckets[bisect_left(histogram._upper_bounds, value)].inc(num - 1)
    histogram.observe(value)


class CappedNames:
    """Values of a label: the first `most` names, the rest are "other"."""

    def __init__(self, most: int):
        self._most = most
        self._known: set[str] = set()

    def label(self, name: str) -> str:
        if name in self._known or len(self._known) < self._most:
            self._known.add(name)
            return name
        return "other"
