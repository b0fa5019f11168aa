"""Structured output over real HTTP: every dialect, and bad grammars that harm nobody.

After each case golden requests give the same tokens as before, and blocks, references and handles are back.
"""

import json
import threading
import time

import jsonschema
import pytest
import requests
from golden import Golden, resident_mib
from server_fixture import assert_error

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["fox", "dog"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(open_server):
    return open_server


@pytest.fixture(scope="module")
def baseline(server):
    return constrained_text(server), Golden(server)


@pytest.fixture(autouse=True)
def golden(server, baseline):
    yield
    assert constrained_text(server) == baseline[0]
    baseline[1].check()


def constrained_text(server):
    return server.complete(guided_json=SCHEMA, temperature=1, seed=3)["text"]


def text(**fields):
    return {"prompt": "The quick", "max_tokens": 60, **fields}


# -- dialects

FORMS = {
    "response_format json_schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    },
    "response_format with a schema": {"response_format": {"type": "json_object", "schema": SCHEMA}},
    "response_format with a schema as text": {"response_format": {"type": "json_object", "schema": json.dumps(SCHEMA)}},
    "structured_outputs json": {"structured_outputs": {"json": SCHEMA}},
    "guided_json": {"guided_json": SCHEMA},
    "guided_json as text": {"guided_json": json.dumps(SCHEMA)},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("temperature", [0, 1])
def test_every_form_of_a_schema_gives_output_that_satisfies_it(server, name, temperature):
    for path, prompt in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": [{"role": "user", "content": "a"}]})):
        body = {**prompt, **FORMS[name], "max_tokens": 60, "temperature": temperature, "seed": 1}
        response = server.post(path, body)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        output = choice["text"] if path == TEXT else choice["message"]["content"]
        jsonschema.validate(json.loads(output), SCHEMA)
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "outputs"),
    [
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}),
        ({"guided_regex": "(red|blue) [0-3]"}, {f"{c} {i}" for c in ("red", "blue") for i in range(4)}),
        ({"structured_outputs": {"regex": "[ab]"}}, {"a", "b"}),
        ({"guided_grammar": 'start: "x" "y"'}, {"xy"}),
        ({"structured_outputs": {"grammar": 'root ::= "p" ("q" | "r")'}}, {"pq", "pr"}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),  # sets have no order: workers must agree on names
)
def test_choices_expressions_and_grammars(server, fields, outputs):
    response = server.post(TEXT, text(n=6, seed=7, **fields))
    assert response.status_code == 200, response.text
    assert {choice["text"] for choice in response.json()["choices"]} <= outputs


def test_json_object_gives_an_object_or_runs_out_of_tokens(server):
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        for choice in server.post(TEXT, text(n=4, seed=2, **fields)).json()["choices"]:
            assert choice["text"].startswith("{")
            if choice["finish_reason"] == "stop":
                assert isinstance(json.loads(choice["text"]), dict)
            else:
                assert choice["finish_reason"] == "length"


def test_text_format_asks_for_nothing(server):
    assert server.complete(response_format={"type": "text"}) == server.complete()


def test_streams_lists_echo_and_logprobs_work_under_a_grammar(server):
    fields = {"guided_json": SCHEMA, "temperature": 1, "seed": 5}
    whole = server.post(TEXT, text(prompt=["a", "b"], n=2, logprobs=2, echo=True, **fields)).json()["choices"]
    events = server.stream(TEXT, text(prompt=["a", "b"], n=2, **fields))
    streamed = ["".join(c["text"] for e in events for c in e["choices"] if c["index"] == i) for i in range(4)]
    for choice, output in zip(whole, streamed, strict=True):
        assert choice["text"][1:] == output
        jsonschema.validate(json.loads(output), SCHEMA)
        assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"])


def test_adapterless_metrics_count_grammars(server):
    before = server.metrics()
    body = text(guided_regex="metrics [0-9]{2}", temperature=1, seed=1)
    for _ in range(2):
        assert server.post(TEXT, body).status_code == 200
    after = server.metrics()
    assert after["engine_num_grammars_compiled"] == before["engine_num_grammars_compiled"] + 1
    assert after["engine_num_grammar_cache_hits"] == before["engine_num_grammar_cache_hits"] + 1
    for name in ("engine_grammar_compile_seconds", "engine_grammar_mask_seconds"):
        assert after[name] > before[name]


# -- what is refused before any token

CONFLICTS = [
    {"guided_json": SCHEMA, "guided_regex": "a"},
    {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
    {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    {"structured_outputs": {}},
]
MALFORMED = [
    {"response_format": {"type": "yaml"}},
    {"response_format": "json"},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    {"response_format": {"type": "json_object", "made_up": 1}},
    {"structured_outputs": {"structural_tag": "x"}},
    {"guided_choice": []},
    {"guided_choice": ["a", 5]},
    {"guided_choice": [f"{i}" for i in range(5000)]},
    {"guided_regex": ""},
    {"guided_regex": 5},
    {"guided_json": "{"},
    {"guided_json": 5},
    {"guided_json": {"type": "strng"}},
    {"guided_json": False},
    {"guided_grammar": "start: ((("},
    {"guided_grammar": 'root ::= "a'},
]


@pytest.mark.parametrize("fields", CONFLICTS + MALFORMED, ids=lambda fields: str(fields)[:60])
@pytest.mark.parametrize("stream", [False, True])
def test_conflicting_and_malformed_grammars_are_400_before_any_token(server, fields, stream):
    assert_error(server.post(TEXT, text(stream=stream, **fields)), 400)


# 24
def nested(depth):
    return '{"type": "array", "items": ' * depth + "{}" + "}" * depth


BAD_SCHEMAS = {
    "3,000 deep": (nested(3000), ["nested"]),
    "self-loop": ('{"$ref": "#"}', ["no output"]),
    "mutual loop": ('{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}', []),
    "endless object": (
        '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": false}', [],
    ),
    "missing $ref": ('{"$ref": "#/$defs/nowhere"}', ["/$defs/nowhere"]),
    "remote $ref": ('{"$ref": "http://127.0.0.1:9/schema.json"}', ["http://127.0.0.1:9", "nothing is fetched"]),
    "file $ref": ('{"$ref": "file:///etc/passwd"}', ["file:///etc/passwd", "nothing is fetched"]),
    "unsatisfiable": ('{"type": "integer", "minimum": 5, "maximum": 3}', ["Unsatisfiable"]),
    "huge multipleOf": ('{"type": "integer", "multipleOf": 1005973}', ["multipleOf", "10000"]),
    "multiples combined": ('{"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}', ["10000"]),
    "exploding allOf": (
        json.dumps({"allOf": [{"anyOf": [{"required": [f"a{i}{j}"]} for j in range(8)]} for i in range(8)]}), ["limit"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_bad_schema_is_refused_with_its_reason(server, name):
    schema, words = BAD_SCHEMAS[name]
    start = time.monotonic()
    if name == "endless object":  # every output is a prefix of an endless one: that is for max_tokens to end
        response = server.post(TEXT, text(guided_json=schema))
        assert response.status_code == 400 or response.json()["choices"][0]["finish_reason"] == "length"
    else:
        assert_error(server.post(TEXT, text(guided_json=schema)), 400, *words)
        assert_error(server.post(TEXT, text(guided_json=schema, stream=True, n=3)), 400, *words)
    assert time.monotonic() - start < 30


def test_schema_of_many_bytes_is_refused_with_the_limit(server):
    large = {"type": "object", "properties": {f"key {i}": {"type": "string"} for i in range(10_000)}}
    assert_error(server.post(TEXT, text(guided_json=large)), 400, "262144")
    assert_error(server.post(TEXT, text(guided_json=json.dumps(large))), 400, "262144")
    too_large = {"enum": ["x" * 2**20 * 4]}
    assert_error(server.post(TEXT, text(guided_json=too_large)), 413)
    wide = {"type": "object", "properties": {f"k{i}": {} for i in range(1500)}}
    assert_error(server.post(TEXT, text(guided_json=wide)), 400, "1500", "1000")


# 25
@pytest.mark.parametrize(
    "keyword",
    [
        {"not": {"type": "null"}}, {"if": {}, "then": {}}, {"contains": {}}, {"uniqueItems": True},
        {"propertyNames": {}}, {"dependentRequired": {"a": ["b"]}}, {"dependentSchemas": {"a": {}}},
        {"unevaluatedProperties": False},
        {"unevaluatedItems": False}, {"$dynamicRef": "#a"}, {"contentEncoding": "base64"}, {"nullable": True},
        {"minProperties": 3},
    ],
    ids=lambda keyword: next(iter(keyword)),
)  # fmt: skip
def test_unsupported_keyword_is_named_wherever_it_stands(server, keyword):
    name = next(iter(keyword))
    for schema in (keyword, {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, keyword]}}}):
        assert_error(server.post(TEXT, text(guided_json=schema)), 400, repr(name))
    in_lark = f'start: "x" v\nv: %json {json.dumps(keyword)}'
    assert_error(server.post(TEXT, text(guided_grammar=in_lark)), 400, repr(name))


def test_keyword_in_the_place_of_a_name_or_value_is_no_keyword(server):
    schema = {
        "type": "object",
        "properties": {"not": {"const": {"if": 1}}, "contains": {"enum": ["uniqueItems"]}},
        "required": ["not", "contains"],
        "additionalProperties": False,
    }
    choice = server.complete(guided_json=schema, max_tokens=80)
    jsonschema.validate(json.loads(choice["text"]), schema)


# 26
REFUSED_REGEX = {"(?=a)b": "look-around", "(?<!a)b": "look-around", r"(a)\1": "backreference", "a{1000000000}": "10000"}
BOMBS = [
    *("(a*)*b", "(a|a)*" * 40, "((a{1,100}){1,100}){1,100}", "(x+x+)+y", "(.*a.{20})+", "(a?){500}a{500}"),
    *("[a-z]{9999}", r"\p{L}{1,5000}\w{1,5000}", "|".join(f"(.*{i:03}.*)" for i in range(60))),
]


@pytest.mark.parametrize("regex", REFUSED_REGEX)
def test_regex_that_cannot_be_checked_is_refused_with_the_reason(server, regex):
    assert_error(server.post(TEXT, text(guided_regex=regex)), 400, REFUSED_REGEX[regex])
    assert_error(server.post(TEXT, text(guided_json={"type": "string", "pattern": regex})), 400, REFUSED_REGEX[regex])


def test_regex_bombs_hold_up_nobody(server):
    slowest = [0.0]
    done = threading.Event()

    def others():
        while not done.is_set():
            start = time.monotonic()
            server.get("/health")
            server.complete(max_tokens=2)
            slowest[0] = max(slowest[0], time.monotonic() - start)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for regex in BOMBS:
            start = time.monotonic()
            response = server.post(TEXT, text(guided_regex=regex, temperature=1, seed=1))
            assert response.status_code in (200, 400), response.text
            assert time.monotonic() - start < 60
    finally:
        done.set()
        thread.join()
    assert slowest[0] < 30


# 27
def send_unique_grammars(server, num, num_threads=4):
    def some(offset):
        for i in range(offset, num, num_threads):
            schema = {"type": "object", "properties": {f"key {i}": {"const": f"value {i}"}}, "required": [f"key {i}"]}
            schema["additionalProperties"] = False
            response = server.post(TEXT, text(guided_json=schema, max_tokens=1))
            assert response.status_code == 200, response.text

    threads = [threading.Thread(target=some, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("num", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_is_bounded_over_unique_grammars(server, num):
    send_unique_grammars(server, 150)
    before = resident_mib(server.engine_pid())
    compiled = server.metrics()["engine_num_grammars_compiled"]
    send_unique_grammars(server, num)
    metrics = server.metrics()
    assert metrics["engine_num_grammars_compiled"] >= compiled + num - 150
    assert metrics["engine_num_cached_grammars"] <= 128
    assert resident_mib(server.engine_pid()) < before + 50


# 28
def test_grammar_without_a_continuation_ends_with_an_error(server):
    dead = 'start: "x" b\nb: "z" X\nX: /a/ & /b/'
    error = assert_error(server.post(TEXT, text(guided_grammar=dead)), 400, "no token")
    assert error["code"] == "grammar_dead_end"
    events = server.stream(TEXT, text(guided_grammar=dead, speculation={"mode": "off"}))
    assert "no token" in events[-1]["error"]["message"] and events[0]["choices"][0]["text"] == "x"
    assert_error(server.post(TEXT, text(guided_grammar='start: a\na: "b" a')), 400)


def test_unbounded_string_ends_at_max_tokens(server):
    choice = server.complete(guided_regex="[a-z]*", ignore_eos=True, max_tokens=40)
    assert choice["finish_reason"] == "length"


# 41
def test_client_that_leaves_while_its_grammar_compiles_leaves_nothing(server):
    schema = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(990)}}
    for i in range(10):
        schema["properties"]["k0"] = {"const": i}
        with pytest.raises(requests.exceptions.ReadTimeout):
            body = text(guided_json=schema, max_tokens=400, ignore_eos=True)
            requests.post(server.url + TEXT, json=body, timeout=(60, 0.02))
    server.wait_baseline()
