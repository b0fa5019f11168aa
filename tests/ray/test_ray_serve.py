"""`specserve ray` with two replicas on this machine: right answers under load, whoever is killed meanwhile.

A start takes half a minute, of Ray: `make ray` runs these, where it is installed.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import requests
from ray_server import PROMPTS, START_S, Callers, RayServer, body_of, warm
from waiting import wait_until

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(model_dir, adapter_dirs):
    flags = ("--num-replicas", "2", "--max-num-seqs", "16")
    server = RayServer(model_dir, adapter_dirs[0].parent, *flags).wait_ready(START_S)
    server.wait_replicas(2)
    yield server
    assert server.stop(timeout_s=120) == 0, "".join(server.log[-30:])


def test_answers_are_those_of_one_engine_and_both_replicas_give_them(server, expected):
    warm(expected)
    with Callers(server, expected) as callers:
        time.sleep(8)
    assert set(callers.outcomes) == {"right"} and len(callers.outcomes) > 20, callers.outcomes
    text = requests.get(server.url + "/metrics", timeout=10).text
    made = [float(line.rpartition(" ")[2]) for line in text.splitlines() if "replica_generated_tokens_total{" in line]
    assert len(made) == 2 and min(made) > 0, made
    server.wait_baseline()


@pytest.mark.parametrize("victim", ["specserve.engine.process", "ray::ServeReplica:specserve:EngineReplica"])
def test_who_is_killed_under_load_loses_only_its_streams_and_comes_back(server, expected, victim):
    warm(expected)
    before = server.wait_replicas(2)
    with Callers(server, expected) as callers:
        time.sleep(3)
        os.kill(random.Random(0).choice(server.pids(victim)), signal.SIGKILL)
        num_before = len(callers.outcomes)
        server.wait_replicas(1)
        server.wait_replicas(2)
        time.sleep(3)
    assert set(callers.outcomes) <= {"right", "lost"}, callers.outcomes
    assert callers.outcomes.count("lost") <= 8 and len(callers.outcomes) > num_before + 8, callers.outcomes
    assert victim.startswith("specserve") == (server.replicas() == before)
    server.wait_baseline()


def test_a_client_that_leaves_ends_its_sequences(server):
    aborted = 'request_success_total{finished_reason="abort"}'
    before = server.metrics().get(aborted, 0)
    body = {**body_of("a", "The", 3900), "n": 8, "speculation": {"mode": "off"}, "stream": True}
    with requests.post(server.url + "/v1/completions", json=body, stream=True, timeout=60) as response:
        next(response.iter_lines())
    wait_until(lambda: server.metrics().get(aborted, 0) == before + 8)
    server.wait_baseline()


def test_the_front_comes_back_and_replicas_stay(server, expected):
    before = server.wait_replicas(2)
    (front,) = server.pids("ray::ServeReplica:specserve:Front")
    os.kill(front, signal.SIGKILL)
    time.sleep(1)
    assert server.wait_replicas(2) == before
    body = body_of("a", PROMPTS[0], 40)
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == expected(body)
