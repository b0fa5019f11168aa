"""Replicas of real Ray that come and go in order: with the load, and for other settings. Nothing is lost by either.

A start takes half a minute, of Ray: `make ray` runs these, where it is installed.
"""

from __future__ import annotations

import re
import time

import pytest
import requests
from ray_server import PROMPTS, START_S, Callers, RayServer, body_of, warm
from waiting import wait_until

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.slow

MADE = re.compile(r'specserve_replica_generated_tokens_total\{replica="(\w+)"\} (\S+)')
FLAGS = (
    "--num-replicas", "1", "--max-replicas", "2", "--replica-waiting-tokens", "64",
    "--scale-up-delay-s", "1", "--scale-down-delay-s", "5", "--max-num-seqs", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(model_dir, adapter_dirs):
    server = RayServer(model_dir, adapter_dirs[0].parent, *FLAGS).wait_ready(START_S)
    yield server
    assert server.stop(timeout_s=120) == 0, "".join(server.log[-30:])


def made(server) -> dict[str, float]:
    """Tokens by replica."""
    text = requests.get(server.url + "/metrics", timeout=10).text
    return {name: float(num) for name, num in MADE.findall(text)}


def test_a_replica_comes_with_the_load_and_goes_with_it_in_order(server, expected):
    warm(expected)
    (first,) = server.wait_replicas(1)
    with Callers(server, expected, num=2) as few:  # until the end
        with Callers(server, expected, num=16) as many:
            both = server.wait_replicas(2)
            (second,) = both - {first}
            wait_until(lambda: made(server).get(second, 0) > 1000)
        (left,) = server.wait_replicas(1)
        time.sleep(3)
    assert left in both
    outcomes = few.outcomes + many.outcomes
    assert set(outcomes) == {"right"}, outcomes
    server.wait_baseline()


def test_an_update_replaces_replicas_in_order_and_keeps_the_front_with_its_names(
    server, expected, model_dir, adapter_dirs
):
    warm(expected)
    before, front = server.replicas(), server.pids("ray::ServeReplica:specserve:Front")
    path = str(adapter_dirs[0])
    assert server.post("/v1/load_lora_adapter", {"lora_name": "given", "lora_path": path}).status_code == 200
    given, same = (body_of(name, PROMPTS[0], 40) for name in ("given", "a"))
    flags = (*FLAGS, "--num-replicas", "2", "--max-num-seqs", "16", "--ray-address", "auto")
    with Callers(server, expected) as callers:
        time.sleep(1)
        again = RayServer(model_dir, adapter_dirs[0].parent, *flags, port=server.port).wait_ready(START_S)
        assert "updated" in "".join(again.log) and again.url == server.url
        after = server.wait_replicas(2)
        time.sleep(2)
    assert set(callers.outcomes) == {"right"} and len(callers.outcomes) > 20, callers.outcomes
    assert not before & after and server.pids("ray::ServeReplica:specserve:Front") == front
    assert server.post("/v1/completions", given).json()["choices"][0]["text"] == expected(same)
    server.wait_baseline()

    worse = RayServer(model_dir, adapter_dirs[0].parent, *flags, "--base-head", "/nowhere", port=server.port)
    assert worse.process.wait(timeout=300) == 2
    (line,) = [line for line in worse.log if line.startswith("error: ")]
    assert "cannot be updated" in line and "base_head is /nowhere" in line, line
    assert server.replicas() == after

    last = RayServer(model_dir, adapter_dirs[0].parent, *flags, port=server.port).wait_ready(START_S)
    assert again.stop(timeout_s=120) == 0 and "to which it is left" in "".join(again.log), "".join(again.log[-30:])
    assert server.replicas() == after
    assert last.stop(timeout_s=120) == 0, "".join(last.log[-30:])
