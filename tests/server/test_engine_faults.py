"""Faults within the engine's process: it raises, dies, hangs, runs out of memory, at any moment of a server's life.

Streams end with an error event, everything else waits and is answered by the next process; then the golden requests
give the same tokens, and everything is given back.
"""

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from broken.broken_tokens import EXITS, HANGS, KILLED, LATER, ONCE, OUT_OF_MEMORY, RAISES, SEIZES, SPINS
from golden import Golden
from server_fixture import assert_error
from waiting import wait_until

TEXT = "/v1/completions"
BODY = {"max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 0}
START = [1, 2, 3]


@pytest.fixture
def once(faults):
    return faults / "once"


@pytest.fixture(scope="module")
def adapters_dir(broken_dir):
    return broken_dir


@pytest.fixture(scope="module")
def server(broken_server):
    return broken_server


@pytest.fixture(scope="module")
def baseline(server):
    return Golden(server, ("tiny", "good"))


@pytest.fixture(autouse=True)
def golden(server, baseline):
    yield
    wait_until(lambda: server.get("/ready").status_code == 200)
    baseline.check()


def ask(server, prompt, **fields):
    return server.post(TEXT, {**BODY, "prompt": prompt, **fields})


def texts_of(reply):
    assert reply.status_code == 200, reply.text
    return [choice["text"] for choice in reply.json()["choices"]]


def open_stream(server, **fields):
    """Events of a stream that has begun."""
    body = {**BODY, "prompt": START, "max_tokens": 4000, "stream": True, "speculation": {"mode": "off"}, **fields}
    lines = (line for line in server.post(TEXT, body, stream=True).iter_lines() if line)
    return [next(lines)], lines


def assert_cut(events):
    """The stream ended with an error event and [DONE]."""
    assert events[-1] == b"data: [DONE]"
    assert "engine" in json.loads(events[-2][6:])["error"]["message"]


@pytest.mark.parametrize("fault", [RAISES, OUT_OF_MEMORY])
def test_a_request_whose_forward_raises_fails_alone(server, fault):
    pid, want = server.engine_pid(), texts_of(ask(server, START))
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(ask, server, START) for _ in range(4)]
        bad = [pool.submit(ask, server, [*START, fault, *more]) for more in ([], [LATER])]
        for reply in bad:
            assert assert_error(reply.result(), 500, "this request")["code"] == "model_failure"
        assert [texts_of(reply.result()) for reply in others] == [want] * 4
    assert server.engine_pid() == pid


@pytest.mark.slow
@pytest.mark.parametrize("fault", [EXITS, KILLED], ids=["exits", "killed"])
@pytest.mark.parametrize("more", [[], [LATER]], ids=["at once", "in the middle of its output"])
def test_a_request_that_ends_two_engines_is_refused_and_the_others_are_served(server, fault, more):
    others = [{"model": name, "max_tokens": num} for name in ("tiny", "good") for num in (4, 60, 200)]
    want = [texts_of(ask(server, START, **fields)) for fields in others]
    num_lines = len(server.log)
    with ThreadPoolExecutor(8) as pool:
        bad = pool.submit(ask, server, [*START, fault, *more])
        replies = [pool.submit(ask, server, START, **fields) for fields in others]
        error = assert_error(bad.result(), 500, "2 times")
        assert error["code"] == "engine_crashed"
        assert [texts_of(reply.result()) for reply in replies] == want
    server.wait_log("starting it again", num=2, since=num_lines)
    assert sum("starting it again" in line for line in server.log[num_lines:]) == 2


@pytest.mark.parametrize(
    "fault",
    [HANGS, pytest.param(SPINS, marks=pytest.mark.slow), pytest.param(SEIZES, marks=pytest.mark.slow)],
    ids=["waits", "spins", "holds the interpreter"],
)
def test_a_step_that_never_ends_is_noticed_within_seconds(server, fault):
    pid = server.engine_pid()
    start = time.monotonic()
    lines = server.post(TEXT, {**BODY, "prompt": [*START, fault, LATER], "stream": True}, stream=True).iter_lines()
    assert_cut([line for line in lines if line])
    assert time.monotonic() - start < 240  # 2 s for a step, 5 s for silence, of time in which it has a core
    wait_until(lambda: server.get("/ready").status_code == 200)
    assert server.engine_pid() != pid


def test_whole_answers_survive_the_death_of_their_engine_whatever_had_been_made_of_them(server, once):
    """Seeded, with drafts, choices, log-probabilities and stop strings: all as if nothing had happened."""
    bodies = [
        {},
        {"model": "good", "max_tokens": 200},
        {"n": 3, "temperature": 1.0, "seed": 5, "logprobs": 3},
        {"stop": ["\0never"], "temperature": 0.7, "seed": 9},
        {"speculation": {"mode": "fixed", "max_draft_tokens": 4}, "echo": True},
        {"prompt": "The quick brown fox jumps"},
        {"speculation": {"mode": "off", "trace": True}, "n": 2, "temperature": 1.0, "seed": 7},
    ]
    bodies = [{"prompt": [*START, ONCE, LATER], **body} for body in bodies]
    want = [_without_times(ask(server, **body)) for body in bodies]
    once.touch()
    with ThreadPoolExecutor(len(bodies)) as pool:
        got = list(pool.map(lambda body: ask(server, **body), bodies))
    assert not once.exists(), "nothing was killed"
    assert [_without_times(reply) for reply in got] == want


def _without_times(reply):
    assert reply.status_code == 200, reply.text
    value = reply.json()
    usage = {key: value["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return value["choices"], usage


@pytest.mark.slow
def test_an_adapter_that_changes_while_its_engine_is_away_gives_no_mixed_answer(server, once, adapters_dir, model_dir):
    folder = shutil.copytree(adapters_dir / "good", adapters_dir / "swapped")
    try:
        old = texts_of(ask(server, START, model="swapped", max_tokens=300))
        once.touch()
        with ThreadPoolExecutor(1) as pool:
            num = len(server.log)
            reply = pool.submit(ask, server, [*START, ONCE, LATER], model="swapped", max_tokens=300)
            server.wait_log("starting it again", since=num)
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "fresh").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 2}))
            (folder / "fresh").replace(folder / "adapter_config.json")
            assert_error(reply.result(), 503, "retry")
        assert texts_of(ask(server, START, model="swapped", max_tokens=300)) != old
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_engine_killed_while_adapters_load_loads_them_again(server, adapters_dir):
    names = [f"late-{n}" for n in range(4)]
    want = texts_of(ask(server, START, model="good"))
    for name in names:
        shutil.copytree(adapters_dir / "good", adapters_dir / name)  # just now: their loads wait a second for changes
    try:
        with ThreadPoolExecutor(8) as pool:
            replies = [pool.submit(ask, server, START, model=name) for name in names]
            body = {"lora_name": "by-route", "lora_path": "late-0"}
            loaded = pool.submit(server.post, "/v1/load_lora_adapter", body)
            for _ in range(3):
                time.sleep(0.5)
                for pid in server.engine_pids():
                    os.kill(pid, signal.SIGKILL)
            assert [texts_of(reply.result()) for reply in replies] == [want] * 4
            assert loaded.result().status_code == 200
            assert texts_of(ask(server, START, model="by-route")) == want
            assert server.post("/v1/unload_lora_adapter", {"lora_name": "by-route"}).status_code == 200
    finally:
        for name in names:
            shutil.rmtree(adapters_dir / name)


def test_engine_that_is_stopped_and_goes_on_loses_nothing(server):
    pid, want = server.engine_pid(), texts_of(ask(server, START))
    events, lines = open_stream(server)
    for _ in range(2):
        os.kill(pid, signal.SIGSTOP)
        waiting = threading.Thread(target=ask, args=(server, START))
        waiting.start()
        time.sleep(1.0)
        assert server.get("/health").status_code == 200
        os.kill(pid, signal.SIGCONT)
        waiting.join()
    events += lines
    assert events[-1] == b"data: [DONE]" and b"error" not in events[-2]
    assert texts_of(ask(server, START)) == want and server.engine_pid() == pid


@pytest.mark.slow
def test_engine_that_is_stopped_dies_and_whoever_waited_is_served(server):
    pid, want = server.engine_pid(), texts_of(ask(server, START))
    events, lines = open_stream(server)
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        replies = [pool.submit(ask, server, START) for _ in range(2)]
        assert [texts_of(reply.result()) for reply in replies] == [want] * 2
    assert_cut([*events, *lines])
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
