"""A server that is told to end, whatever its engine is doing: what runs finishes, nothing new begins, nothing stays."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from broken.broken_tokens import broken_env
from server_fixture import ServerProcess, assert_error
from waiting import wait_until

TEXT = "/v1/completions"
BODY = {"prompt": "The quick brown", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
SLOW = {**BODY, "speculation": {"mode": "off"}}


@pytest.fixture
def away(tmp_path):
    """A file; while it is there, no engine starts."""
    return tmp_path / "away"


@pytest.fixture
def server(model_dir, adapters_dir, away):
    """On the torch path: the native one answers before anything could happen to it. Ends with no process left."""
    flags = ("--kernels", "torch", "--adapters-dir", str(adapters_dir), "--drain-timeout-s", "600")
    server = ServerProcess(model_dir, *flags, env=broken_env(BROKEN_START=away)).wait_ready()
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


def drain(server):
    server.process.send_signal(signal.SIGTERM)
    server.wait_log("shutting down")


def test_an_engine_that_is_away_at_the_signal_comes_back_for_those_who_wait(server, away):
    want = server.complete(**SLOW)["text"]
    away.touch()
    with ThreadPoolExecutor(2) as pool:
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_until(lambda: server.get("/health").status_code == 503)
        waiting = [pool.submit(server.post, TEXT, SLOW) for _ in range(2)]
        wait_until(lambda: server.num_in_flight() == 2)
        watching = server.get("/v1/stats?stream=true", stream=True)
        drain(server)
        assert list(watching.iter_lines())[0].startswith(b"data: ")  # and it has an end
        assert server.get("/ready").json()["status"] == "draining"  # whatever the engine does
        assert server.get("/health").json()["status"] == "restarting"
        assert_error(server.post(TEXT, SLOW), 503, "shutting down")
        away.unlink()
        assert [reply.result().json()["choices"][0]["text"] for reply in waiting] == [want] * 2


@pytest.mark.slow
def test_an_engine_that_dies_during_the_drain_comes_back_and_cuts_streams_alone(server):
    want = server.complete(**SLOW)["text"]
    lines = (line for line in server.post(TEXT, {**SLOW, "stream": True}, stream=True).iter_lines() if line)
    next(lines)
    with ThreadPoolExecutor(1) as pool:
        pid = server.engine_pid()
        os.kill(pid, signal.SIGSTOP)  # nothing is answered before it dies
        whole = pool.submit(server.post, TEXT, SLOW)
        wait_until(lambda: server.num_in_flight() == 2)
        drain(server)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.engine_pids() - {pid})
        (pid,) = server.engine_pids() - {pid}
        os.kill(pid, signal.SIGKILL)
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
            wait_until(lambda: server.num_in_flight() == 2)
            drain(server)
            assert loaded.result().status_code == 200 and asked.result().status_code == 200
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_second_signal_ends_at_once_also_while_the_engine_starts(model_dir, away):
    server = ServerProcess(model_dir, "--kernels", "torch", env=broken_env(BROKEN_START=away)).wait_ready()
    away.touch()
    with ThreadPoolExecutor(1) as pool:
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_until(lambda: server.get("/health").status_code == 503)
        waiting = pool.submit(server.post, TEXT, SLOW)
        wait_until(lambda: server.num_in_flight() == 1)
        drain(server)
        pids = children_of(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 1
        assert waiting.exception() is not None  # the connection broke: nothing that looks like an answer
    away.unlink()  # an engine that hangs in an import hears nothing; behind it, it finds that nobody is there
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
