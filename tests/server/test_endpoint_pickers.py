"""A scrape of ours as endpoint pickers read vLLM's: llm-d's router, and the Gateway API inference extension.

Their core metrics extractor (pkg/epp/framework/plugins/datalayer/extractor/metrics in both) finds five families by
name. Of a gauge it takes the sample with the newest timestamp, and the first where none has one; of the LoRA gauge the
sample with the greatest value, since that is the time. Lists of adapters are split at commas; numbers in labels have to
be whole. `endpoint_picker_scrapes.json` has what the extractors themselves, at the commits named there, made of scrapes
of a server with a tiny model: of these only the five families are kept.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_vllm_metrics import INFO, STATS

from specserve.ray.merged import merged_info, merged_stats
from specserve.server.metrics.metrics import Metrics
from specserve.stats_messages import AdapterRequests


def picked(text: str) -> dict:
    """What a picker knows of a server after this scrape. Raises where it would log an error and go without."""
    families = {family.name: family for family in text_string_to_metric_families(text)}

    def gauge(name):
        samples = families[name].samples
        return max(reversed(samples), key=lambda sample: sample.timestamp or 0)

    lora = max(families["vllm:lora_requests_info"].samples, key=lambda sample: sample.value).labels
    cache = gauge("vllm:cache_config_info").labels
    return {
        "waiting": int(gauge("vllm:num_requests_waiting").value),
        "running": int(gauge("vllm:num_requests_running").value),
        "kv_use": gauge("vllm:kv_cache_usage_perc").value,
        "active_models": {name.strip() for name in lora["running_lora_adapters"].split(",") if name.strip()},
        "waiting_models": {name.strip() for name in lora["waiting_lora_adapters"].split(",") if name.strip()},
        "max_active_models": int(lora["max_lora"]),
        "block_size": int(cache["block_size"]),
        "num_gpu_blocks": int(cache["num_gpu_blocks"]),
    }


ONE = {
    "waiting": 5,
    "running": 3,
    "kv_use": 0.25,
    "active_models": {"a", "b"},
    "waiting_models": {"a", "c"},
    "max_active_models": 256,
    "block_size": 16,
    "num_gpu_blocks": 8,
}


def test_a_server_tells_its_queue_its_kv_cache_and_its_adapters():
    assert picked(Metrics("the-base", "vllm").render(STATS, INFO, {"c": 3}).decode()) == ONE


def test_the_front_of_several_replicas_tells_of_all_of_them_in_one_sample_each():
    busy = msgspec.structs.replace(
        STATS,
        num_running=1,
        num_waiting=5,
        num_free_kv_blocks=2,
        requests_by_adapter=[AdapterRequests("b", 1, 1), AdapterRequests("d", 0, 4)],
    )
    text = Metrics("the-base", "vllm").render(merged_stats([STATS, busy]), merged_info([INFO, INFO]), {"c": 3}).decode()
    assert picked(text) == {
        **ONE,
        "waiting": 10,
        "running": 4,
        "kv_use": 0.5,
        "waiting_models": {"a", "b", "c", "d"},
        "max_active_models": 512,
        "num_gpu_blocks": 16,
    }


RECORDED = json.loads(Path(__file__).with_name("endpoint_picker_scrapes.json").read_text())


@pytest.mark.parametrize("recorded", RECORDED["states"], ids=lambda recorded: recorded["state"])
def test_a_recorded_scrape_is_read_here_as_the_pickers_read_it(recorded):
    lists = {name: set(recorded["extracted"][name]) for name in ("active_models", "waiting_models")}
    assert picked("\n".join(recorded["scrape"])) == {**recorded["extracted"], **lists}


def test_what_pickers_read_in_the_recorded_scrapes_is_there_still():
    def shapes(text):
        return {
            (family.name, family.type, frozenset(sample.labels))
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    now = shapes(Metrics("the-base", "vllm").render(STATS, INFO).decode())
    recorded = shapes("\n".join(RECORDED["states"][0]["scrape"]))
    assert len(recorded) == 5 and recorded <= now


def test_nobody_is_told_anything_of_an_engine_that_is_away():
    """A picker keeps what it knew, and leaves the server out when that is too old."""
    with pytest.raises(KeyError):
        picked(Metrics("the-base", "vllm").render(None, None).decode())
