"""Tool calls over HTTP with a tiny random model: whatever it calls is valid, streams join, adapters write arguments."""

import json
import shutil

import jsonschema
import msgspec
import openai
import pytest
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess, assert_error
from tiny_models import make_tiny_model
from tool_templates import TEMPLATES, make_tool_tokenizer

from specserve.server.openai import response_types

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "kelvin"]},
        "city": {"type": "string", "maxLength": 5},
        "days": {"type": "integer", "minimum": 1, "maximum": 30},
    },
    "required": ["unit", "city", "days"],
    "additionalProperties": False,
}
PICK = {
    "type": "object",
    "properties": {"letters": {"type": "array", "items": {"enum": list("abcdefgh")}, "minItems": 4, "maxItems": 4}},
    "required": ["letters"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "pick": PICK}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "pick", "parameters": PICK, "strict": True}},
]
NAMED = {"type": "function", "function": {"name": "pick"}}
FIRST_FAMILY, *OTHER_FAMILIES = TEMPLATES
ASK = {"messages": [{"role": "user", "content": "What is the weather?"}], "tools": TOOLS, "max_tokens": 900}


def with_adapters(**adapters):
    return [
        {**tool, "x-adapter": adapters[name]} if (name := tool["function"]["name"]) in adapters else tool
        for tool in TOOLS
    ]


# It takes no parameter that may be null, and at most two tools.
CHOOSY = (
    "{% for t in tools or [] %}{% if 'null' in t | string %}{{ raise_exception('null?') }}{% endif %}{% endfor %}"
    "{% if tools and tools | length > 2 %}{{ raise_exception('so many?') }}{% endif %}"
    "{% if messages[0].content == 'no' %}{{ raise_exception('no?') }}{% endif %}"
)


def make_model(path, *families):
    """With the markers of these families and the template of the first; one that knows no tools where there is none."""
    make_tiny_model(path, max_position_embeddings=4096)
    if families:
        tokenizer = make_tool_tokenizer(*families, vocab_size=320)
        tokenizer.save_pretrained(path)
        eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return path


@pytest.fixture(scope="module")
def adapters_dir(tmp_path_factory):
    model_dir = make_model(tmp_path_factory.mktemp("base") / "tiny")
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("alpha", "beta")):
        make_peft_adapter(model_dir, root / name, r=4, seed=seed, std=0.3)
    return root


@pytest.fixture(scope="module")
def server(adapters_dir, tmp_path_factory):
    """Its template knows no tools."""
    yield from served(make_model(tmp_path_factory.mktemp("models") / "tiny"), adapters_dir)


@pytest.fixture(scope="module")
def families_server(adapters_dir, tmp_path_factory):
    """A model of the first family, the adapter `alpha`, and for each other family one that brings its template."""
    root = tmp_path_factory.mktemp("families")
    shutil.copytree(adapters_dir / "alpha", root / "alpha")
    for family in OTHER_FAMILIES:
        shutil.copytree(root / "alpha", root / family)
        (root / family / "chat_template.jinja").write_text(TEMPLATES[family])
    shutil.copytree(root / "alpha", root / "choosy")
    (root / "choosy" / "chat_template.jinja").write_text(CHOOSY + TEMPLATES["hermes"])
    families = (FIRST_FAMILY, *OTHER_FAMILIES)
    yield from served(make_model(tmp_path_factory.mktemp("models") / FIRST_FAMILY, *families), root)


def served(model_dir, adapters_dir):
    server = ServerProcess(model_dir, "--adapters-dir", str(adapters_dir)).wait_ready()
    yield server
    server.wait_baseline()
    assert server.stop() == 0


@pytest.fixture
def of_family(request):
    """The server and the model of a family, and without one the base of the plain server."""

    def get(family):
        return (
            (request.getfixturevalue("families_server"), family)
            if family
            else (request.getfixturevalue("server"), "tiny")
        )

    return get


def choices(server, **fields):
    response = server.post(CHAT, {**ASK, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def assert_calls(choice, names=tuple(SCHEMAS)):
    assert choice["finish_reason"] == "tool_calls", choice
    message = choice["message"]
    assert message["content"] is None and len({call["id"] for call in message["tool_calls"]}) > 0
    for call in message["tool_calls"]:
        assert call["type"] == "function" and call["function"]["name"] in names
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


def without_ids(choices):
    text = json.dumps(choices)
    for choice in choices:
        for call in choice["message"].get("tool_calls") or []:
            text = text.replace(call["id"], "ID")
    return json.loads(text)


def joined(events):
    """The choices that the chunks of a stream add up to, as a client adds them up."""
    result = {}
    for event in events:
        for chunk in event["choices"]:
            choice = result.setdefault(chunk["index"], {"content": None, "calls": [], "finish_reason": None})
            choice["finish_reason"] = chunk["finish_reason"] or choice["finish_reason"]
            delta = chunk["delta"]
            if delta.get("content"):
                choice["content"] = (choice["content"] or "") + delta["content"]
            for call in delta.get("tool_calls", []):
                if call["index"] == len(choice["calls"]):
                    assert call["id"] and call["type"] == "function" and call["function"]["name"]
                    choice["calls"].append([call["function"]["name"], call["function"]["arguments"]])
                else:
                    assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                    choice["calls"][call["index"]][1] += call["function"]["arguments"]
    return [result[index] for index in sorted(result)]


def as_joined(choice):
    message = choice["message"]
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls") or []]
    return {"content": message["content"] or None, "calls": calls, "finish_reason": choice["finish_reason"]}


@pytest.mark.parametrize("family", [None, "hermes", "llama3", "mistral"])
def test_random_weights_call_tools_validly_where_they_must(of_family, family):
    server, model = of_family(family)
    seen = set()
    for seed in range(3):
        for choice in choices(server, model=model, tool_choice="required", n=4, seed=seed, temperature=1):
            if choice["finish_reason"] != "length":
                assert_calls(choice)
                seen |= {call["function"]["name"] for call in choice["message"]["tool_calls"]}
    assert seen == set(SCHEMAS)
    for choice in choices(server, model=model, tool_choice=NAMED, n=4, seed=1, temperature=1):
        assert_calls(choice, ["pick"])
        assert len(choice["message"]["tool_calls"]) == 1
    one = {"tool_choice": "required", "parallel_tool_calls": False}
    for choice in choices(server, model=model, **one, n=4, seed=2, temperature=1):
        assert_calls(choice)
        assert len(choice["message"]["tool_calls"]) == 1


@pytest.mark.parametrize("family", [None, "mistral"])
@pytest.mark.parametrize("fields", [{"tool_choice": "required"}, {"tool_choice": NAMED}, {"max_tokens": 60}], ids=str)
def test_stream_joins_to_the_whole_answer(of_family, family, fields):
    server, model = of_family(family)
    fields = {**fields, "model": model, "n": 3, "seed": 5, "temperature": 1, "logprobs": True}
    whole = choices(server, **fields)
    events = server.stream(CHAT, {**ASK, **fields, "stream_options": {"include_usage": True}})
    assert joined(events) == [as_joined(choice) for choice in whole]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    for idx, choice in enumerate(whole):
        streamed = [
            item["token"]
            for event in events
            for chunk in event["choices"]
            if chunk["index"] == idx and chunk["logprobs"]
            for item in chunk["logprobs"]["content"]
        ]
        assert streamed == [item["token"] for item in choice["logprobs"]["content"]]


def test_a_call_comes_in_several_chunks_name_first(server):
    events = server.stream(CHAT, {**ASK, "tool_choice": NAMED, "seed": 1, "speculation": {"mode": "off"}})
    deltas = [call for event in events for chunk in event["choices"] for call in chunk["delta"].get("tool_calls", [])]
    assert deltas[0]["function"]["name"] == "pick" and len(deltas) > 3


def test_under_auto_free_text_is_content_and_calls_are_none(server):
    for choice in choices(server, n=3, seed=3, temperature=1, max_tokens=40):
        assert choice["finish_reason"] in ("stop", "length")
        assert isinstance(choice["message"]["content"], str) and "tool_calls" not in choice["message"]


def test_under_auto_a_begun_call_is_held_to_its_tool(families_server):
    """The marker is made likely, so that a random model begins a call by itself."""
    server = families_server
    marker = server.post("/tokenize", {"prompt": "<tool_call>", "add_special_tokens": False}).json()["tokens"]
    assert len(marker) == 1
    for choice in choices(server, logit_bias={str(marker[0]): 100}, n=4, seed=1, parallel_tool_calls=False):
        assert_calls(choice)


def test_drafts_change_no_call(server):
    for choice, tools in (("required", TOOLS), (NAMED, TOOLS), ("required", with_adapters(pick="alpha"))):
        fields = {"tool_choice": choice, "tools": tools, "seed": 7, "temperature": 1, "n": 2}
        off = choices(server, **fields, speculation={"mode": "off"})
        drafted = {**fields, "speculation": {"mode": "fixed", "max_draft_tokens": 8}, "return_speculation_stats": True}
        body = server.post(CHAT, {**ASK, **drafted}).json()
        assert without_ids(body["choices"]) == without_ids(off)
        assert body["usage"]["speculation"]["accepted_by_source"]["grammar"] > 20  # frames, names and keys


def test_a_client_that_leaves_a_switching_answer_frees_its_sequence(server):
    fields = {"tools": with_adapters(pick="alpha"), "tool_choice": "required", "seed": 4, "n": 4, "stream": True}
    response = server.post(CHAT, {**ASK, **fields}, stream=True)
    lines = response.iter_lines()
    while b"arguments" not in next(lines):
        pass
    response.close()
    server.wait_baseline()


def test_calls_cut_by_max_tokens_finish_with_length(server):
    (choice,) = choices(server, tool_choice=NAMED, max_tokens=60, temperature=0)
    assert choice["finish_reason"] == "length"


def test_a_stop_string_within_a_call_is_no_finished_call(server):
    (choice,) = choices(server, tool_choice=NAMED, temperature=0, stop='"letters"')
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", '"letters"')
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "pick", "arguments": "{"}


def test_answers_and_chunks_have_the_documented_shape(server):
    fields = {**ASK, "tool_choice": "required", "seed": 1}
    msgspec.convert(server.post(CHAT, fields).json(), response_types.ChatResponse)
    for event in server.stream(CHAT, fields):
        msgspec.convert(event, response_types.ChatChunk)


def test_tokenize_shows_the_prompt_with_tools(server):
    counted = server.post("/tokenize", {"messages": ASK["messages"], "tools": TOOLS}).json()["count"]
    assert server.post(CHAT, {**ASK, "max_tokens": 1}).json()["usage"]["prompt_tokens"] == counted


def test_tool_choice_none_shows_no_tools_to_the_model(server):
    plain = {name: value for name, value in ASK.items() if name != "tools"}
    fields = {"temperature": 0, "max_tokens": 20}
    want = server.post(CHAT, {**plain, **fields}).json()
    got = server.post(CHAT, {**ASK, **fields, "tool_choice": "none"}).json()
    assert got["choices"] == want["choices"] and got["usage"]["prompt_tokens"] == want["usage"]["prompt_tokens"]


def test_schema_that_cannot_be_enforced_is_refused_by_tool_and_keyword(server):
    tool = {"name": "odd", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    fields = {"tools": [*TOOLS, {"type": "function", "function": tool}]}
    assert_error(server.post(CHAT, {**ASK, **fields, "tool_choice": "required"}), 400, "'odd'", "not")
    strict = {"tools": [{"type": "function", "function": {**tool, "strict": True}}]}
    assert_error(server.post(CHAT, {**ASK, **strict}), 400, "'odd'", "not")
    assert server.post(CHAT, {**ASK, **fields, "max_tokens": 5}).status_code == 200


NOTE = {
    "type": "object",
    "properties": {"level": {"enum": ["low", "high"]}, "letters": {"type": "string", "pattern": "^[a-z]{2,5}$"}},
    "required": ["level", "letters"],
    "additionalProperties": False,
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "note", "schema": NOTE, "strict": True}}


@pytest.mark.parametrize("family", [None, "hermes", "llama3", "mistral"])
def test_beside_tools_an_answer_keeps_to_its_format_or_calls(of_family, family):
    (server, model), seen = of_family(family), set()
    tools = with_adapters(pick="alpha")
    fields = {"model": model, "response_format": FORMAT, "n": 6, "temperature": 2, "tools": tools}
    for seed in range(4):
        whole = choices(server, **fields, seed=seed)
        for choice in whole:
            assert choice["finish_reason"] != "length", choice
            if choice["finish_reason"] == "tool_calls":
                assert_calls(choice)
                seen.add("calls")
            else:
                jsonschema.validate(json.loads(choice["message"]["content"]), NOTE)
                seen.add("answer")
        assert joined(server.stream(CHAT, {**ASK, **fields, "seed": seed})) == [as_joined(item) for item in whole]
    assert seen == {"calls", "answer"}


def test_drafts_change_neither_the_answer_in_a_format_nor_the_call(server):
    for seed in range(3):
        fields = {"response_format": FORMAT, "seed": seed, "temperature": 2, "n": 4}
        off = choices(server, **fields, speculation={"mode": "off"})
        fixed = choices(server, **fields, speculation={"mode": "fixed", "max_draft_tokens": 8})
        assert without_ids(fixed) == without_ids(off)


def test_calls_that_must_come_take_the_place_of_the_format(server):
    for choice in choices(server, response_format=FORMAT, tool_choice="required", n=3, seed=1):
        assert_calls(choice)
    for choice in choices(server, response_format=FORMAT, tool_choice="none", n=2, seed=1):
        jsonschema.validate(json.loads(choice["message"]["content"]), NOTE)


def test_a_template_that_cannot_take_a_tool_is_a_400_that_names_it(families_server):
    def tool(name, kind):
        parameters = {"type": "object", "properties": {"a": {"type": kind}}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    fine, other, bad = tool("fine", "string"), tool("other", "string"), tool("bad", ["string", "null"])
    body = {"model": "choosy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    for tools, words in (
        ([fine, bad], ["null?", "cannot take is tools[1] ('bad')"]),
        ([fine, other, tool("third", "string")], ["so many?", "these tools together"]),
    ):
        error = assert_error(families_server.post(CHAT, {**body, "tools": tools}), 400, *words, param="tools")
        assert error["code"] == "chat_template_failed" and "adapter 'choosy'" in error["message"]
    assert families_server.post(CHAT, {**body, "tools": [fine]}).status_code == 200
    no = {**body, "messages": [{"role": "user", "content": "no"}], "tools": [bad]}
    assert_error(families_server.post(CHAT, no), 400, "null?", param="messages")


def test_grammars_that_cannot_stand_beside_tools_are_refused(server, families_server):
    fields = {**ASK, "guided_regex": "[a-z]+"}
    assert_error(server.post(CHAT, fields), 400, "tools", "tool_choice none")
    fields = {**ASK, "response_format": {"type": "json_object"}, "max_tokens": 20}
    assert server.post(CHAT, fields).status_code == 200
    assert_error(families_server.post(CHAT, {**fields, "model": "llama3"}), 400, "begin with")


# -- adapters


def test_a_named_tool_runs_with_its_adapter(server):
    fields = {"tool_choice": NAMED, "seed": 11, "temperature": 1, "n": 2}
    alone = {name: choices(server, **fields, model=name) for name in ("tiny", "alpha", "beta")}
    assert len({json.dumps(without_ids(item)) for item in alone.values()}) == 3
    for model in ({}, {"model": "tiny"}):
        got = choices(server, **{**fields, **model, "tools": with_adapters(pick="alpha")})
        assert without_ids(got) == without_ids(alone["alpha"])


def arguments_alone(server, model, call, seed=11):
    """What `model` writes as the arguments of one call, from its own sequence: the reference of a switch."""
    frame = f'<tool_call>\n{{"name": "{call["name"]}", "arguments":'
    prompt = server.post("/tokenize", {"messages": ASK["messages"], "tools": TOOLS}).json()["tokens"]
    prompt += server.post("/tokenize", {"prompt": frame, "add_special_tokens": False}).json()["tokens"]
    lark = f'start: " " %json {json.dumps(SCHEMAS[call["name"]])}'
    body = {"model": model, "prompt": prompt, "max_tokens": 300, "temperature": 0}
    response = server.post("/v1/completions", {**body, "structured_outputs": {"grammar": lark}})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"].strip()


def test_each_tools_arguments_are_written_by_its_adapter(server):
    tools = with_adapters(pick="alpha", get_weather="beta")
    adapters = {"pick": "alpha", "get_weather": "beta"}
    fields = {"tools": tools, "tool_choice": "required", "temperature": 0, "parallel_tool_calls": False}
    names = set()
    for bias in range(2):
        only = [tools[bias]]
        for offered in (tools, only):
            (choice,) = choices(server, **{**fields, "tools": offered})
            assert_calls(choice)
            call = choice["message"]["tool_calls"][0]["function"]
            names.add(call["name"])
            if offered is tools:  # the reference prompt shows both
                assert call["arguments"] == arguments_alone(server, adapters[call["name"]], call)
    assert names == set(adapters)


def test_switching_answers_stream_repeat_and_count(server):
    fields = {"tools": with_adapters(pick="alpha"), "tool_choice": "required", "seed": 4, "temperature": 1, "n": 3}
    first, second = (choices(server, **fields, logprobs=True) for _ in range(2))
    assert without_ids(first) == without_ids(second)
    traced = choices(server, **fields, logprobs=True, speculation={"mode": "fixed", "trace": True})
    traces = [choice.pop("trace") for choice in traced]
    assert without_ids(traced) == without_ids(first)
    for choice, trace in zip(traced, traces, strict=True):
        assert len(trace) == len(choice["logprobs"]["content"])
        said = "".join(entry["text"] for entry in trace)
        assert all(call["function"]["arguments"] in said for call in choice["message"]["tool_calls"])
        forwards = [entry["forward"] for entry in trace]
        assert forwards == sorted(forwards)
        last = [idx for idx, entry in enumerate(trace) if entry["source"] == "target"]
        assert all(forwards[idx] < forwards[idx + 1] for idx in last if idx + 1 < len(trace))
    for choice in first:
        if choice["finish_reason"] != "length":
            assert_calls(choice)
    body = server.post(CHAT, {**ASK, **fields, "return_speculation_stats": True, "logprobs": True}).json()
    events = server.stream(CHAT, {**ASK, **fields, "stream_options": {"include_usage": True}})
    assert joined(events) == [as_joined(choice) for choice in first]
    assert events[-1]["usage"]["completion_tokens"] == body["usage"]["completion_tokens"]
    num_tokens = sum(len(choice["logprobs"]["content"]) for choice in first)
    assert body["usage"]["completion_tokens"] == num_tokens
    assert body["usage"]["speculation"]["num_forwards"] > 0


def test_parallel_calls_switch_for_each(server):
    fields = {"tools": with_adapters(pick="alpha"), "tool_choice": "required", "temperature": 1, "n": 8}
    counts = []
    for choice in choices(server, **fields, seed=9):
        if choice["finish_reason"] != "length":
            assert_calls(choice)
            counts.append(len(choice["message"]["tool_calls"]))
    assert max(counts) > 1


def test_unknown_adapter_of_a_tool_names_the_tool(server):
    body = {**ASK, "tools": with_adapters(pick="nobody")}
    error = assert_error(server.post(CHAT, body), 404, "'pick'", "nobody")
    assert error["param"] == "tools"
    assert_error(server.post(CHAT, {**ASK, "tools": with_adapters(pick="../alpha")}), 400, "'pick'")


# -- the real client


def test_openai_client_round_trip(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    fields = {"model": "tiny", "tools": TOOLS, "temperature": 0, "max_tokens": 400}
    messages = [{"role": "user", "content": "Pick some."}]
    first = client.chat.completions.create(messages=messages, tool_choice=NAMED, **fields)
    call = first.choices[0].message.tool_calls[0]
    jsonschema.validate(json.loads(call.function.arguments), PICK)
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "picked"}]
    second = client.chat.completions.create(messages=messages, **{**fields, "max_tokens": 10})
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    with client.chat.completions.stream(messages=messages[:1], tool_choice=NAMED, **fields) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    assert final.choices[0].finish_reason == "tool_calls"


def test_openai_client_refusals_are_exceptions(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="two tools"):
        client.chat.completions.create(model="tiny", messages=ASK["messages"], tools=[*TOOLS, TOOLS[0]])
