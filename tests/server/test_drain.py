"""A server that is told to end, whatever its engine is doing: what runs finishes, nothing new begins, nothing stays."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server_fixture import ServerProcess, assert_error

TEXT = "/v1/completions"
BODY = {"prompt": "The quick brown", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
SLOW = {**BODY, "speculation": {"mode": "off"}}


@pytest.fixture
def server(model_dir, adapters_dir):
    """On the torch path: the native one answers before anything could happen to it. Ends with no process left."""
    server = ServerProcess(model_dir, "--kernels", "torch", "--adapters-dir", str(adapters_dir)).wait_ready()
    yield server
    assert server.process.wait(timeout=60) == 0
    assert children_of(server) == set()


def children_of(server) -> set[int]:
    return {int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent(path) == server.process.pid}


def _parent(path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def wait_until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def drain(server):
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: any("shutting down" in line for line in server.log))


def test_an_engine_that_is_away_at_the_signal_comes_back_for_those_who_wait(server):
    want = server.complete(**SLOW)["text"]
    with ThreadPoolExecutor(2) as pool:
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_until(lambda: server.get("/health").status_code == 503)
        waiting = [pool.submit(server.post, TEXT, SLOW) for _ in range(2)]
        wait_until(lambda: server.metrics()["http_requests_in_flight"] >= 3)
        watching = server.get("/v1/stats?stream=true", stream=True)
        drain(server)
        assert list(watching.iter_lines())[0].startswith(b"data: ")  # and it has an end
        assert server.get("/ready").json()["status"] == "draining"  # whatever the engine does
        assert server.get("/health").json()["status"] == "restarting"
        assert_error(server.post(TEXT, SLOW), 503, "shutting down")
        assert [reply.result().json()["choices"][0]["text"] for reply in waiting] == [want] * 2


@pytest.mark.slow
def test_an_engine_that_dies_during_the_drain_comes_back_and_cuts_streams_alone(server):
    want = server.complete(**SLOW)["text"]
    lines = (line for line in server.post(TEXT, {**SLOW, "stream": True}, stream=True).iter_lines() if line)
    next(lines)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(server.post, TEXT, SLOW)
        wait_until(lambda: server.metrics()["num_requests_running"] == 2)
        drain(server)
        for _ in range(2):
            os.kill(server.engine_pid(), signal.SIGKILL)
            time.sleep(0.5)
        events = [*lines]
        assert events[-1] == b"data: [DONE]" and "engine" in json.loads(events[-2][6:])["error"]["message"]
        assert whole.result().json()["choices"][0]["text"] == want


@pytest.mark.slow
def test_loads_that_are_under_way_finish(server, adapters_dir):
    folder = shutil.copytree(adapters_dir / "good", adapters_dir / "late")  # just now: a load waits a second
    try:
        with ThreadPoolExecutor(2) as pool:
            loaded = pool.submit(server.post, "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "late"})
            asked = pool.submit(server.post, TEXT, {**BODY, "model": "late"})
            wait_until(lambda: server.metrics()["http_requests_in_flight"] >= 3)
            drain(server)
            assert loaded.result().status_code == 200 and asked.result().status_code == 200
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_second_signal_ends_at_once_also_while_the_engine_starts(model_dir):
    server = ServerProcess(model_dir, "--kernels", "torch").wait_ready()
    with ThreadPoolExecutor(1) as pool:
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_until(lambda: server.get("/health").status_code == 503)
        waiting = pool.submit(server.post, TEXT, SLOW)
        wait_until(lambda: server.metrics()["http_requests_in_flight"] >= 2)
        drain(server)
        pids = children_of(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 1
        assert waiting.exception() is not None  # the connection broke: nothing that looks like an answer
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), timeout_s=20)
