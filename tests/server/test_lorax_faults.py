"""LoRAX's routes when the server is full or the engine dies: its error shape, in answers and in streams."""

import json
import os
import signal
import threading

import pytest
from broken.broken_tokens import broken_env
from server_fixture import ServerProcess
from waiting import wait_until

LONG = {"inputs": "The quick", "parameters": {"max_new_tokens": 4000, "ignore_eos_token": True}}


@pytest.fixture(scope="module")
def server(patient_model_dir):
    """Slow enough for its streams to be cut off."""
    flags = ("--kernels", "torch", "--speculation", "off", "--max-concurrent-requests", "1")
    server = ServerProcess(patient_model_dir, *flags, env=broken_env()).wait_ready()
    yield server
    server.wait_baseline()
    assert server.stop() == 0


def test_full_server_answers_overloaded_with_retry_headers(server):
    running = server.post("/generate_stream", LONG, stream=True)
    lines = running.iter_lines()
    next(lines)
    try:
        for path in ("/generate", "/generate_stream", "/"):
            reply = server.post(path, {"inputs": "a", "parameters": {"max_new_tokens": 1}})
            assert reply.status_code == 429 and reply.json()["error_type"] == "overloaded"
            assert reply.headers["Retry-After"] == "1" and reply.headers["x-should-retry"] == "true"
    finally:
        running.close()
    server.wait_baseline()


def test_client_that_leaves_a_stream_frees_its_sequence(server):
    before = server.metrics()["engine_generated_tokens"]
    running = server.post("/generate_stream", LONG, stream=True)
    next(running.iter_lines())
    running.close()
    server.wait_baseline()
    assert server.metrics()["engine_generated_tokens"] - before < 4000


def test_engine_that_dies_ends_streams_with_an_error_event_and_no_answer_is_lost(server):
    want = server.post("/generate", {"inputs": "The", "parameters": {"max_new_tokens": 5}}).json()
    running = server.post("/generate_stream", LONG, stream=True)
    lines = running.iter_lines()
    next(lines)
    os.kill(server.engine_pid(), signal.SIGKILL)
    rest = [line for line in lines if line]
    last = json.loads(rest[-1].removeprefix(b"data:"))
    assert set(last) == {"error", "error_type"} and last["error_type"] == "incomplete_generation"
    wait_until(lambda: server.get("/health").status_code == 200)
    assert server.post("/generate", {"inputs": "The", "parameters": {"max_new_tokens": 5}}).json() == want
    body = {"inputs": "The quick", "parameters": {"max_new_tokens": 200, "ignore_eos_token": True}}
    want = server.post("/generate", body).json()
    replies = []
    whole = threading.Thread(target=lambda: replies.append(server.post("/generate", body)))
    whole.start()
    wait_until(lambda: not whole.is_alive() or server.metrics().get("num_requests_running"))
    os.kill(server.engine_pid(), signal.SIGKILL)
    whole.join()
    assert replies[0].json() == want  # nobody had read any of it: the next engine makes it again
    wait_until(lambda: server.get("/health").status_code == 200)
