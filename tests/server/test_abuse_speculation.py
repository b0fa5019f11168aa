"""Drafts must not show: text, log-probabilities, usage and finish reason are those of a server that never drafts.

One prompt that repeats itself, so that much of every draft is right, and every way to end within an accepted run.
"""

import itertools
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from golden import Golden
from server_fixture import assert_error

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "one two three four, one two three four, one two three four, one two"
MODES = [{"mode": "off"}, {"mode": "auto"}, {"mode": "fixed", "max_draft_tokens": 6}]


@pytest.fixture(scope="module")
def baseline(server):
    return Golden(server, ("tiny", "alpha"))


@pytest.fixture(autouse=True)
def golden(baseline):
    yield baseline
    baseline.check()


def answer(server, **fields):
    """Choices, counts, and how many tokens of a prediction were accepted."""
    reply = server.post(TEXT, {"prompt": PROMPT, "max_tokens": 32, "temperature": 0, "logprobs": 2, **fields})
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    return (reply.json()["choices"], *counts), usage["completion_tokens_details"]["accepted_prediction_tokens"]


def assert_equal(server, prediction=None, **fields):
    """The answer, with drafts off, on, and with a prediction: by default of what it is going to be."""
    plain, _ = answer(server, **fields, speculation=MODES[0])
    for speculation in MODES[1:]:
        assert _rounded(answer(server, **fields, speculation=speculation)[0]) == _rounded(plain), fields
    content = prediction or plain[0][0]["text"]
    predicted, num_accepted = answer(
        server, **fields, prediction={"type": "content", "content": content}, speculation=MODES[2]
    )
    assert _rounded(predicted) == _rounded(plain), fields
    return *plain, num_accepted


def _rounded(value):
    """Log-probabilities to a digit that the number of rows of a step does not move."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


SAMPLING = [
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.5},
    {"frequency_penalty": 1.2, "temperature": 0.8, "seed": 1},
    {"frequency_penalty": -1.2},
    {"repetition_penalty": 1.3},
    {"min_p": 0.2, "temperature": 1.2, "seed": 2},
    {"top_k": 3, "temperature": 1.0, "seed": 3},
    {"top_p": 0.5, "temperature": 1.0, "seed": 4},
    {"logit_bias": {"40": 5, "41": -100}},
    {"stop_token_ids": [40, 41, 42, 43]},
    {"n": 3, "temperature": 1.0, "seed": 5},
    {"n": 2, "best_of": 4, "temperature": 1.0, "seed": 6},
    {"min_tokens": 8, "stop": ["e"]},
    {"model": "alpha", "temperature": 0.7, "seed": 7, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("fields", SAMPLING, ids=lambda fields: next(iter(fields)))
def test_sampling_is_the_same_with_and_without_drafts(server, fields):
    choices, _, num_tokens, _ = assert_equal(server, **fields)
    assert num_tokens > 0 and all(choice["logprobs"]["tokens"] for choice in choices)


def test_every_end_within_an_accepted_run_cuts_there(server):
    """max_tokens, a stop string and a stop id at each of the first twelve places."""
    ids = server.post("/tokenize", {"prompt": PROMPT, "add_special_tokens": False}).json()["tokens"]
    body = {"ignore_eos": True, "logit_bias": {str(token): 60 for token in set(ids)}}  # the prompt's words
    (whole,), _, _, num_accepted = assert_equal(server, **body, max_tokens=12)
    assert num_accepted > 4, "no run to end within"
    prediction = whole["text"]
    ids = server.post("/tokenize", {"prompt": PROMPT + whole["text"], "add_special_tokens": False}).json()["tokens"]
    tokens = whole["logprobs"]["tokens"]
    for num in range(1, 13):
        (choice,), _, num_tokens, _ = assert_equal(server, prediction, **body, max_tokens=num)
        assert num_tokens == num and choice["finish_reason"] == "length"
        assert choice["logprobs"]["tokens"] == tokens[:num]
    text = whole["text"]
    stops = {text[at : at + size] for at in range(1, len(text)) for size in (1, 3)}
    stops = sorted(stop for stop in stops if stop and "\ufffd" not in stop)
    assert len(stops) > 8
    for stop in stops:
        (choice,), _, num_tokens, _ = assert_equal(server, prediction, **body, stop=[stop], max_tokens=12)
        assert choice["finish_reason"] == "stop" and choice["text"] == text[: text.index(stop)]
        assert num_tokens <= 12 and len(choice["logprobs"]["tokens"]) <= num_tokens
    for stop_id in set(ids[-12:]):
        (choice,), _, num_tokens, _ = assert_equal(server, prediction, **body, stop_token_ids=[stop_id], max_tokens=12)
        assert len(choice["logprobs"]["tokens"]) == num_tokens


def test_usage_is_what_was_delivered_streamed_and_not(server):
    for fields, speculation in itertools.product(({}, {"stop": ["o"]}, {"max_tokens": 7}), MODES):
        body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0, "ignore_eos": True, "logprobs": 0, **fields}
        body |= {"speculation": speculation}
        whole = server.post(TEXT, body).json()
        events = server.stream(TEXT, {**body, "stream_options": {"include_usage": True}})
        usage = next(event["usage"] for event in events if event.get("usage"))
        assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]
        logprobs = [lp for e in events for c in e["choices"] for lp in (c["logprobs"] or {}).get("token_logprobs", [])]
        assert "".join(c["text"] for e in events for c in e["choices"]) == whole["choices"][0]["text"]
        assert _rounded(logprobs) == _rounded(whole["choices"][0]["logprobs"]["token_logprobs"])
        assert len(logprobs) == usage["completion_tokens"] or "stop" in fields
        assert all(lp < 0 for lp in logprobs)


def test_predictions_right_wrong_empty_and_long_change_no_text(server):
    messages = [{"role": "user", "content": PROMPT}]
    body = {"messages": messages, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    want = server.post(CHAT, body).json()["choices"]
    text = want[0]["message"]["content"]
    for content in (text, text[5:], "wrong " * 20, "", " ", "x" * 300, "The quick " * 30):
        reply = server.post(CHAT, {**body, "prediction": {"type": "content", "content": content}})
        assert reply.status_code == 200 and reply.json()["choices"] == want, content
    reply = server.post(CHAT, {**body, "prediction": {"type": "content", "content": "a b " * 25_000}})
    assert_error(reply, 400, "context", param="prediction")


def test_requests_that_are_dropped_at_random_moments_leave_nothing(server):
    rng = random.Random(0)
    for _ in range(60):
        body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 1, "ignore_eos": True, "n": rng.randrange(1, 4)}
        body |= {"speculation": rng.choice(MODES), "model": rng.choice(["tiny", "alpha"]), "stream": True}
        with requests.post(server.url + TEXT, json=body, stream=True, timeout=60) as reply:
            lines = reply.iter_lines()
            for _ in range(rng.randrange(12)):
                next(lines, None)
            time.sleep(rng.uniform(0, 0.01))
    server.wait_baseline()


def test_many_schemas_at_once_are_each_obeyed_and_impossible_ones_are_refused(server):
    """Sixteen, some of them refused; the forced text of each is its own."""

    def ask(n):
        properties = {"id": {"const": f"number {n}"}} if n % 4 else {"id": {"not": {}}}
        schema = {"type": "object", "properties": properties, "required": ["id"], "additionalProperties": False}
        body = {"prompt": "```json", "max_tokens": 40, "temperature": n % 2, "guided_json": schema}
        return server.post(TEXT, {**body, "speculation": MODES[n % 3]})

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(ask, range(16)))
    for n, reply in enumerate(replies):
        if n % 4:
            (choice,) = reply.json()["choices"]
            assert choice["text"].replace(" ", "") == f'{{"id":"number{n}"}}' and choice["finish_reason"] == "stop"
        else:
            assert reply.status_code == 400 and "not" in reply.json()["error"]["message"]
