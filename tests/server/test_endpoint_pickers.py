"""A scrape of ours as endpoint pickers read vLLM's: llm-d's router, and the Gateway API inference extension.

Their core metrics extractor (kubernetes-sigs/gateway-api-inference-extension, pkg/epp/framework/plugins/datalayer/
extractor/metrics at 95ad8d6; llm-d/llm-d-router has the same) finds five families by name. Of a gauge it takes the
sample with the newest timestamp, and the first where none has one; of the LoRA gauge the sample with the greatest
value, since that is the time. Lists of adapters are split at commas; numbers in labels have to be whole.
"""

from __future__ import annotations

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


def test_nobody_is_told_anything_of_an_engine_that_is_away():
    """A picker keeps what it knew, and leaves the server out when that is too old."""
    with pytest.raises(KeyError):
        picked(Metrics("the-base", "vllm").render(None, None).decode())
