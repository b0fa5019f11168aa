"""model auto on the routes: who answers is said in the body, the first chunk, the header, the log and a counter."""

import shutil
import time

import openai
import pytest
from server_fixture import assert_error

from specserve.routing_profile import PROFILE_FILE, RoutingProfile, write_profile
from specserve.server.routing.profiles import LOOK_EVERY_S

FOX = "Count the foxes in this sentence: "
NAME = "fox-counter"


@pytest.fixture(scope="module")
def server(open_server, open_dir):
    shutil.copytree(open_dir / "good", open_dir / NAME)
    write_profile(open_dir / NAME, RoutingProfile(tuple(f"{FOX}number {idx}" for idx in range(16))))
    time.sleep(LOOK_EVERY_S)
    yield open_server
    open_server.post("/v1/unload_lora_adapter", {"lora_name": NAME})
    shutil.rmtree(open_dir / NAME)


def chat(text, **fields):
    messages = [{"role": "user", "content": text}]
    return {"model": "auto", "messages": messages, "max_tokens": 4, "temperature": 0, **fields}


def test_a_chat_finds_its_adapter_and_says_so(server):
    since, name = len(server.log), f'routed_requests_total{{model="{NAME}"}}'
    before = server.metrics().get(name, 0)
    reply = server.post("/v1/chat/completions", chat(FOX + "number 99"))
    body = reply.json()
    assert reply.status_code == 200 and reply.headers["x-specserve-adapter"] == NAME == body["model"]
    assert body["routing"]["adapter"] == NAME and 0.5 < body["routing"]["score"] <= 1 and not body["routing"]["others"]
    named = server.post("/v1/chat/completions", chat(FOX + "number 99", model=NAME)).json()
    assert named["choices"] == body["choices"] and "routing" not in named
    assert server.metrics()[name] == before + 1
    server.wait_log(f"{body['id']}: auto is '{NAME}'", since=since)


def test_what_fits_nothing_is_the_base_model_s(server):
    base = server.get("/v1/models").json()["data"][0]["id"]
    reply = server.post("/v1/completions", {"model": "auto", "prompt": "The quick brown", "max_tokens": 4})
    body = reply.json()
    assert reply.headers["x-specserve-adapter"] == base == body["model"]
    assert body["routing"]["adapter"] is None and body["routing"]["score"] is None
    (other,) = body["routing"]["others"]
    assert other["adapter"] == NAME and other["score"] < other["threshold"]


@pytest.mark.parametrize("echo", [False, True])
def test_the_first_chunk_says_it_once(server, echo):
    body = {"model": "auto", "prompt": FOX + "number 5", "max_tokens": 4, "echo": echo}
    events = server.stream("/v1/completions", body)
    assert events[0]["routing"]["adapter"] == NAME and all("routing" not in event for event in events[1:])
    events = server.stream("/v1/chat/completions", chat(FOX + "number 5", n=2))
    assert events[0]["routing"]["adapter"] == NAME and all("routing" not in event for event in events[1:])


def test_responses_say_it_too(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="-") as client:
        raw = client.responses.with_raw_response.create(model="auto", input=FOX + "number 5", max_output_tokens=4)
        assert raw.headers["x-specserve-adapter"] == NAME
        assert raw.parse().model == NAME and raw.parse().model_extra["routing"]["adapter"] == NAME
        events = list(client.responses.create(model="auto", input=FOX, max_output_tokens=4, stream=True))
        assert events[0].response.model_extra["routing"]["adapter"] == NAME
        plain = client.responses.create(model=NAME, input=FOX, max_output_tokens=4)
        assert "routing" not in plain.model_extra


def test_a_name_that_is_taken_away_is_chosen_no_more_and_one_that_is_given_at_once(server, open_dir):
    def chosen():
        return server.post("/v1/chat/completions", chat(FOX + "number 7")).json()["routing"]["adapter"]

    assert chosen() == NAME
    assert server.post("/v1/unload_lora_adapter", {"lora_name": NAME}).status_code == 200
    assert chosen() is None
    given = {"lora_name": "given", "lora_path": str(open_dir / NAME)}
    assert server.post("/v1/load_lora_adapter", given).status_code == 200
    assert chosen() == "given"
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "given"}).status_code == 200
    given["lora_name"] = NAME
    assert server.post("/v1/load_lora_adapter", given).status_code == 200
    assert chosen() == NAME


def test_a_bad_profile_is_logged_once_and_its_adapter_can_be_named(server, open_dir):
    path = open_dir / NAME / PROFILE_FILE
    good, since = path.read_bytes(), len(server.log)
    path.write_bytes(b"{")
    time.sleep(LOOK_EVERY_S)
    try:
        for _ in range(2):
            body = server.post("/v1/chat/completions", chat(FOX + "number 7")).json()
            assert body["routing"] == {"adapter": None, "score": None, "others": []}
        server.wait_log(f"never chosen: {PROFILE_FILE} of adapter '{NAME}'", since=since)
        assert sum("never chosen" in line for line in server.log[since:]) == 1
        assert server.post("/v1/chat/completions", chat(FOX, model=NAME)).status_code == 200
    finally:
        path.write_bytes(good)
        time.sleep(LOOK_EVERY_S)


def test_a_tool_that_must_be_called_brings_its_adapter(server):
    function = {"name": "count", "parameters": {"type": "object"}, "x-adapter": NAME}
    fields = {"tools": [{"type": "function", "function": function}], "max_tokens": 24}
    choice = {"type": "function", "function": {"name": "count"}}
    body = server.post("/v1/chat/completions", chat("Hello", tool_choice=choice, **fields)).json()
    assert body["model"] == NAME and "routing" not in body
    body = server.post("/v1/chat/completions", chat("Hello", tool_choice="none", **fields)).json()
    assert body["routing"]["adapter"] is None


def test_what_cannot_be_routed_is_refused_with_the_field(server):
    body = {"model": "auto", "prompt": [1, 2, 3], "max_tokens": 4}
    assert_error(server.post("/v1/completions", body), 400, "one text", param="prompt")
    assert_error(server.post("/v1/completions", {**body, "prompt": "a", "adapter_id": NAME}), 400, "name one")
    assert_error(server.post("/v1/embeddings", {"model": "auto", "input": "a"}), 404, "auto")
