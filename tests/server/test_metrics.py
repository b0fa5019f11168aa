"""Metrics of speculation by model: names that are too many, or twice there, are taken together."""

from __future__ import annotations

import asyncio
import logging
import re
from types import SimpleNamespace

import msgspec
import pytest

from specserve.messages import Delta, Usage
from specserve.server.activity_log import log_request, summarize, summary
from specserve.server.job_counts import JobCounts
from specserve.server.metrics import metrics as metrics_module
from specserve.server.metrics.families import Families, observe_each
from specserve.server.metrics.metrics import Metrics
from specserve.stats_messages import AdapterDrafts, EngineStats


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
    metrics = Metrics("the-base")
    old, new = AdapterDrafts("a", 10, 20, 40, 10, 0.5), AdapterDrafts("a", 30, 100, 80, 70, 0.1)
    metrics.render(stats([old, new, AdapterDrafts(None, 4, 4, 0, 0, 0.3)]))
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


def test_what_only_grows_is_typed_as_a_counter_under_its_old_name() -> None:
    text = Metrics().render(stats([AdapterDrafts("a", 1, 2, 3, 4, 0.5)])).decode()
    for name in ("engine_generated_tokens", "engine_num_steps", "engine_drafted_by_source", "speculation_accepted"):
        assert f"# TYPE specserve_{name} counter\n" in text
    assert "\nspecserve_engine_generated_tokens 1.0\n" in text
    assert "# TYPE specserve_num_requests_running gauge\n" in text
    for name in metrics_module.CUMULATIVE:
        assert f"# TYPE specserve_{name.decode()} counter\n" in text, name


def test_summary_says_what_was_done_between_two_snapshots(caplog: pytest.LogCaptureFixture) -> None:
    start = msgspec.structs.replace(stats([]), num_running=0, num_waiting=0, num_kv_blocks=8, num_free_kv_blocks=8)
    busy = msgspec.structs.replace(
        start, num_running=2, prompt_tokens=51, cached_prompt_tokens=21, generated_tokens=31, draft_tokens=41,
        accepted_draft_tokens=11, num_free_kv_blocks=6,
    )  # fmt: skip
    line = summary(start, busy, 10.0)
    assert line == (
        "2 running, 0 waiting; 5.0 prompt tokens/s (20 of 50 cached), 3.0 generated/s; 25% of 40 drafts kept; "
        "KV cache 25.0% in use"
    )
    assert summary(start, start, 10.0) is None and summary(busy, start, 10.0) is None  # idle; restarted

    async def watch() -> None:
        snapshots, all_seen = [start, busy, None, start, start], asyncio.Event()

        async def next_stats() -> EngineStats | None:
            if len(snapshots) == 1:
                all_seen.set()
                await asyncio.Event().wait()
            return snapshots.pop(0)

        task = asyncio.create_task(summarize(next_stats, every_s=0.01))
        await asyncio.wait_for(all_seen.wait(), 60)
        task.cancel()
        await asyncio.wait([task])

    with caplog.at_level(logging.INFO):
        asyncio.run(watch())
    assert [record.message.split(";")[0] for record in caplog.records] == ["2 running, 0 waiting"]


def test_a_line_says_how_a_request_ended(caplog: pytest.LogCaptureFixture) -> None:
    job = SimpleNamespace(id="cmpl-1", generates=True, prompt_lens=[7, 7])
    usages = [Usage(7, 3, 4, 2, 2, accepted, 0, 0) for accepted in (1, 2)]
    counts = JobCounts(2)
    with caplog.at_level(logging.INFO):
        log_request(job, "tiny", None, counts, None)
        for reason, usage in zip(("stop", "length"), usages, strict=True):
            counts.delta(Delta("", [1]))
            counts.delta(Delta("", [2, 3], finish_reason=reason, usage=usage))
        log_request(job, "tiny", "me", counts, None)
        log_request(job, "tiny", "me", counts, "timeout")
    first, whole, failed = (record.message for record in caplog.records)
    assert first.startswith("cmpl-1: 'tiny': given up by the client, 14 prompt tokens (0 cached), 0 generated (0 from")
    assert "first after none" in first and re.search(r"first after \d+\.\d{3} s", whole)
    assert "'tiny' for 'me': length+stop, 14 prompt tokens (8 cached), 6 generated (3 from drafts)" in whole
    assert "'me': timeout, " in failed


def test_values_that_are_observed_together_count_as_one_by_one() -> None:
    families = Families("specserve")
    each, together = (families.histogram(name, "seconds", (0.1, 0.2, 0.4)) for name in ("each", "together"))
    for value, num in ((0.05, 3), (0.1, 2), (0.3, 1), (0.3, 4), (9.0, 2)):
        for _ in range(num):
            each.observe(value)
        observe_each(together, value, num)
    found = [[(sample.name.rpartition("_")[2], sample.labels, round(sample.value, 9)) for sample in family.samples
              if not sample.name.endswith("created")] for family in families.registry.collect()]  # fmt: skip
    assert found[0] == found[1] and ("count", {}, 12.0) in found[0]
