"""LoRAX's routes on a tiny model: the shapes of answers, streams, headers and errors, and what the parameters mean."""

import json
import re

import pytest
import requests
from api_contract import check_event

INPUTS = "The quick brown"
GREEDY = {"max_new_tokens": 12, "ignore_eos_token": True}
HEADERS = (
    "compute-type compute-time compute-characters total-time prompt-tokens generated-tokens skipped-tokens "
    "total-tokens validation-time queue-time inference-time time-per-token time-to-first-token time-per-output-token"
).split()


def ask(server, path="/generate", inputs=INPUTS, status=200, stream=None, **parameters):
    body = {"inputs": inputs, "parameters": parameters} | ({} if stream is None else {"stream": stream})
    response = server.post(path, body)
    assert response.status_code == status, response.text
    return response


def events(server, path="/generate_stream", stream=None, **parameters):
    body = {"inputs": INPUTS, "parameters": parameters} | ({} if stream is None else {"stream": stream})
    response = server.post(path, body, stream=True)
    assert response.status_code == 200, response.text
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith(b"data:{") for line in lines)  # no space, and no [DONE] at the end
    found = [json.loads(line[5:]) for line in lines]
    for event in found:
        check_event(path, event)
    return found


def assert_lorax_error(response, status, error_type, *words):
    assert response.status_code == status, f"{response.status_code}: {response.text[:500]}"
    body = response.json()
    assert set(body) == {"error", "error_type"} and body["error_type"] == error_type
    for word in words:
        assert word in body["error"]


@pytest.mark.parametrize("adapter", [None, "alpha"])
def test_generate_is_the_greedy_completion_of_v1(server, adapter):
    want = server.complete(INPUTS, model=adapter or "tiny")["text"]
    response = ask(server, **GREEDY, adapter_id=adapter)
    assert response.json() == {"generated_text": want}
    assert ask(server, "/", **GREEDY, adapter_id=adapter).json() == [{"generated_text": want}]
    assert ask(server, **GREEDY, adapter_id=adapter, adapter_source="local").json()["generated_text"] == want
    assert ask(server, **GREEDY, adapter_id=adapter, return_full_text=True).json()["generated_text"] == INPUTS + want
    headers = response.headers
    for name in HEADERS:
        assert f"x-{name}" in headers, name
    assert headers["x-model-id"] == "tiny" and headers["x-generated-tokens"] == "12"
    assert headers["x-compute-type"] == "cpu" and headers["x-compute-characters"] == str(len(INPUTS))
    assert int(headers["x-total-tokens"]) == int(headers["x-prompt-tokens"]) + 12
    parts = ("x-validation-time", "x-queue-time", "x-inference-time")
    assert sum(int(headers[name]) for name in parts) <= int(headers["x-total-time"])
    assert headers.get("x-adapter-id") == adapter
    assert headers.get("x-adapter-source") == (adapter and "local")


def test_details_name_every_token_with_its_logprob_and_alternatives(server):
    body = ask(server, **GREEDY, details=True, return_k_alternatives=2).json()
    details, tokens = body["details"], body["details"]["tokens"]
    assert details["finish_reason"] == "length" and details["generated_tokens"] == len(tokens) == 12
    assert details["seed"] is None and details["prefill"] == [] and "best_of_sequences" not in details
    assert "".join(token["text"] for token in tokens) == body["generated_text"]
    assert details["skipped_tokens"] == sum(token["skipped"] for token in tokens)
    scored = server.complete(INPUTS, logprobs=2)["logprobs"]
    assert [token["logprob"] for token in tokens] == scored["token_logprobs"]
    for token in tokens:
        assert len(token["alternative_tokens"]) == 2 and token["alternative_tokens"][0]["id"] == token["id"]
    plain = ask(server, **GREEDY, details=True).json()["details"]["tokens"]
    assert all("alternative_tokens" not in token for token in plain)


def test_skipped_tokens_are_those_that_a_draft_brought(server):
    want = ask(server, **GREEDY, details=True, speculation={"mode": "off"}).json()
    assert want["details"]["skipped_tokens"] == 0
    repeated = "one two three four, one two three four, one two three four, one two"
    body = {"max_new_tokens": 40, "ignore_eos_token": True, "details": True}
    drafted = ask(server, inputs=repeated, **body, speculation={"mode": "fixed", "max_draft_tokens": 6})
    plain = ask(server, inputs=repeated, **body, speculation={"mode": "off"}).json()
    assert drafted.json()["generated_text"] == plain["generated_text"]
    stats = {"prompt": repeated, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    stats |= {"speculation": {"mode": "fixed", "max_draft_tokens": 6}, "return_speculation_stats": True}
    usage = server.post("/v1/completions", stats).json()["usage"]
    skipped = drafted.json()["details"]["skipped_tokens"]
    assert skipped == usage["completion_tokens"] - usage["speculation"]["num_forwards"]
    assert drafted.headers["x-skipped-tokens"] == str(skipped)


def test_prefill_scores_the_prompt(server):
    details = ask(server, **GREEDY, decoder_input_details=True).json()["details"]
    scored = server.complete(INPUTS, logprobs=0, echo=True)["logprobs"]
    num = details["prompt_tokens"]
    assert [token["logprob"] for token in details["prefill"]] == scored["token_logprobs"][:num]
    assert details["prefill"][0]["logprob"] is None
    assert "".join(token["text"] for token in details["prefill"]) == INPUTS


def test_stream_has_an_event_for_each_token_and_the_whole_text_on_the_last(server):
    want = ask(server, **GREEDY, details=True).json()
    for path, stream in (("/generate_stream", None), ("/", True)):
        got = events(server, path, stream, **GREEDY, details=True)
        assert [event["token"]["id"] for event in got] == [token["id"] for token in want["details"]["tokens"]]
        assert "".join(event["token"]["text"] for event in got) == want["generated_text"]
        assert all(event["generated_text"] is None and event["details"] is None for event in got[:-1])
        assert got[-1]["generated_text"] == want["generated_text"]
        details = {"finish_reason": "length", "prompt_tokens": want["details"]["prompt_tokens"]}
        assert got[-1]["details"] == {**details, "generated_tokens": 12, "seed": None}
    assert events(server, **GREEDY)[-1]["details"] is None
    reply = server.post("/generate_stream", {"inputs": INPUTS, "parameters": {**GREEDY, "adapter_id": "alpha"}})
    assert reply.headers["x-adapter-id"] == "alpha" and reply.headers["Content-Type"].startswith("text/event-stream")


def test_finish_reasons_and_stop_strings_stay_in_the_text(server):
    text = ask(server, **GREEDY).json()["generated_text"]
    stop = text[4:7]
    stopped = ask(server, **GREEDY, stop=[stop], details=True).json()
    assert stopped["generated_text"] == text[: text.index(stop) + len(stop)]
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert events(server, **GREEDY, stop=[stop], details=True)[-1]["generated_text"] == stopped["generated_text"]
    eos = server.post("/tokenize", {"prompt": "<|im_end|>", "add_special_tokens": False}).json()["tokens"][0]
    for seed in range(40):  # hot sampling ends with the end-of-sequence token sooner or later
        ended = ask(server, max_new_tokens=400, temperature=2.0, seed=seed, details=True).json()
        if ended["details"]["finish_reason"] == "eos_token":
            break
    assert ended["details"]["tokens"][-1]["id"] == eos and ended["details"]["tokens"][-1]["special"]
    texts = [token["text"] for token in ended["details"]["tokens"] if not token["special"]]
    assert "".join(texts) == ended["generated_text"]


def test_sampling_is_off_unless_asked_for_and_seeds_are_reported(server):
    greedy = ask(server, **GREEDY).json()["generated_text"]
    for parameters in ({"temperature": 1.0}, {"temperature": 0, "do_sample": True}, {"top_p": 1.0}):
        body = ask(server, **GREEDY, **parameters, details=True).json()
        assert body["generated_text"] == greedy and body["details"]["seed"] is None
    for seed in (7, 2**63, 2**64 - 1):
        sampled = [ask(server, **GREEDY, do_sample=True, seed=seed, details=True).json() for _ in range(2)]
        assert sampled[0] == sampled[1] and sampled[0]["details"]["seed"] == seed
    want = server.complete(INPUTS, temperature=1.3, top_k=50, seed=7)["text"]
    assert ask(server, **GREEDY, temperature=1.3, top_k=50, seed=7).json()["generated_text"] == want
    drawn = ask(server, **GREEDY, do_sample=True, details=True).json()
    again = ask(server, **GREEDY, do_sample=True, details=True, seed=drawn["details"]["seed"]).json()
    assert again["generated_text"] == drawn["generated_text"]


def test_best_of_answers_the_likeliest_and_details_hold_the_others(server):
    body = ask(server, **GREEDY, do_sample=True, seed=4, best_of=4, details=True).json()
    others = body["details"]["best_of_sequences"]
    assert len(others) == 3

    def mean(tokens):
        return sum(token["logprob"] for token in tokens) / len(tokens)

    assert all(mean(body["details"]["tokens"]) >= mean(other["tokens"]) for other in others)
    assert len({body["generated_text"], *(other["generated_text"] for other in others)}) == 4
    assert ask(server, **GREEDY, do_sample=True, seed=4, best_of=4).json() == {"generated_text": body["generated_text"]}


def test_truncate_keeps_the_end_and_apply_chat_template_wraps_the_inputs(server):
    ids = server.post("/tokenize", {"prompt": INPUTS}).json()["tokens"]
    cut = ask(server, **GREEDY, truncate=2, details=True).json()
    assert cut["details"]["prompt_tokens"] == 2
    assert cut["generated_text"] == server.complete(ids[-2:])["text"]
    messages = [{"role": "user", "content": INPUTS}]
    chat = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert ask(server, **GREEDY, apply_chat_template=True).json()["generated_text"] == server.complete(chat)["text"]


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "level": {"enum": ["low", "high"]}},
    "required": ["ok", "level"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "parameters",
    [
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"schema": SCHEMA},
        {"schema": json.dumps(SCHEMA)},
        {"grammar": {"type": "json", "value": SCHEMA}},
    ],
    ids=lambda value: f"{next(iter(value))} {type(next(iter(value.values()))).__name__}",
)
def test_every_form_of_a_schema_holds_the_text_to_it_and_its_stream_has_the_same_tokens(server, parameters):
    body = ask(server, max_new_tokens=60, details=True, **parameters).json()
    value = json.loads(body["generated_text"])
    assert isinstance(value["ok"], bool) and value["level"] in ("low", "high")
    assert body["details"]["finish_reason"] == "eos_token"
    got = events(server, max_new_tokens=60, **parameters)
    assert "".join(event["token"]["text"] for event in got if not event["token"]["special"]) == body["generated_text"]
    assert got[-1]["generated_text"] == body["generated_text"]


def test_regex_grammar_and_a_bad_grammar(server):
    text = ask(server, max_new_tokens=20, grammar={"type": "regex", "value": "[0-9]{3}-(on|off)"}).json()
    assert re.fullmatch("[0-9]{3}-(on|off)", text["generated_text"])
    for parameters in ({"schema": {"type": "wrong"}}, {"grammar": {"type": "regex", "value": "("}}, {"schema": 5}):
        reply = server.post("/generate", {"inputs": "x", "parameters": parameters})
        assert_lorax_error(reply, 422, "validation")


def test_default_length_is_the_room_in_the_context(server):
    response = ask(server, ignore_eos_token=True)
    assert response.headers["x-total-tokens"] == "512"


def test_info_and_tokenize(server):
    info = server.get("/info").json()
    assert info["model_id"] == "tiny" and info["max_total_tokens"] == 512 and info["model_dtype"] == "torch.float32"
    tokens = server.post("/tokenize", {"inputs": "The quick"}).json()
    assert [token["id"] for token in tokens] == server.post("/tokenize", {"prompt": "The quick"}).json()["tokens"]
    assert "".join("The quick"[token["start"] : token["stop"]] for token in tokens) == "The quick"
    assert set(tokens[0]) == {"id", "text", "start", "stop"}


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"merged_adapters": {"ids": ["a", "b"], "weights": [0.5, 0.5], "density": 0.5}}, "merged_adapters"),
        ({"typical_p": 0.9}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"top_n_tokens": 3}, "top_n_tokens"),
        ({"adapter_id": "alpha", "adapter_source": "hub"}, "adapter_source"),
        ({"adapter_id": "../alpha"}, "valid name"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 10**6}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5, "do_sample": True}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 10**9}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"return_k_alternatives": 0}, "return_k_alternatives"),
        ({"return_k_alternatives": 21}, "return_k_alternatives"),
        ({"truncate": 0}, "truncate"),
        ({"stop": ["x"] * 500}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"schema": {"type": "object"}, "response_format": {"type": "json_object"}}, "one grammar"),
        ({"made_up": 1}, "made_up"),
        ({"max_new_tokens": "3"}, "max_new_tokens"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_parameter_that_is_not_served_is_a_validation_error_that_names_it(server, path, parameters, word):
    golden = server.complete()["text"]
    assert_lorax_error(server.post(path, {"inputs": "x", "parameters": parameters}), 422, "validation", word)
    assert server.complete()["text"] == golden


def test_other_errors_have_loraxs_names(server):
    for body in ({}, {"inputs": ""}, {"inputs": 5}, {"inputs": ["a"]}, {"inputs": "x", "more": 1}, []):
        assert_lorax_error(server.post("/generate", body), 422, "validation")
    assert_lorax_error(server.post("/generate", {"inputs": "word " * 2000}), 422, "validation", "512")
    unknown = {"inputs": "x", "parameters": {"adapter_id": "some/adapter"}}
    assert_lorax_error(server.post("/generate", unknown), 404, "generation", "some/adapter")
    stream = {"inputs": "x", "parameters": {"best_of": 2, "do_sample": True}}
    assert_lorax_error(server.post("/generate_stream", stream), 422, "validation", "best_of")
    prefill = {"inputs": "x", "stream": True, "parameters": {"decoder_input_details": True}}
    assert_lorax_error(server.post("/", prefill), 422, "validation", "decoder_input_details")
    assert_lorax_error(server.post("/generate", {"inputs": "x", "stream": True}), 422, "validation", "generate_stream")
    assert_lorax_error(server.post("/tokenize", {"inputs": 5}), 422, "validation", "inputs")
    headers = {"Content-Type": "application/json"}
    for broken in (b'{"inputs": ', b'{"inputs": "a", "inputs": "b"}', b'{"inputs": NaN}', b"\xef\xbb\xbf{}"):
        reply = requests.post(server.url + "/generate", data=broken, headers=headers, timeout=60)
        assert_lorax_error(reply, 422, "validation")
    assert_lorax_error(requests.post(server.url + "/generate", data=b"x", timeout=60), 415, "validation")
    assert_lorax_error(requests.get(server.url + "/generate_stream", timeout=60), 405, "validation")
