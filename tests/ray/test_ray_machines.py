"""`specserve ray` over three machines, each a network namespace: a head with the front, two with a replica each.

Adapters come from a bucket, by S3 where that is installed, else from a folder that all see; nothing else is shared but
the model's files. A start takes a minute, of Ray: `make ray` runs these, for root.
"""

from __future__ import annotations

import os
import shutil
import time

import pytest
import requests
from machines import HERE, Network, can_be_made
from ray_server import NAMES, PROMPTS, Callers, RayServer, body_of, warm
from waiting import wait_until

from specserve.server.shared_store.store import SharedStore

pytest.importorskip("ray.serve")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not can_be_made(), reason="needs root, ip, unshare and nsenter")]

START_S = 900  # of eleven processes of Ray on three machines that share two cores
NUM_CHECKS = (
    "8"  # that a machine misses before Ray takes it for dead: about 100 s, where the engine counts as hung after 10
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What all machines reach, and what they need to know for that."""
    try:
        import s3fs  # noqa: F401
        from s3_server import BUCKET, S3Server

        server = S3Server(HERE)
    except ImportError:
        yield SharedStore(str(tmp_path_factory.mktemp("store"))), {}
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield SharedStore(f"s3://{BUCKET}/loras"), server.env
    server.close()


@pytest.fixture(scope="module")
def network():
    network = Network()
    yield network
    network.close()


@pytest.fixture(scope="module")
def machines(network, store, tmp_path_factory):
    """Their names and themselves; Ray's folders and the cache of adapters are each machine's own."""
    root = tmp_path_factory.mktemp("machines")
    ray_dir, cache = root / "ray", root / "cache"
    made = {}
    for name in ("head", "east", "west"):
        private = {path: root / f"{path.name}-{name}" for path in (ray_dir, cache)}
        for path in (*private, *private.values()):
            path.mkdir(exist_ok=True)
        made[name] = network.machine(name, private)
    env = {**os.environ, **store[1], "RAY_AUTH_MODE": "disabled", "RAY_agent_register_timeout_ms": "120000"}
    env |= {"SPECSERVE_ADAPTER_CACHE_DIR": str(cache), "RAY_raylet_start_wait_time_s": "120"}
    env["RAY_health_check_failure_threshold"] = NUM_CHECKS
    memory = ("--object-store-memory", "100000000")
    made["head"].start_ray(
        "--head", "--port", "6379", "--temp-dir", str(ray_dir), "--num-cpus", "0", "--include-dashboard=false", *memory,
        env=env,
    )  # fmt: skip

    def join(name):
        made[name].start_ray("--address", f"{made['head'].address}:6379", "--num-cpus", "1", *memory, env=env)

    for name in ("east", "west"):
        join(name)
        made[name].join = lambda name=name: join(name)
    yield made


@pytest.fixture(scope="module")
def start(machines, store, model_dir):
    """Start the command on the head."""

    def start(model=model_dir, *flags):
        address = f"{machines['head'].address}:6379"
        flags = ("--ray-address", address, "--num-replicas", "2", "--max-num-seqs", "16", "--host", "0.0.0.0", *flags)
        flags += ("--engine-timeout-s", "10")
        flags += ("--shared-store", store[0].url, "--shared-store-refresh-s", "0.5")
        return RayServer(model, None, *flags, port=8000, popen=machines["head"].popen)

    return start


@pytest.fixture(scope="module")
def server(start, store, adapter_dirs):
    for name, path in zip(NAMES, adapter_dirs, strict=True):
        store[0].push(path, name)
    server = start().wait_ready(START_S)
    server.wait_replicas(2, START_S)
    yield server
    assert server.stop(timeout_s=120) == 0, "".join(server.log[-30:])


def made_by_replica(server) -> list[float]:
    text = requests.get(server.url + "/metrics", timeout=10).text
    return [float(line.rpartition(" ")[2]) for line in text.splitlines() if "replica_generated_tokens_total{" in line]


def test_replicas_of_several_machines_give_the_answers_of_one_engine(server, machines, expected):
    assert server.url == f"http://{machines['head'].address}:8000"
    warm(expected)
    with Callers(server, expected) as callers:
        wait_until(lambda: min(made_by_replica(server)) > 500)
    assert set(callers.outcomes) == {"right"}, callers.outcomes
    server.wait_baseline()


def test_a_name_that_is_pushed_again_is_the_new_content_on_all_of_them(server, store, adapter_dirs, expected):
    old, new = (expected(body_of(name, PROMPTS[0], 40)) for name in "ab")
    store[0].push(adapter_dirs[0], "moving")
    asked = body_of("moving", PROMPTS[0], 40)

    def texts():
        return {server.post("/v1/completions", asked).json()["choices"][0]["text"] for _ in range(8)}

    assert texts() == {old}
    store[0].push(adapter_dirs[1], "moving")
    seen = set()
    wait_until(lambda: seen.update(found := texts()) or found == {new})
    assert seen == {old, new} or seen == {new}
    store[0].remove("moving")


def test_a_cable_that_is_pulled_for_a_while_costs_only_what_ran_behind_it(server, machines, expected):
    warm(expected)
    before = server.wait_replicas(2)
    with Callers(server, expected) as callers:
        time.sleep(3)
        machines["east"].cut()
        wait_until(lambda: len(server.replicas()) == 1)
        num = len(callers.outcomes)
        machines["east"].mend()
        assert server.wait_replicas(2, START_S) == before
        time.sleep(3)
    assert set(callers.outcomes) <= {"right", "lost"}, callers.outcomes
    assert callers.outcomes.count("lost") <= 8 < num, callers.outcomes
    server.wait_baseline()


def test_a_machine_that_is_switched_off_is_replaced_when_it_joins_again(server, machines, expected):
    warm(expected)
    before = server.wait_replicas(2)
    with Callers(server, expected) as callers:
        time.sleep(3)
        machines["west"].cut()
        machines["west"].end()
        (left,) = server.wait_replicas(1)
        machines["west"].begin()
        machines["west"].mend()
        machines["west"].join()
        after = server.wait_replicas(2, START_S)
        time.sleep(3)
    assert left in before and len(after - before) == 1
    assert set(callers.outcomes) <= {"right", "lost"} and callers.outcomes.count("lost") <= 8, callers.outcomes
    server.wait_baseline()


def test_a_model_that_one_machine_lacks_is_refused_by_its_name_and_nothing_changes(
    server, start, machines, model_dir, tmp_path_factory, expected
):
    before = server.wait_replicas(2, START_S)
    other = tmp_path_factory.mktemp("other") / "model"
    other.mkdir()
    machines["west"].popen("mount", "-t", "tmpfs", "none", str(other)).wait(timeout=60)  # what is in it, it lacks
    shutil.copytree(model_dir, other, dirs_exist_ok=True)
    wrong = start(other)
    assert wrong.process.wait(timeout=START_S) == 2
    (line,) = [line for line in wrong.log if line.startswith("error: ")]
    assert "cannot serve this, nothing was changed" in line and "machine west" in line, line
    assert server.replicas() == before
    body = body_of("a", PROMPTS[0], 40)
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == expected(body)
