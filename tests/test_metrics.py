"""Metrics of speculation by model: names that are too many, or twice there, are taken together."""

from __future__ import annotations

import msgspec
import pytest

from specserve import metrics as metrics_module
from specserve.messages import AdapterDrafts, EngineStats
from specserve.metrics import Metrics


def stats(drafts: list[AdapterDrafts]) -> EngineStats:
    counts = {name: 1 for name in EngineStats.__struct_fields__[:15]}
    return msgspec.convert({**counts, "drafts_by_adapter": msgspec.to_builtins(drafts)}, EngineStats)


def values(metrics: Metrics, name: str) -> dict[str, float]:
    found = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name == f"specserve_speculation_{name}":
                found[sample.labels["model"]] = sample.value
    return found


def test_two_versions_of_a_name_are_one_label_and_the_base_has_its_own() -> None:
    metrics = Metrics()
    old, new = AdapterDrafts("a", 10, 20, 40, 10, 0.5), AdapterDrafts("a", 30, 100, 80, 70, 0.1)
    metrics.render(stats([old, new, AdapterDrafts(None, 4, 4, 0, 0, 0.3)]), "the-base")
    assert values(metrics, "drafted") == {"a": 120, "the-base": 0}
    assert values(metrics, "accepted") == {"a": 80, "the-base": 0}
    assert values(metrics, "tokens_per_verification") == {"a": 3.0, "the-base": 1.0}
    assert values(metrics, "mean_draft_length") == {"a": 3.0, "the-base": 0.0}
    assert values(metrics, "row_price") == pytest.approx({"a": 0.2, "the-base": 0.3})


def test_labels_are_capped_and_adapters_that_left_are_gone(monkeypatch) -> None:
    monkeypatch.setattr(metrics_module, "MAX_MODEL_LABELS", 3)
    metrics = Metrics()
    metrics.render(stats([AdapterDrafts(str(i), 1, 1, i, 0, 0.0) for i in range(6)]))
    assert values(metrics, "drafted") == {"0": 0, "1": 1, "2": 2, "other": 3 + 4 + 5}
    metrics.render(stats([AdapterDrafts("1", 1, 1, 7, 0, 0.0)]))
    assert values(metrics, "drafted") == {"1": 7}
