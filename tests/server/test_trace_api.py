"""`speculation.trace` over HTTP: whole and streamed, beside all that shapes an answer, and what it is refused for."""

from __future__ import annotations

import msgspec
import pytest
import requests
from server_fixture import assert_error
from traces import check_trace

from specserve.messages import TARGET, TokenTrace, Usage

TEXT, CHAT, LORAX = "/v1/completions", "/v1/chat/completions", "/generate"
FIXED = {"mode": "fixed", "max_draft_tokens": 6}
PROMPT = "one two three four, one two three four, one two three four, one two"
MESSAGES = [{"role": "user", "content": PROMPT}]
BODIES = {
    "greedy": {"temperature": 0},
    "adapter": {"model": "alpha", "temperature": 0.8},
    "choices": {"n": 3, "temperature": 1.3},
    "best": {"n": 2, "best_of": 4, "temperature": 1.3},
    "stop": {"stop": ["e", "\n", " the"], "temperature": 1.2, "n": 4},
    "kept stop": {"stop": ["e", "\n"], "include_stop_str_in_output": True, "temperature": 1.2},
    "logprobs": {"logprobs": 2, "temperature": 0.7},
    "short": {"max_tokens": 7, "temperature": 0},
    "ends": {"ignore_eos": False, "temperature": 1.5, "n": 8},
    "prediction": {"prediction": {"type": "content", "content": PROMPT}, "temperature": 0.9},
    "grammar": {"structured_outputs": {"regex": r"(yes|no), because [a-z ]{3,9}\."}, "ignore_eos": False},
    "prompts": {"prompt": [PROMPT, "The quick", [5, 6, 7] * 5], "temperature": 0, "n": 2},
    "echo": {"echo": True, "temperature": 0},
    "no drafts": {"speculation": {"mode": "off"}, "temperature": 0.9},
}
CHATS = ("greedy", "stop", "grammar", "logprobs", "ends")


def body_of(path: str, name: str, trace: bool) -> dict:
    fields = {"max_tokens": 40, "seed": 5, "ignore_eos": True, "return_speculation_stats": True, **BODIES[name]}
    fields["speculation"] = {**fields.get("speculation", FIXED), "trace": trace}
    if path == TEXT:
        return {"prompt": PROMPT, **fields}
    if "logprobs" in fields:
        fields["logprobs"] = True
    return {"messages": MESSAGES, **fields}


def entries(trace: list) -> list[TokenTrace]:
    return msgspec.convert(trace, list[TokenTrace])


def text_of(choice: dict) -> str:
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize(("path", "name"), [*((TEXT, name) for name in BODIES), *((CHAT, name) for name in CHATS)])
def test_whole_and_streamed_answers_tell_the_same_of_every_token(server, path, name):
    plain = server.post(path, body_of(path, name, trace=False)).json()
    whole = server.post(path, body_of(path, name, trace=True)).json()
    traces = [entries(choice.pop("trace")) for choice in whole["choices"]]
    assert whole["choices"] == plain["choices"]  # neither tokens nor anything else depends on it
    num_prompt = len(PROMPT) if name == "echo" else 0
    for choice, trace in zip(whole["choices"], traces, strict=True):
        check_trace(trace, [entry.token_id for entry in trace], text_of(choice)[num_prompt:], None)
    stats, usage = whole["usage"]["speculation"], whole["usage"]
    if name != "best":
        assert sum(map(len, traces)) == usage["completion_tokens"]
        assert sum(trace[-1].forward + 1 for trace in traces) == stats["num_forwards"]
        sources = [entry.source for trace in traces for entry in trace]
        assert {s: sources.count(s) for s in sources if s != TARGET} == stats["accepted_by_source"]
        assert bool(stats["draft_tokens"]) == (name != "no drafts") or path == CHAT
    if len(traces) == 1:
        counts = (usage["prompt_tokens"], usage["completion_tokens"], 0, stats["num_forwards"], stats["draft_tokens"])
        told = Usage(*counts, stats["accepted_draft_tokens"], 0, 0, stats["accepted_by_source"])
        check_trace(traces[0], [entry.token_id for entry in traces[0]], text_of(whole["choices"][0])[num_prompt:], told)
    if name == "best":  # cannot be streamed
        return
    streamed = [[] for _ in traces]
    texts = [""] * len(traces)
    for event in server.stream(path, body_of(path, name, trace=True)):
        for choice in event["choices"]:
            idx = choice["index"]
            streamed[idx] += choice.get("trace", [])
            texts[idx] += (choice["text"] if "text" in choice else choice["delta"].get("content")) or ""
            assert path == CHAT or texts[idx][num_prompt:].startswith("".join(e["text"] for e in streamed[idx]))
    for trace, other, choice, text in zip(traces, streamed, whole["choices"], texts, strict=True):
        assert text == text_of(choice)
        assert [(entry.token_id, entry.text) for entry in entries(other)] == [(e.token_id, e.text) for e in trace]


def test_without_a_trace_there_is_no_such_field(server):
    for path in (TEXT, CHAT):
        assert "trace" not in server.post(path, body_of(path, "greedy", trace=False)).json()["choices"][0]
        events = server.stream(path, body_of(path, "greedy", trace=False))
        assert not any("trace" in choice for event in events for choice in event["choices"])


def test_nothing_behind_a_stop_string_is_told(server):
    whole = server.complete(PROMPT, max_tokens=40, speculation={**FIXED, "trace": True})
    stop = whole["text"][9:12]
    for num in range(6):
        speculation = {"mode": "fixed", "max_draft_tokens": 2 + num, "trace": True}
        cut = server.complete(PROMPT, max_tokens=40, stop=[stop], speculation=speculation)
        trace = entries(cut["trace"])
        assert "".join(entry.text for entry in trace) == cut["text"] and cut["stop_reason"] == stop
        shown = [entry for entry in trace if entry.text]
        assert all(not entry.rejected for entry in trace[len(shown) :])


def test_a_trace_of_more_outputs_than_allowed_is_refused(server):
    body = body_of(TEXT, "greedy", trace=True)
    assert server.post(TEXT, {**body, "n": 16, "max_tokens": 2}).status_code == 200
    reply = server.post(TEXT, {**body, "prompt": [PROMPT] * 9, "n": 2})
    assert_error(reply, 400, "16 outputs", "18", param="speculation.trace")
    assert_error(server.post(TEXT, {**body, "best_of": 17}), 400, "17", param="speculation.trace")


def test_lorax_routes_refuse_a_trace_by_name(server):
    for path in (LORAX, "/generate_stream"):
        reply = server.post(path, {"inputs": "x", "parameters": {"speculation": {"trace": True}}})
        assert reply.status_code == 422 and "speculation.trace" in reply.json()["error"], reply.text
    assert server.post(LORAX, {"inputs": "x", "parameters": {"speculation": {"trace": False}}}).status_code == 200


def test_a_client_that_leaves_a_traced_stream_frees_it(server):
    reply = server.post(TEXT, {**body_of(TEXT, "greedy", trace=True), "max_tokens": 400, "stream": True}, stream=True)
    lines = reply.iter_lines()
    assert b'"trace"' in next(line for line in lines if line)
    reply.close()
    server.wait_baseline()


def test_the_field_is_of_the_named_type(server):
    for value in (1, "yes", [True]):
        reply = requests.post(server.url + TEXT, json={"prompt": "x", "speculation": {"trace": value}}, timeout=60)
        assert_error(reply, 400, "trace")
