"""Two tenants with keys on one server: what each may, what it uses, and what it cannot learn of the other."""

from __future__ import annotations

import http.client
import signal
import socket
import urllib.parse
from itertools import islice

import pytest
import requests
from server_fixture import ServerProcess, assert_error
from waiting import wait_until

from specserve.server.access.key_file import entry_text, new_key

NAMES = ("red", "blue", "admin", "scraper")
KEYS = {name: new_key() for name in NAMES}
COMPLETIONS = "/v1/completions"


def auth(name: str) -> dict[str, dict[str, str]]:
    return {"headers": {"Authorization": f"Bearer {KEYS[name]}"}}


def file_text(**changes) -> str:
    fields = {
        "red": {"adapters": ["re?"]},
        "blue": {"priority": True},
        "admin": {"scopes": ["admin"]},
        "scraper": {"scopes": ["metrics"]},
    }
    return "".join(entry_text(name, KEYS[name], {**fields[name], **changes.get(name, {})}) for name in NAMES)


class TenantsServer(ServerProcess):
    def get(self, path, **kwargs):
        """With the key for metrics unless another is given."""
        return super().get(path, **(kwargs or auth("scraper")))


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(file_text())
    return file


@pytest.fixture(scope="module")
def server(patient_model_dir, adapters_dir, keys_file):
    (adapters_dir / "good").rename(adapters_dir / "red")
    server = TenantsServer(
        patient_model_dir, "--adapters-dir", str(adapters_dir), "--api-keys-file", str(keys_file), "--learn-history"
    ).wait_ready()
    yield server
    server.wait_baseline()
    assert server.stop() == 0
    log = "".join(server.log)
    assert not any(key in log for key in KEYS.values()) and "for 'red'" in log


@pytest.fixture
def reload(server, keys_file):
    """Another file, which the server has read; the first one again afterwards."""

    def put(text: str, line: str = "have keys in") -> None:
        num = sum(line in entry for entry in server.log)
        keys_file.write_text(text)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: sum(line in entry for entry in server.log) > num)

    yield put
    put(file_text())


def ask(server, name, **fields):
    return server.post(
        COMPLETIONS, {"prompt": "The quick", "max_tokens": 3, "ignore_eos": True, **fields}, **auth(name)
    )


def test_a_key_opens_what_its_scopes_say(server):
    assert ask(server, "red").status_code == 200
    for name in ("admin", "scraper"):
        assert assert_error(ask(server, name), 403, "scope generate")["code"] == "insufficient_scope"
    load = {"lora_name": "mine", "lora_path": "red"}
    assert_error(server.post("/v1/load_lora_adapter", load, **auth("red")), 403, "scope admin")
    assert server.post("/v1/load_lora_adapter", load, **auth("admin")).status_code == 200
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "mine"}, **auth("admin")).status_code == 200
    for path in ("/metrics", "/v1/stats", "/version", "/openapi.json", "/v1/models", COMPLETIONS):
        assert requests.get(server.url + path, timeout=60).status_code == 401
    for path in ("/metrics", "/v1/stats", "/v1/stats?stream=true"):
        assert_error(server.get(path, **auth("red")), 403, "scope metrics")
    assert server.get("/v1/stats").json()["engine"]["status"] == "running"
    assert server.get("/version", **auth("red")).status_code == 200
    assert requests.get(server.url + "/health", timeout=60).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/metrics/",
            "//metrics",
            "/./metrics",
            "/metrics?",
            "/%6Detrics",
            "/METRICS",
            "/metrics;x",
            "/health/../metrics",
        ),
        *("/v1/load_lora_adapter/", "/v1/load_lora_adapter%00", "/v1/load_lora%5Fadapter", "/v1//load_lora_adapter"),
    ],
)
def test_no_spelling_of_a_path_opens_it(server, path):
    host, port = server.url.removeprefix("http://").split(":")
    for method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "get"):
        for target in (path, server.url + path):
            connection = http.client.HTTPConnection(host, int(port), timeout=60)
            connection.putrequest(method, urllib.parse.quote(target, safe="/%?;:"), skip_host=False)
            connection.putheader("Content-Length", "0")
            connection.endheaders()
            status = connection.getresponse().status
            assert status in (400, 401), (method, target, status)
            connection.close()


def test_a_key_that_is_taken_away_ends_its_stream_of_stats(server, reload):
    with server.get("/v1/stats?stream=true", stream=True, **auth("scraper")) as response:
        lines = response.iter_lines()
        assert next(lines).startswith(b"data: ")
        reload(entry_text("red", KEYS["red"], {"scopes": ["metrics"]}))
        assert_error(server.get("/v1/stats"), 401, "API key")
        assert sum(bool(line) for line in islice(lines, 20)) <= 2  # one may have been on its way


def test_an_adapter_of_others_does_not_exist(server, adapters_dir):
    (adapters_dir / "blue").symlink_to("red")
    try:
        names = [model["id"] for model in server.get("/v1/models", **auth("red")).json()["data"]]
        assert names == ["tiny", "red"]
        assert ask(server, "blue", model="blue").status_code == ask(server, "red", model="red").status_code == 200
        tool = {"type": "function", "x-adapter": "blue", "function": {"name": "f", "parameters": {"type": "object"}}}
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "tools": [tool]}
        inputs = {"inputs": "a", "parameters": {"adapter_id": "blue", "max_new_tokens": 2}}
        unknown = ask(server, "red", model="none").json()["error"]
        for path, body in (
            (COMPLETIONS, {"prompt": "a", "model": "blue"}),
            (COMPLETIONS, {"prompt": "a", "adapter_id": "blue"}),
            ("/v1/chat/completions", {**chat, "tool_choice": "required"}),
            ("/tokenize", {"prompt": "a", "model": "blue"}),
            ("/detokenize", {"tokens": [1], "model": "blue"}),
        ):
            error = assert_error(server.post(path, body, **auth("red")), 404, "'blue' does not exist")
            assert error["code"] == unknown["code"]
        assert server.post("/generate", inputs, **auth("red")).status_code == 404
        assert_error(server.get("/v1/models/blue", **auth("red")), 404)
    finally:
        (adapters_dir / "blue").unlink()


def test_only_a_key_that_may_use_an_adapter_sees_what_it_brings(server, adapters_dir):
    report = adapters_dir / "red" / "report.html"
    report.write_text("<!doctype html><title>Report</title>")
    (adapters_dir / "blue").symlink_to("red")
    try:
        for what in ("report", "examples"):
            assert server.get(f"/v1/adapters/red/{what}", **auth("red")).status_code == 200
            assert server.get(f"/v1/adapters/blue/{what}", **auth("blue")).status_code == 200
            assert_error(server.get(f"/v1/adapters/blue/{what}", **auth("red")), 404, "blue")
            assert_error(server.get(f"/v1/adapters/red/{what}", headers={}), 401)
    finally:
        (adapters_dir / "blue").unlink()
        report.unlink()


def test_stats_name_equal_files_as_the_key_that_asks_may(server, adapters_dir, reload):
    (adapters_dir / "pink").symlink_to("red")
    try:
        assert ask(server, "red", model="red").status_code == 200  # the first name of the content
        fields = {"adapters": ["pink"], "scopes": ["generate", "metrics"]}
        reload(file_text(red=fields))
        assert ask(server, "red", model="pink").status_code == 200
        told = server.get("/v1/stats", **auth("red")).json()["speculation"]["by_adapter"]
        assert {entry["model"] for entry in told} - {"tiny"} == {"pink"}
        everything = server.get("/v1/stats").json()["speculation"]["by_adapter"]
        assert "pink" not in {entry["model"] for entry in everything}  # it is known by its first name
    finally:
        (adapters_dir / "pink").unlink()


def test_priority_is_for_keys_that_may_set_it(server):
    assert_error(ask(server, "red", priority=3), 403, "priority", param="priority")
    assert ask(server, "blue", priority=3).status_code == 200


def test_tenants_share_no_prefix_cache_and_each_has_its_own(server):
    prompt = "Sphinx of black quartz, judge my vow. " * 8

    def cached(name, **fields):
        answer = ask(server, name, prompt=prompt, **fields).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("red") == 0
    assert cached("red") > 0
    assert cached("blue") == cached("blue", cache_salt="3:red:") == cached("red", cache_salt="x") == 0
    assert cached("red", cache_salt="x") > 0 and cached("blue") > 0


def test_limits_hold_for_one_key_and_are_said_in_headers(server, reload):
    reload(file_text(red={"requests_per_minute": 2}))
    first, second, third = (ask(server, "red") for _ in range(3))
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.status_code == second.status_code == 200
    assert assert_error(third, 429, "'red'", "requests_per_minute 2")["code"] == "rate_limit_exceeded"
    assert 1 <= int(third.headers["Retry-After"]) <= 30 and third.headers["x-should-retry"] == "true"
    assert ask(server, "blue").status_code == 200 and "x-ratelimit-limit-requests" not in ask(server, "blue").headers


def test_tokens_are_charged_as_usage_says_whole_streamed_or_left(server, reload):
    reload(file_text(red={"tokens_per_minute": 20_000}))

    def charged(*answers) -> float:
        """Tokens beyond those of `answers`; what was reserved is back."""
        counted = sum(answer.json()["usage"]["total_tokens"] for answer in answers)
        server.wait_baseline()
        left = int(server.post("/tokenize", {"prompt": "a"}, **auth("red")).headers["x-ratelimit-remaining-tokens"])
        total = server.metrics()['key_tokens_total{key="red"}']
        assert left >= 20_000 - total
        return total - counted

    before = charged()
    assert charged(ask(server, "red", n=2), ask(server, "red", prompt=["a b", "c"])) == before
    body = {"prompt": "The quick", "n": 4, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    before = charged()
    with requests.post(server.url + COMPLETIONS, json=body, stream=True, timeout=60, **auth("red")) as response:
        assert int(response.headers["x-ratelimit-remaining-tokens"]) < 20_000 - 3 * 4000  # some came back
        next(response.iter_lines())
    assert 2 < charged() - before < 4 * 4000
    before = charged()
    assert ask(server, "red", response_format={"type": "regex"}).status_code == 400
    assert charged() == before


def test_a_request_over_the_tokens_is_refused_before_it_runs(server, reload):
    reload(file_text(red={"tokens_per_minute": 60}))
    assert ask(server, "red", max_tokens=50).status_code == 200
    refused = ask(server, "red", max_tokens=50)
    assert assert_error(refused, 429, "tokens_per_minute 60")["type"] == "tokens"
    streamed = ask(server, "red", max_tokens=50, stream=True)
    assert streamed.status_code == 429 and streamed.headers["Content-Type"].startswith("application/json")


def test_requests_at_a_time_are_counted_from_before_their_bodies_are_read(server, reload):
    reload(file_text(red={"max_concurrent": 1}))
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEYS['red']}\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as slow:
        slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n".encode())
        wait_until(lambda: ask(server, "red").status_code == 429)
        assert_error(ask(server, "red"), 429, "max_concurrent is 1")
    wait_until(lambda: ask(server, "red").status_code == 200)


def test_keys_change_hands_while_a_request_runs_and_a_broken_file_keeps_the_old_ones(server, reload):
    body = {"prompt": "The quick", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with requests.post(server.url + COMPLETIONS, json=body, stream=True, timeout=60, **auth("red")) as response:
        lines = response.iter_lines()
        next(lines)
        reload(entry_text("blue", KEYS["blue"], {}) + entry_text("scraper", KEYS["scraper"], {"scopes": ["metrics"]}))
        assert requests.get(server.url + "/v1/models", timeout=60, **auth("red")).status_code == 401
        assert [line for line in lines if line][-1] == b"data: [DONE]"
    reload("blue: {", "the keys stay as they are")
    assert ask(server, "blue").status_code == 200 and ask(server, "red").status_code == 401


def test_metrics_name_keys(server):
    ask(server, "red")
    assert server.metrics()['key_requests_total{key="red",status="200"}'] > 0
