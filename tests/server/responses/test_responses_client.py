"""/v1/responses with the openai client: answers, streams, tools, formats, thoughts, and responses that are kept."""

from __future__ import annotations

import json
import shutil
import time
from typing import Literal

import openai
import pydantic
import pytest
import requests
from peft_adapters import make_peft_adapter
from response_events import check_response, read_stream, rebuilt
from server_fixture import ServerProcess, assert_error
from tiny_models import CHAT_TEMPLATE, make_tiny_model

from specserve.server.access.key_file import entry_text, new_key

KEYS = {name: new_key() for name in ("red", "blue")}
PATH = "/v1/responses"
FIELDS = {"model": "tiny", "max_output_tokens": 20, "temperature": 0.8, "extra_body": {"seed": 3}}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "level": {"enum": ["low", "high"]}},
    "required": ["ok", "level"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "name": "set_level", "description": "Set it.", "parameters": SCHEMA, "strict": True},
    {"type": "function", "name": "stop", "parameters": {**SCHEMA, "properties": {}, "required": []}},
]
NAMED = {"type": "function", "name": "stop"}
CALLED = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 300}


class Answer(pydantic.BaseModel):
    ok: bool
    level: Literal["low", "high"]


class KeyedServer(ServerProcess):
    def get(self, path, name="red", **kwargs):
        return super().get(path, headers={"Authorization": f"Bearer {KEYS[name]}"}, **kwargs)

    def post(self, path, body, name="red", **kwargs):
        return super().post(path, body, headers={"Authorization": f"Bearer {KEYS[name]}"}, **kwargs)


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    fields = {"red": {"scopes": ["generate", "metrics"]}, "blue": {"adapters": ["alpha"], "tokens_per_minute": 1000}}
    file.write_text("".join(entry_text(name, KEYS[name], fields[name]) for name in KEYS))
    return file


@pytest.fixture(scope="module")
def server(tmp_path_factory, keys_file):
    """With the adapter `alpha`, and `thinker`, whose answers begin in a thinking block."""
    model_dir = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096)
    root = tmp_path_factory.mktemp("adapters")
    alpha = make_peft_adapter(model_dir, root / "alpha", r=4, std=0.3)
    shutil.copytree(alpha, root / "thinker")
    (root / "thinker" / "chat_template.jinja").write_text(CHAT_TEMPLATE + "<think>\n{# </think> #}")
    flags = ("--adapters-dir", str(root), "--api-keys-file", str(keys_file), "--store-responses-mib", "0.05")
    server = KeyedServer(model_dir, *flags).wait_ready()
    yield server
    server.wait_baseline()
    assert server.stop() == 0


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS["red"], max_retries=0)


def streamed(server, name="red", **body):
    """(the last event's response, all events), each held to the API's document and to the client's models."""
    keyed = () if name is None else (name,)
    reply = server.post(PATH, {**body, "stream": True}, *keyed, stream=True)
    assert reply.status_code == 200, reply.text
    events = read_stream(reply.iter_lines())
    return rebuilt(events), events


def same(response):
    """What two answers to one request share, of an object of the client or of JSON."""
    response = response if isinstance(response, dict) else response.model_dump(mode="json", exclude_unset=True)
    items = [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in response["output"]]
    return {**{name: response[name] for name in ("status", "model", "incomplete_details", "usage")}, "output": items}


@pytest.mark.parametrize("model", ["tiny", "alpha"])
def test_the_equal_conversation_has_the_tokens_of_chat_completions_in_answers_and_streams(server, client, model):
    body = {"model": model, "temperature": 0.8, "seed": 5, "ignore_eos": True}
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Hello there"},
    ]
    chat_body = {**body, "messages": messages, "max_completion_tokens": 20, "logprobs": True, "top_logprobs": 2}
    chat = server.post("/v1/chat/completions", chat_body).json()
    body |= {"instructions": "Be brief", "input": messages[1:], "max_output_tokens": 20, "top_logprobs": 2}
    body |= {"include": ["message.output_text.logprobs"]}
    whole = server.post(PATH, body).json()
    check_response(whole)
    part = whole["output"][0]["content"][0]
    want = chat["choices"][0]
    assert part["text"] == want["message"]["content"] and whole["status"] == "incomplete"
    scored = want["logprobs"]["content"]
    assert part["logprobs"] == scored[: len(part["logprobs"])] and len(part["logprobs"]) > 10
    assert whole["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert whole["usage"]["output_tokens"] == chat["usage"]["completion_tokens"] == 20
    final, _ = streamed(server, **body)
    final["usage"]["input_tokens_details"] = whole["usage"]["input_tokens_details"]  # what was cached
    assert same(final) == same(whole)


def test_the_clients_answer_and_its_streaming_helper_agree(client):
    whole = client.responses.create(input="Hello there", **FIELDS)
    assert whole.output_text and whole.model == "tiny" and whole.usage.output_tokens == 20
    with client.responses.stream(input="Hello there", **FIELDS) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text
    done = client.responses.create(input="Hello", **{**FIELDS, "max_output_tokens": 300}, text={"format": {
        "type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}})  # fmt: skip
    assert done.status == "completed" and done.completed_at and set(json.loads(done.output_text)) == {"ok", "level"}
    assert done.text.format.name == "answer"
    any_json = client.responses.create(
        input="Hello", model="tiny", max_output_tokens=40, text={"format": {"type": "json_object"}}
    )
    assert any_json.output_text.startswith("{")


async def test_async_streams_of_the_base_and_an_adapter(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEYS["red"], max_retries=0) as client:
        texts = {}
        for model in ("tiny", "alpha"):
            stream = await client.responses.create(**{**FIELDS, "model": model}, input="Hello", stream=True)
            texts[model] = "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])
    assert texts["tiny"] and texts["alpha"] and texts["tiny"] != texts["alpha"]


def test_parse_gives_the_type_that_was_asked_for(client):
    fields = {**FIELDS, "max_output_tokens": 300}
    parsed = client.responses.parse(input="Hello", text_format=Answer, **fields).output_parsed
    assert isinstance(parsed, Answer)
    with client.responses.stream(input="Hello", text_format=Answer, **fields) as stream:
        assert stream.get_final_response().output_parsed == parsed


def test_tools_round_trip_and_stream(server, client):
    first = client.responses.create(input="Set the level", **{**FIELDS, **CALLED})
    (call,) = first.output
    assert call.type == "function_call" and call.status == "completed" and call.name in ("set_level", "stop")
    assert first.tools[0].name == "set_level" and first.tool_choice == "required" and not first.parallel_tool_calls
    items = [{"role": "user", "content": "Set the level"}, *first.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "done"})
    second = client.responses.create(input=items, **FIELDS, tools=TOOLS, tool_choice="none")
    function = {"name": call.name, "arguments": call.arguments}
    messages = [
        items[0],
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "done"},
    ]
    chat = client.chat.completions.create(messages=messages, model="tiny", max_tokens=20, temperature=0.8, seed=3)
    assert second.output_text == chat.choices[0].message.content
    with client.responses.stream(input="Set the level", **{**FIELDS, **CALLED}) as stream:
        deltas = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert deltas[-1].snapshot == call.arguments == final.output[0].arguments
    assert final.output[0].parsed_arguments == (json.loads(call.arguments) if call.name == "set_level" else None)
    body = {"input": "Set the level", "model": "tiny", "temperature": 0.8, "seed": 3, **CALLED}
    answer, events = streamed(server, **body)
    assert same(answer)["output"] == same(first)["output"]
    assert events[-2]["item"] == answer["output"][0]


def test_beside_tools_a_typed_answer_or_a_call_is_parsed_and_streamed(server, client):
    typed = {"input": "Hello", "text_format": Answer, "tools": TOOLS, "parallel_tool_calls": False}
    seen = set()
    for seed in range(12):
        fields = {"model": "tiny", "max_output_tokens": 300, "temperature": 2, "extra_body": {"seed": seed}}
        with client.responses.stream(**typed, **fields) as stream:
            whole = stream.get_final_response()
        (item,) = whole.output
        assert item.type == ("message" if isinstance(whole.output_parsed, Answer) else "function_call")
        seen.add(item.type)
    assert seen == {"message", "function_call"}
    schema = {"type": "json_schema", "name": "answer", "schema": SCHEMA}
    for seed in range(4):
        body = {"model": "tiny", "input": "Hello", "temperature": 2, "seed": seed, "tools": TOOLS}
        body |= {"text": {"format": schema}}
        assert same(streamed(server, **body)[0])["output"] == same(server.post(PATH, body).json())["output"]


def test_choices_of_tools(client):
    for choice in (NAMED, {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}):
        answer = client.responses.create(input="Go", **{**FIELDS, **CALLED, "tool_choice": choice})
        assert [item.name for item in answer.output] == ["stop"] and answer.output[0].arguments == "{}"
        assert answer.tool_choice.model_dump(exclude_unset=True) == choice
    many = {**FIELDS, **CALLED, "parallel_tool_calls": True, "max_output_tokens": 60}
    answer = client.responses.create(input="Go", **many)
    assert all(item.type == "function_call" for item in answer.output)


def test_thoughts_are_items_of_their_own_and_counted(server, client):
    body = {"model": "thinker", "temperature": 0.8, "seed": 3, "ignore_eos": True}
    final, events = streamed(server, **body, input="Hello", max_output_tokens=12)
    (item,) = final["output"]
    messages = [{"role": "user", "content": "Hello"}]
    chat = server.post("/v1/chat/completions", {**body, "messages": messages, "max_tokens": 12}).json()
    assert item["type"] == "reasoning" and item["status"] == "incomplete"
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["reasoning_content"]
    assert final["usage"]["output_tokens_details"]["reasoning_tokens"] == 12
    assert any(event["type"] == "response.reasoning_text.delta" for event in events)
    hidden = client.responses.create(
        model="thinker", input="Hello", max_output_tokens=12, extra_body={"include_reasoning": False}
    )
    assert [item.type for item in hidden.output] == ["message"] and hidden.output_text == ""
    again = client.responses.create(input=[{"role": "user", "content": "Hello"}, item, {
        "role": "user", "content": "Go on"}], **FIELDS)  # fmt: skip
    assert again.usage.output_tokens == 20


def test_own_fields_mean_what_they_mean_in_chat(client):
    own = {"speculation": {"mode": "off"}, "return_speculation_stats": True, "ignore_eos": True, "cache_salt": "s"}
    answer = client.responses.create(model="tiny", input="Hello", max_output_tokens=6, extra_body=own)
    assert answer.usage.model_extra["speculation"]["draft_tokens"] == 0
    cut = client.responses.create(
        model="tiny", input="Hello", temperature=0, max_output_tokens=30, extra_body={"stop": [" "], "min_tokens": 4}
    )
    assert cut.status in ("completed", "incomplete") and " " not in cut.output_text


def test_kept_responses_are_read_continued_and_deleted_by_their_key_alone(server, client):
    first = client.responses.create(input="Set the level", instructions="Be brief", **{**FIELDS, **CALLED})
    assert first.store is True
    read = client.responses.retrieve(first.id)
    assert read == first
    outputs = [{"type": "function_call_output", "call_id": first.output[0].call_id, "output": "done"}]
    second = client.responses.create(input=outputs, previous_response_id=first.id, **FIELDS)
    items = [{"role": "user", "content": "Set the level"}, *first.output, *outputs]
    assert client.responses.create(input=items, store=False, **FIELDS).output_text == second.output_text
    assert second.previous_response_id == first.id
    third = client.responses.create(input="And now?", previous_response_id=second.id, **FIELDS)
    resent = client.responses.create(
        input=[*items, *second.output, {"role": "user", "content": "And now?"}], store=False, **FIELDS
    )
    assert third.output_text == resent.output_text and resent.store is False
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS["blue"], max_retries=0)
    for response_id in (first.id, resent.id, "resp_nobody"):
        with pytest.raises(openai.NotFoundError, match=response_id):
            other.responses.retrieve(response_id)
        with pytest.raises(openai.NotFoundError):
            other.responses.delete(response_id)
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            other.responses.create(input="Hi", previous_response_id=response_id, model="tiny")
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    assert client.responses.create(input="More", previous_response_id=third.id, **FIELDS).output_text
    assert_error(server.get(f"{PATH}/{third.id}?stream=true"), 400, "stream", param="stream")


def test_a_stream_is_kept_when_it_has_ended_and_what_is_too_large_is_not(server, client):
    long = {"max_output_tokens": 3500, "extra_body": {"seed": 3, "ignore_eos": True, "speculation": {"mode": "off"}}}
    with client.responses.stream(input="Hello there", **FIELDS | long) as stream:
        created = next(iter(stream)).response
        with server.paused(), pytest.raises(openai.NotFoundError):
            client.responses.retrieve(created.id)
        for event in stream:
            last = event
    kept = client.responses.retrieve(created.id)
    assert kept.output == last.response.output and kept.status == "incomplete"
    large = client.responses.create(model="tiny", input="a", max_output_tokens=1, metadata={"note": "x" * 60_000})
    assert large.store is False and large.metadata == {"note": "x" * 60_000}
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(large.id)


def test_keys_limit_adapters_and_are_charged_the_tokens(server):
    def left(reply):
        return int(reply.headers["x-ratelimit-remaining-tokens"])

    body = {"model": "alpha", "input": "Hello", "max_output_tokens": 5, "ignore_eos": True}
    chat = {"model": "alpha", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "ignore_eos": True}
    used = []
    for path, fields in ((PATH, body), ("/v1/chat/completions", chat)):
        before = server.metrics()['key_tokens_total{key="blue"}'] if used else 0.0
        reply = server.post(path, fields, "blue")
        assert reply.status_code == 200 and left(reply) < 1000
        used.append(server.metrics()['key_tokens_total{key="blue"}'] - before)
    assert used[0] == used[1] > 5
    assert_error(server.post(PATH, {**body, "model": "thinker"}, "blue"), 404, "thinker", param="model")
    assert_error(server.post(PATH, {**body, "priority": 5}, "blue"), 403, param="priority")
    refused = server.post(PATH, {**body, "max_output_tokens": 900, "input": "Hello " * 300}, "blue")
    assert_error(refused, 429, "tokens_per_minute")
    assert requests.post(server.url + PATH, json=body, timeout=60).status_code == 401
    assert requests.get(f"{server.url}{PATH}/resp_x", timeout=60).status_code == 401


BAD = {
    "an unknown model": ({"model": "nobody"}, 404, "model", "nobody"),
    "no input": ({"input": None}, 400, "input", "empty"),
    "an unknown field": ({"messages": []}, 400, "messages", "messages"),
    "no room": ({"max_output_tokens": 9000}, 400, "max_output_tokens", "max_output_tokens is 9000"),
    "no tokens": ({"max_output_tokens": 0}, 400, "max_output_tokens", "at least 1"),
    "a long input": ({"input": "Hello " * 5000}, 400, "input", "tokens"),
    "a range": ({"temperature": 3}, 400, "temperature", "0 to 2"),
    "a tool's name": ({"tools": [{"type": "function", "name": "a b"}]}, 400, "tools[0].name", "tools[0].name"),
    "a choice of no tool": ({"tools": TOOLS, "tool_choice": {**NAMED, "name": "x"}}, 400, "tool_choice", "'x'"),
    "verbosity": ({"text": {"verbosity": "high"}}, 400, "text.verbosity", "text.verbosity"),
    "an expression beside tools": ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, 400, "tools", "tool_choice"),
    "a schema that cannot be held to": (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}}, 400, None, "nothing",
    ),
    "a deadline": ({"deadline_ms": 0}, 400, "deadline_ms", "more than 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_refused_in_answers_and_streams(server, name):
    fields, status, param, word = BAD[name]
    for stream in (False, True):
        reply = server.post(PATH, {"model": "tiny", "input": "Hi", **fields, "stream": stream})
        error = assert_error(reply, status, word, param=param)
        assert "response_format" not in error["message"] and "max_completion_tokens" not in error["message"]


def test_a_client_that_leaves_a_stream_frees_everything_and_nothing_is_kept(server):
    before = server.metrics()["engine_generated_tokens"]
    body = {"model": "tiny", "input": "Hello", "max_output_tokens": 3000, "ignore_eos": True, "stream": True}
    running = server.post(PATH, {**body, "speculation": {"mode": "off"}}, stream=True)
    created = json.loads(next(line for line in running.iter_lines() if line.startswith(b"data: "))[6:])
    running.close()
    server.wait_baseline()
    assert server.metrics()["engine_generated_tokens"] - before < 3000
    assert server.get(f"{PATH}/{created['response']['id']}").status_code == 404


def test_a_server_that_keeps_nothing_says_so(broken_server):
    created = broken_server.post(PATH, {"input": "Hello", "max_output_tokens": 2}).json()
    assert created["store"] is False and created["model"] == "tiny"
    for body, param in (({"store": True}, "store"), ({"previous_response_id": created["id"]}, "previous_response_id")):
        refused = broken_server.post(PATH, {"input": "Hello", **body})
        assert_error(refused, 400, "--store-responses-mib", param=param)
    assert_error(broken_server.get(f"{PATH}/{created['id']}"), 404, "--store-responses-mib")
    gone = requests.delete(f"{broken_server.url}{PATH}/{created['id']}", timeout=60)
    assert_error(gone, 404, "--store-responses-mib")


def test_an_engine_that_is_killed_ends_the_stream_with_response_failed(broken_server):
    want = broken_server.complete()["text"]
    body = {"input": "ê ð", "max_output_tokens": 40, "ignore_eos": True}  # KILLED, from the fourth token on
    final, events = streamed(broken_server, None, **body, speculation={"mode": "off"})
    assert events[-1]["type"] == "response.failed" and final["status"] == "failed"
    assert final["error"]["code"] == "server_error" and final["error"]["message"]
    assert final["output"][0]["status"] == "incomplete" and final["output"][0]["content"][0]["text"] is not None
    deadline = time.monotonic() + 60
    while broken_server.get("/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert broken_server.complete()["text"] == want
