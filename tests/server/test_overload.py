"""What clients see when there is more to do than seats: priorities, deadlines, and when to come again."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess, assert_error
from waiting import wait_until

from specserve.errors import UserError, from_info
from specserve.server.middlewares import retry_headers

LONG = {"prompt": "The quick brown", "max_tokens": 4000, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "The quick brown", "max_tokens": 1, "temperature": 0}
NAMES = [f"a{idx}" for idx in range(8)]


@pytest.fixture(scope="module")
def root(patient_model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        make_peft_adapter(patient_model_dir, root / name, r=4, std=0.3, seed=seed)
    return root


@pytest.fixture(scope="module")
def server(patient_model_dir, root):
    """On the torch path, which takes its time, with one seat and room for three adapters."""
    flags = ("--kernels", "torch", "--max-num-seqs", "1", "--max-waiting", "20", "--max-waiting-tokens", "8000")
    flags = (*flags, "--adapters-dir", str(root), "--max-adapters", "3")
    server = ServerProcess(patient_model_dir, *flags, "--highest-priority=-5", "--speculation", "off").wait_ready()
    yield server
    assert server.stop() == 0


@pytest.fixture
def occupy(server):
    """Takes the seat, and with n > 1 waits for it too, until it leaves; all of it is given back."""
    opened = []

    def occupy(**fields):
        reply = server.post("/v1/completions", {**LONG, "stream": True, **fields}, stream=True)
        assert reply.status_code == 200, reply.text
        lines = reply.iter_lines()
        next(lines)
        opened.append((reply, lines))  # lines that nobody holds close the connection
        return reply

    yield occupy
    for reply, _ in opened:
        reply.close()
    server.wait_baseline()


def test_priorities_decide_who_is_next_and_only_allowed_ones_are_taken(server, occupy):
    occupant = occupy(n=4)  # three of which wait, and go with it
    num_lines = len(server.log)
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(server.post, "/v1/completions", {**LONG, "max_tokens": 60, "priority": priority})
            for priority in (5, None, -5)
        ]
        wait_until(lambda: server.metrics()["num_requests_waiting"] == 3 + 3)
        occupant.close()
        last, second, first = (reply.result().json()["id"] for reply in asked)
    server.wait_log(last, since=num_lines)
    lines = [line for line in server.log[num_lines:] if "length, " in line]  # as they ended
    assert all(name in line for name, line in zip((first, second, last), lines, strict=True)), lines
    refused = server.post("/v1/completions", {**SHORT, "priority": -6})
    assert_error(refused, 400, "priority is -6", "--highest-priority", param="priority")


def test_priorities_decide_whose_adapter_gets_the_next_place(server, occupy):
    """Two places are pinned, the third is the occupant's and then the others' in turn, but nobody's who has left."""
    *pinned, busy, first, second, third, urgent, left = NAMES
    for name in pinned:
        assert server.post("/v1/pin_lora_adapter", {"lora_name": name}).status_code == 200
    occupant = occupy(model=busy, n=4)
    num_lines, before = len(server.log), server.metrics()["engine_num_adapter_loads"]
    leaver = HTTPConnection(server.url.removeprefix("http://"))
    leaver.request(
        "POST", "/v1/completions", json.dumps({**SHORT, "model": left}), {"Content-Type": "application/json"}
    )
    wait_until(lambda: server.metrics()["engine_num_adapter_loads_waiting"] == 1)
    leaver.close()
    wait_until(lambda: server.metrics()["engine_num_adapter_loads_waiting"] == 0)
    with ThreadPoolExecutor(4) as pool:
        asked = []
        for name, priority in ((first, 5), (second, 5), (third, 5), (urgent, 0)):
            asked.append(pool.submit(server.complete, model=name, priority=priority))
            wait_until(lambda: server.metrics()["engine_num_adapter_loads_waiting"] == len(asked))
        assert server.metrics()["engine_num_adapter_loads"] == before
        occupant.close()
        for reply in asked:
            reply.result()
    order = [urgent, first, second, third]
    server.wait_log(f"adapter {third!r}: loaded", since=num_lines)
    lines = [match[1] for line in server.log[num_lines:] if (match := re.search(r"adapter '(\w+)': loaded", line))]
    assert list(dict.fromkeys(lines)) == order  # an adapter whose request comes late is loaded again
    for name in pinned:
        assert server.post("/v1/unpin_lora_adapter", {"lora_name": name}).status_code == 200


def test_a_deadline_that_passes_is_504_and_one_that_cannot_be_met_429_at_once(server, occupy):
    with server.paused():
        error = assert_error(server.post("/v1/completions", {**SHORT, "deadline_ms": 100}), 504, "deadline")
        assert error["code"] == "deadline_exceeded"
        inputs = {"inputs": "The quick", "parameters": {"max_new_tokens": 1, "deadline_ms": 100}}
        assert server.post("/generate", inputs).status_code == 504
    occupy(n=15, priority=-1, max_tokens=480)
    refused = server.post("/v1/completions", {**SHORT, "deadline_ms": 500})  # those before it take seconds
    error = assert_error(refused, 429, "deadline_ms leaves", param="deadline_ms")
    assert error["code"] == "deadline_unreachable" and int(refused.headers["Retry-After"]) >= 1
    assert server.post("/v1/completions", {**SHORT, "deadline_ms": 600_000, "priority": -2}).status_code == 200
    for wrong in (0, 86_400_001):
        assert_error(server.post("/v1/completions", {**SHORT, "deadline_ms": wrong}), 400, f"deadline_ms is {wrong};")


def test_an_answer_that_is_not_complete_at_its_deadline_ends_with_504(server):
    """Nothing is ahead of it, so that no estimate of a slow machine refuses it."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, "/v1/completions", {**LONG, "deadline_ms": 3000})
        wait_until(lambda: asked.done() or server.metrics()["num_requests_running"] == 1)
        with server.paused():  # however fast the machine
            error = assert_error(asked.result(), 504, "complete")
    assert error["code"] == "deadline_exceeded"


def test_too_many_requests_and_too_many_tokens_are_told_when_to_come_again(server, occupy):
    occupant = occupy(prompt=[[5] * 500] * 11, max_tokens=2000)  # ten of which wait
    prompts = ["a", *[[5] * 900] * 8]
    error = assert_error(server.post("/v1/completions", {**SHORT, "prompt": prompts}), 429, "--max-waiting-tokens 8000")
    assert error["code"] == "overloaded"
    refused = server.post("/v1/completions", {**SHORT, "prompt": ["a"] * 24})
    error = assert_error(refused, 429, "this one has 24 sequences", "--max-waiting 20")
    occupant.close()
    occupy(n=8, max_tokens=480)
    metrics = server.metrics()
    assert metrics["engine_num_waiting_tokens"] > 0 and metrics["engine_wait_estimate_seconds"] > 0


def test_retry_after_is_the_estimate_in_whole_seconds():
    for status, wait_s, header in ((429, 0.2, "1"), (429, 12.3, "13"), (503, None, "1"), (429, 1e9, "600")):
        error = UserError("", status=status, retry_after_s=wait_s)
        assert retry_headers(from_info(error.info())) == {"Retry-After": header, "x-should-retry": "true"}
    assert retry_headers(UserError("", status=504)) is None
