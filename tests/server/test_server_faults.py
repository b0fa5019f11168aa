"""Faults the server survives: clients that leave, overload, a killed or hung engine, signals, and bad starts."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from broken.broken_tokens import broken_env
from golden import Golden
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess, assert_error
from waiting import wait_until


def start_server(model_dir, *flags):
    """A server on the torch path: the native one answers `LONG` before anything could happen to it."""
    return ServerProcess(model_dir, "--kernels", "torch", *flags, env=broken_env())


LONG = {
    "prompt": "The quick brown",
    "max_tokens": 4000,
    "temperature": 0,
    "ignore_eos": True,
    "speculation": {"mode": "off"},
}


@pytest.fixture(scope="module")
def server(patient_model_dir):
    flags = ("--max-num-seqs", "4", "--max-waiting", "4", "--max-concurrent-requests", "12", "--read-timeout-s", "2")
    server = ServerProcess(patient_model_dir, *flags, env=broken_env()).wait_ready()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def baseline(server):
    return server.complete()["text"], Golden(server)


@pytest.fixture
def golden(baseline):
    """Text of the golden request, which is asked again afterwards."""
    yield baseline[0]
    baseline[1].check()


def raw(server, data: bytes, timeout_s=60) -> bytes:
    """Send bytes, read until the server closes or is silent for long."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as sock:
        sock.sendall(data)
        received = b""
        try:
            while chunk := sock.recv(65536):
                received += chunk
        except TimeoutError:
            received += b"<timeout>"
        return received


def running(server) -> int:
    m = server.metrics()
    return int(m["num_requests_running"] + m["num_requests_waiting"])


def wait_for_another(server, *old_pids: int) -> None:
    """Another engine than those serves."""
    wait_until(lambda: server.engine_pids() - {*old_pids} and server.get("/health").status_code == 200)


def test_the_server_process_holds_no_torch(server):
    reply = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
    assert reply.status_code == 200
    assert "tokenizers" in (maps := Path(f"/proc/{server.process.pid}/maps").read_text())
    assert "libtorch" not in maps


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_disconnects_frees_its_blocks(server, golden, stream):
    body = {**LONG, "n": 8, "temperature": 1, "stream": stream}
    before = server.metrics()["engine_generated_tokens"]
    if stream:
        reply = server.post("/v1/completions", body, stream=True)
        lines = reply.iter_lines()
        next(lines)
        assert running(server) > 0
        reply.close()
    else:
        with pytest.raises(requests.exceptions.ReadTimeout):
            requests.post(server.url + "/v1/completions", json=body, timeout=(60, 0.3))
    wait_until(lambda: running(server) == 0)
    made = server.metrics()["engine_generated_tokens"] - before
    assert made < 8 * LONG["max_tokens"], "it ran to its end instead of being aborted"


def test_overload_is_answered_with_429_and_retry_after_and_the_admitted_finish(server, golden):
    replies: list[requests.Response] = []
    body = {**LONG, "max_tokens": 60}
    threads = [threading.Thread(target=lambda: replies.append(server.post("/v1/completions", body))) for _ in range(40)]
    with server.paused():  # none is answered before all have come
        for thread in threads:
            thread.start()
        wait_until(lambda: len(replies) == 40 - 12)
    for thread in threads:
        thread.join()
    statuses = sorted(reply.status_code for reply in replies)
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4
    for reply in replies:
        if reply.status_code == 429:
            assert_error(reply, 429, "retry")
            assert int(reply.headers["Retry-After"]) >= 1 and reply.headers["x-should-retry"] == "true"
    assert len({reply.json()["choices"][0]["text"] for reply in replies if reply.status_code == 200}) == 1


def test_slow_body_is_answered_408_and_slow_headers_are_closed(server, golden):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 100\r\n\r\n"
    assert b" 408 " in raw(server, head + b'{"prompt"').split(b"\r\n")[0]
    chunked = head.replace(b"Content-Length: 100", b"Transfer-Encoding: chunked")
    assert b" 408 " in raw(server, chunked + b"3\r\n{  \r\n").split(b"\r\n")[0]
    assert b"<timeout>" not in raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: loc")


def test_killed_engine_ends_streams_with_an_error_and_comes_back(server, golden):
    reply = server.post("/v1/completions", {**LONG, "stream": True}, stream=True)
    lines = reply.iter_lines()
    next(lines)
    pid = server.engine_pid()
    os.kill(pid, signal.SIGKILL)
    rest = [line for line in lines if line]
    assert rest[-1] == b"data: [DONE]"
    assert "engine" in json.loads(rest[-2][6:])["error"]["message"]
    wait_for_another(server, pid)
    assert server.get("/ready").status_code == 200


def test_engine_killed_again_while_it_starts_comes_back(server, golden):
    pids, num_lines = set(), len(server.log)
    for _ in range(3):
        wait_until(lambda: server.engine_pids() - pids)
        time.sleep(0.3)  # it starts
        (pid,) = server.engine_pids() - pids
        pids.add(pid)
        os.kill(pid, signal.SIGKILL)
    wait_for_another(server, *pids)
    server.wait_log("starting it again", num=3, since=num_lines)
    reasons = [line for line in server.log[num_lines:] if "starting it again" in line]
    assert len(reasons) == 3 and all("SIGKILL" in line for line in reasons)


def test_engine_killed_while_handles_are_out_comes_back(server, golden):
    """The limit is lowered under the server's feet: what it does beforehand to keep some handles does not count."""
    pid, engine_pid, num_lines = server.process.pid, server.engine_pid(), len(server.log)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        os.kill(engine_pid, signal.SIGKILL)
        server.wait_log("cannot be started: Too many", since=num_lines)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    wait_for_another(server, engine_pid)


def test_requests_that_wait_when_the_engine_is_killed_and_those_that_come_before_the_next_are_served(
    server, golden, patient_model_dir, tmp_path
):
    path = make_peft_adapter(patient_model_dir, tmp_path / "waits", r=4, std=0.3)
    server.post("/v1/load_lora_adapter", {"lora_name": "waits", "lora_path": str(path)}).raise_for_status()
    want = server.complete(model="waits")["text"]
    assert want != golden
    pid, num_lines = server.engine_pid(), len(server.log)
    os.kill(pid, signal.SIGSTOP)  # so that nothing that comes from here on gets any output of it
    texts: list[tuple[bool, str]] = []

    def complete(fields):
        texts.append((bool(fields), server.complete(**fields)["text"]))

    threads = [threading.Thread(target=complete, args=(fields,)) for fields in ({}, {"model": "waits"}) * 3]
    for thread in threads[:4]:
        thread.start()
    wait_until(lambda: server.num_in_flight() == 4)
    os.kill(pid, signal.SIGKILL)
    server.wait_log("starting it again", since=num_lines)
    for thread in threads[4:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == [(False, golden)] * 3 + [(True, want)] * 3
    server.post("/v1/unload_lora_adapter", {"lora_name": "waits"}).raise_for_status()


def test_hung_engine_is_replaced(broken_server):
    want = broken_server.complete()["text"]
    pid = broken_server.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    assert broken_server.complete()["text"] == want
    wait_for_another(broken_server, pid)
    assert broken_server.complete()["text"] == want


def test_sigterm_drains_running_requests_and_leaves_no_process(patient_model_dir):
    server = start_server(patient_model_dir, "--drain-timeout-s", "600").wait_ready()
    pid = server.engine_pid()
    want = server.complete(max_tokens=400, speculation={"mode": "off"})["text"]
    reply = server.post("/v1/completions", {**LONG, "max_tokens": 400, "stream": True}, stream=True)
    lines = reply.iter_lines()
    first = next(lines)
    with server.paused():
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get("/ready").status_code == 503)
        refused = server.post("/v1/completions", LONG)
    assert_error(refused, 503, "shutting down")
    assert refused.json()["error"]["type"] == "server_error" and refused.headers["Retry-After"]
    events = [first, *(line for line in lines if line)]
    assert events[-1] == b"data: [DONE]"
    assert "".join(json.loads(e[6:])["choices"][0]["text"] for e in events[:-1]) == want
    assert server.process.wait(timeout=60) == 0
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_drain_ends_in_time_and_the_stream_with_an_error_event(patient_model_dir):
    server = start_server(patient_model_dir, "--drain-timeout-s", "0.2").wait_ready()
    lines = server.post(
        "/v1/completions", {**LONG, "n": 32, "temperature": 1, "stream": True}, stream=True
    ).iter_lines()
    next(lines)
    server.process.send_signal(signal.SIGTERM)
    events = [line for line in lines if line]
    assert events[-1] == b"data: [DONE]" and "shutting down" in json.loads(events[-2][6:])["error"]["message"]
    assert server.process.wait(timeout=60) == 0


def cut_short(server, *numbers: int) -> None:
    """Send these signals while a stream runs; the server ends, and its engine with it."""
    pid = server.engine_pid()
    lines = server.post("/v1/completions", {**LONG, "n": 8, "stream": True}, stream=True).iter_lines()
    next(lines)
    for number in numbers:
        server.process.send_signal(number)
        if number == signal.SIGTERM:
            server.wait_log("shutting down")
    assert server.process.wait(timeout=60) != 0
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_second_signal_stops_at_once(patient_model_dir):
    cut_short(start_server(patient_model_dir).wait_ready(), signal.SIGTERM, signal.SIGTERM)


def test_request_timeout_is_504_or_an_error_event_and_a_killed_server_leaves_no_engine(patient_model_dir):
    server = start_server(patient_model_dir, "--request-timeout-s", "2").wait_ready()
    body = {**LONG, "n": 8, "temperature": 1}
    with server.paused():
        assert_error(server.post("/v1/completions", body), 504, "request-timeout-s")
    lines = server.post("/v1/completions", {**body, "stream": True}, stream=True).iter_lines()
    next(lines)
    with server.paused():
        events = [line for line in lines if line]
    assert events[-1] == b"data: [DONE]" and json.loads(events[-2][6:])["error"]["code"] == "timeout"
    server.wait_baseline()
    cut_short(server, signal.SIGKILL)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--max-model-len", "100000"], "max_model_len"),
        (["--adapters-dir", "/nonexistent"], "adapters_dir"),
    ],
    ids=str,
)
def test_bad_start_is_one_line_and_no_process_stays(patient_model_dir, flags, word):
    command = [sys.executable, "-m", "specserve.cli", "serve", str(patient_model_dir), "--port", "0", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and word in last and "Traceback" not in result.stderr


def test_port_in_use_is_one_line(patient_model_dir, server):
    port = server.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "specserve.cli", "serve", str(patient_model_dir), "--port", port]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and port in result.stderr and "Traceback" not in result.stderr
