"""GET /v1/stats of a real server: what it counts, and that its stream goes on."""

from __future__ import annotations

import json
from itertools import pairwise

import api_contract
import requests
from server_fixture import assert_error
from waiting import wait_until

STATS = "/v1/stats"


def events(response):
    for line in response.iter_lines():
        if line:
            assert line.startswith(b"data: ")
            event = json.loads(line[6:])
            api_contract.check_event(STATS, event, "GET")
            yield event


def test_counters_grow_by_what_was_done(server):
    before = server.counts(STATS).json()
    choice = server.complete(prompt=list(range(3, 40)), model="alpha", max_tokens=12)
    assert choice["finish_reason"] == "length"
    after = server.counts(STATS).json()
    tokens = {name: after["tokens"][name] - before["tokens"][name] for name in after["tokens"]}
    assert tokens["generated"] == 12 and tokens["prompt"] == 37
    assert after["requests"]["finished"]["length"] == before["requests"]["finished"]["length"] + 1
    assert after["requests"]["max_running"] == 64 and after["requests"]["running"] == 0
    by_model = {entry["model"]: entry for entry in after["speculation"]["by_adapter"]}
    assert by_model["alpha"]["generated"] >= 12 and by_model["alpha"]["running"] == 0
    assert after["adapters"]["host"]["num"] >= 1 and after["adapters"]["host"]["bytes"] > 0
    assert after["kv"]["blocks"] == after["kv"]["free_blocks"] and after["kv"]["used_ratio"] == 0
    steps, was = after["steps"], before["steps"]
    assert steps["num"] > was["num"] and steps["seconds"] > was["seconds"]
    assert steps["no_draft_tokens"] > was["no_draft_tokens"]
    latest = steps["recent"][-1]
    assert latest["tokens"] >= 1 and latest["num_sequences"] == 1 and latest["seconds"] > 0
    assert sum(step["tokens"] for step in steps["recent"]) >= 12
    assert [step["ago_s"] for step in steps["recent"]] == sorted((s["ago_s"] for s in steps["recent"]), reverse=True)
    table = after["cost_table"]
    assert len(table["rows"]) == len(table["seconds"]) > 4
    assert all(low <= high for low, high in pairwise(table["seconds"]))
    assert after["engine"] == after["engine"] | {"status": "running", "device": "cpu", "num_restarts": 0}
    assert after["engine"]["kernels"] and 0 < after["engine"]["uptime_s"] < after["uptime_s"]


def test_a_request_that_is_given_up_counts_as_aborted(server):
    before = after = server.counts(STATS).json()["requests"]["finished"]["abort"]
    body = {"prompt": "The quick", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 3}
    body["speculation"] = {"mode": "off"}
    for _ in range(10):
        with requests.post(server.url + "/v1/completions", json=body, stream=True, timeout=60) as response:
            next(response.iter_lines())
            with server.paused():  # so that it does not end by itself, as it may while this process has no core
                response.close()
                wait_until(lambda: not server.num_in_flight())
        server.wait_baseline()
        after = server.counts(STATS).json()["requests"]["finished"]["abort"]
        if after > before:
            break
    assert before < after <= before + 3


def test_a_stream_tells_of_itself_about_once_a_second(server):
    with server.get(STATS + "?stream=true", stream=True) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        told = events(response)
        first = next(told)
        assert server.num_in_flight() == 0  # who looks is no work
        server.complete(max_tokens=12)
        times, generated = [first["time_s"]], 0
        while len(set(times)) < 4:  # snapshots; a machine that is busy elsewhere has one told twice
            latest = next(told)
            times.append(latest["time_s"])
            generated = latest["tokens"]["generated"] - first["tokens"]["generated"]
    assert times == sorted(times) and generated >= 12


def test_a_wrong_parameter_is_refused_by_name(server):
    assert_error(server.get(STATS + "?stream=yes"), 400, "'yes'", param="stream")
    assert_error(server.get(STATS + "?streams=true"), 400, "unknown field 'streams'")
    assert server.get(STATS + "?stream=false").json()["engine"]["status"] == "running"
    head = requests.head(server.url + STATS + "?stream=true", timeout=10)
    assert head.status_code == 200 and not head.content
