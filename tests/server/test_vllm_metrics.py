"""Metrics under vLLM's names: what its dashboards, its load generator and routers read has their types and labels."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from specserve.messages import (
    Delta,
    EngineInfo,
    Usage,
)
from specserve.server.metrics.metrics import Metrics
from specserve.stats_messages import AdapterRequests, EngineStats

INFO = EngineInfo("tiny", "tiny", 320, 128, 8, 16, "cpu", "fp32", 1, [2], "avx2", 64, 256)
STATS = msgspec.structs.replace(
    EngineStats(*range(14)), num_running=3, num_waiting=2, num_kv_blocks=8, num_free_kv_blocks=6, prompt_tokens=70,
    cached_prompt_tokens=30, draft_tokens=50, accepted_draft_tokens=40, drafted_per_pos=[20, 20, 10],
    accepted_per_pos=[18, 15, 7], num_preemptions=1,
    requests_by_adapter=[AdapterRequests("b", 2, 0), AdapterRequests("a", 1, 2), AdapterRequests(None, 0, 1)],
)  # fmt: skip
BASE = {"model_name", "engine"}
# As vLLM 0.32 has them: type, labels, a bucket that histograms must have.
EXPECTED = {
    "num_requests_running": ("gauge", BASE, None),
    "num_requests_waiting": ("gauge", BASE, None),
    "kv_cache_usage_perc": ("gauge", BASE, None),
    "prefix_cache_queries": ("counter", BASE, None),
    "prefix_cache_hits": ("counter", BASE, None),
    "num_preemptions": ("counter", BASE, None),
    "prompt_tokens": ("counter", BASE, None),
    "generation_tokens": ("counter", BASE, None),
    "request_success": ("counter", BASE | {"finished_reason"}, None),
    "spec_decode_num_drafts": ("counter", BASE, None),
    "spec_decode_num_draft_tokens": ("counter", BASE, None),
    "spec_decode_num_accepted_tokens": ("counter", BASE, None),
    "spec_decode_num_accepted_tokens_per_pos": ("counter", BASE | {"position"}, None),
    "time_to_first_token_seconds": ("histogram", BASE, "2560.0"),
    "inter_token_latency_seconds": ("histogram", BASE, "0.01"),
    "request_time_per_output_token_seconds": ("histogram", BASE, "0.025"),
    "e2e_request_latency_seconds": ("histogram", BASE, "0.3"),
    "request_queue_time_seconds": ("histogram", BASE, "7680.0"),
    "request_prompt_tokens": ("histogram", BASE, "500.0"),
    "request_generation_tokens": ("histogram", BASE, "100.0"),
    "lora_requests_info": ("gauge", {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}, None),
    "cache_config_info": ("gauge", {"block_size", "num_gpu_blocks", "engine"}, None),
}


def scraped(metrics: Metrics, stats: EngineStats | None = STATS, **others):
    text = metrics.render(stats, INFO, **others).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families, name: str, sample: str = "", **labels: str) -> float:
    """Of the one sample with these labels, among others."""
    (found,) = [
        each.value
        for each in families[name].samples
        if each.name == name + sample and labels.items() <= each.labels.items()
    ]
    return found


@pytest.fixture
def metrics():
    metrics = Metrics("the-base", "vllm")
    watch = metrics.watch("alpha", [7])
    usage = Usage(7, 3, 0, 2, 2, 1, 0, 0, queue_s=0.5)
    watch.delta(0, Delta("a", [1]))
    watch.delta(0, Delta("a", [2, 3], finish_reason="length", usage=usage))
    watch.done()
    return metrics


def test_names_types_labels_and_buckets_are_vllms(metrics):
    families = scraped(metrics)
    for name, (kind, labels, bucket) in EXPECTED.items():
        family = families[f"vllm:{name}"]
        assert family.type == kind, name
        samples = [each for each in family.samples if not each.name.endswith("_created")]
        assert samples and all(labels <= each.labels.keys() for each in samples), name
        if "model_name" in labels:
            assert {(each.labels["model_name"], each.labels["engine"]) for each in samples} == {("the-base", "0")}
        if bucket is not None:
            assert bucket in {each.labels.get("le") for each in samples}, name
    assert all(name.startswith("vllm:") for name in families)


def test_values_are_the_engines(metrics):
    families = scraped(metrics)
    assert value(families, "vllm:num_requests_running") == 3 and value(families, "vllm:num_requests_waiting") == 2
    assert value(families, "vllm:kv_cache_usage_perc") == 0.25
    assert value(families, "vllm:prefix_cache_queries", "_total") == 100
    assert value(families, "vllm:prefix_cache_hits", "_total") == 30
    drafts = {name: value(families, f"vllm:spec_decode_num_{name}", "_total") for name in ("drafts", "draft_tokens")}
    assert drafts == {"drafts": 20, "draft_tokens": 50}
    per_pos = "vllm:spec_decode_num_accepted_tokens_per_pos"
    assert [value(families, per_pos, "_total", position=str(idx)) for idx in range(3)] == [18, 15, 7]
    assert sum([18, 15, 7]) == value(families, "vllm:spec_decode_num_accepted_tokens", "_total")
    assert families["vllm:cache_config_info"].samples[0].labels["num_gpu_blocks"] == "8"


def test_adapters_that_run_and_wait_are_listed_for_routers(metrics):
    families = scraped(metrics, loading={"c": 3})
    (sample,) = families["vllm:lora_requests_info"].samples
    assert sample.labels == {"max_lora": "256", "running_lora_adapters": "a,b", "waiting_lora_adapters": "a,c"}
    assert sample.value > 1e9  # the time: the newest is the one that counts


def test_nothing_is_said_of_an_engine_that_is_away(metrics):
    before = scraped(metrics)
    families = scraped(metrics, None)
    assert value(families, "vllm:engine_up") == 0 and "vllm:num_requests_running" not in families
    of_engine = {name for name in before if name.startswith(("vllm:engine_", "vllm:speculation_"))} - {"vllm:engine_up"}
    assert len(of_engine) > 20
    assert {name for name in of_engine if name in families and families[name].samples} == set()
    assert scraped(metrics).keys() == before.keys()  # the next one
    assert value(families, "vllm:generation_tokens", "_total") == 3  # the server's own


def test_each_sequence_counts_once_by_how_it_ended(metrics):
    def ended(watch_done):
        watch = metrics.watch("alpha", [7, 7])
        watch.delta(0, Delta("a", [1], finish_reason="stop", usage=Usage(7, 1, 0, 1, 0, 0, 0, 0)))
        watch_done(watch)
        watch.done()

    ended(lambda watch: watch.delta(1, Delta("b", [], finish_reason="stop")))
    ended(lambda watch: watch.failed())
    ended(lambda watch: None)
    families = scraped(metrics)
    reasons = {
        each.labels["finished_reason"]: each.value
        for each in families["vllm:request_success"].samples
        if each.name.endswith("_total")
    }
    assert reasons == {"stop": 4, "length": 1, "error": 1, "abort": 1}
    assert value(families, "vllm:prompt_tokens", "_total", model="alpha") == 7 + 3 * 7 + 7
    assert value(families, "vllm:request_generation_tokens", "_sum") == 3 + 3
    assert value(families, "vllm:request_time_per_output_token_seconds", "_count") == 1  # of those with two or more


def test_by_default_names_have_the_projects_prefix():
    families = scraped(Metrics("the-base"))
    assert all(name.startswith("specserve_") for name in families) and "specserve_num_requests_running" in families
