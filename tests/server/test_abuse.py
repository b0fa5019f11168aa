"""Bad input over real HTTP: a clear error each time, the same tokens afterwards, and everything given back."""

import gzip
import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from adapter_edits import complete
from golden import Golden, resident_mib
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file, save_file
from server_fixture import ServerProcess, assert_error

KEY, ADMIN = "sk-user", "sk-admin"
AUTH = {"Authorization": f"Bearer {KEY}"}
CONTEXT = 512
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class KeyedServer(ServerProcess):
    """Sends the user's key unless told otherwise."""

    def post(self, path, body, **kwargs):
        return super().post(path, body, headers={**AUTH, **kwargs.pop("headers", {})}, **kwargs)


@pytest.fixture(scope="module")
def server(model_dir, adapters_dir):
    server = KeyedServer(
        model_dir,
        *("--adapters-dir", str(adapters_dir), "--max-body-mib", "1", "--read-timeout-s", "3"),
        *("--api-key", KEY, "--admin-api-key", ADMIN),
    ).wait_ready()
    server.complete(model="good")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def baseline(server):
    return Golden(server, ("tiny", "good"))


@pytest.fixture(autouse=True)
def golden(baseline):
    yield
    baseline.check()


def text(**fields):
    return {"prompt": "The quick", "max_tokens": 2, **fields}


def send(server, data, path=TEXT, **headers):
    headers = {"Content-Type": "application/json", **AUTH, **{k.replace("_", "-"): v for k, v in headers.items()}}
    return requests.post(server.url + path, data=data, headers=headers, timeout=60)


# 1: empty prompts
@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["x", ""]], ids=str)
def test_empty_prompt(server, prompt):
    assert_error(server.post(TEXT, text(prompt=prompt)), 400, "empty", param="prompt")


def test_empty_messages(server):
    assert_error(server.post(CHAT, {"messages": []}), 400, "empty", param="messages")


# 2, 3: broken JSON
BROKEN = {
    "syntax": b'{"prompt": ',
    "nothing": b"",
    "duplicate keys": b'{"prompt": "a", "prompt": "b"}',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "nested 10,000 deep": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "a list": b"[]",
    "a number": b"3",
    "huge integer": b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json(server, name):
    assert_error(send(server, BROKEN[name]), 400)


# 4, 5: sizes and encodings
def test_body_over_the_limit(server):
    assert_error(send(server, b'{"prompt": "' + b"a" * (2 * 2**20) + b'"}'), 413, "max-body-mib")
    endless = (b"x" * 65536 for _ in range(64))
    try:
        assert_error(send(server, endless), 413)
    except requests.exceptions.ConnectionError:
        pass  # the server may close before all of a body that it refuses was sent


def test_compressed_body(server):
    bomb = gzip.compress(b"0" * 50_000_000)
    for encoding in ("gzip", "br", "deflate, gzip", "unheard-of"):
        assert_error(send(server, bomb, Content_Encoding=encoding), 415, "compressed")


# 7: content type and method
def test_wrong_content_type_and_method(server):
    assert_error(send(server, b"{}", Content_Type="text/plain"), 415, "application/json")
    for method in ("GET", "PUT", "DELETE"):
        assert_error(requests.request(method, server.url + TEXT, headers=AUTH, timeout=60), 405)
    nowhere = assert_error(requests.get(server.url + "/nowhere", headers=AUTH, timeout=60), 404)
    assert nowhere["message"] == "GET /nowhere: Not Found"
    for path in ("/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completions/", "//v1/chat//completions"):
        answer = requests.post(server.url + path, json={}, headers=AUTH, timeout=60)
        assert_error(answer, 404, f"{path}: Not Found; did you mean {CHAT}?")


# 8, 9: keys
@pytest.mark.parametrize(
    "value", [None, "Bearer ", "Bearer sk-use", "Bearer sk-user2", "Basic sk-user", "sk-user", "Bearer é"]
)
def test_wrong_key(server, value):
    headers = {"Authorization": value.encode() if value else value}
    assert_error(requests.post(server.url + TEXT, json=text(), headers=headers, timeout=60), 401, "key")
    assert_error(requests.get(server.url + "/v1/models", headers=headers, timeout=60), 401)


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_admin_routes_need_the_admin_key(server, path):
    assert_error(server.post(path, {"lora_name": "good", "lora_path": "good"}), 403, "admin")


# 10: browsers
def test_foreign_origin_and_rebound_host(server):
    assert_error(server.post(TEXT, text(), headers={"Origin": "https://evil.example"}), 403, "Origin")
    assert_error(server.post(TEXT, text(), headers={"Host": "evil.example"}), 403, "Host")
    refused = server.post(TEXT, text(top_p=9), headers={"Origin": server.url})
    assert refused.status_code == 400 and refused.headers["Access-Control-Allow-Origin"] == server.url
    own = server.post(TEXT, text(), headers={"Origin": server.url})
    assert own.status_code == 200 and own.headers["Access-Control-Allow-Origin"] == server.url
    streamed = server.post(TEXT, text(stream=True), headers={"Origin": server.url})
    assert streamed.headers["Access-Control-Allow-Origin"] == server.url
    evil = {"Origin": "https://evil.example"}
    assert_error(server.get("/v1/models", headers=evil), 403, "Origin")
    health = server.get("/health", headers=evil)
    assert health.status_code == 200 and "Access-Control-Allow-Origin" not in health.headers  # no page may read it
    preflight = requests.options(server.url + TEXT, headers={"Origin": "https://evil.example"}, timeout=60)
    assert preflight.status_code == 403 and "Access-Control-Allow-Origin" not in preflight.headers


# 11: numbers that are none
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "max_tokens", "seed"])
def test_numbers_that_are_not_finite(server, field, value):
    assert_error(send(server, f'{{"prompt": "a", "{field}": {value}}}'.encode()), 400)


# 12 to 18: ranges
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 10**12),
        ("max_tokens", 1.5),
        ("max_tokens", "3"),
        ("max_tokens", True),
        ("n", 0),
        ("n", 10**9),
        ("n", -1),
        ("best_of", 10**9),
        ("top_k", -5),
        ("top_k", 2**63),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("temperature", -1),
        ("temperature", 9),
        ("temperature", "hot"),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("seed", "abc"),
        ("seed", 1.5),
        ("logprobs", -1),
        ("logprobs", 21),
        ("min_tokens", 3),
        ("stop", ""),
        ("stop", ["ok", ""]),
        ("stop", ["x" * 100_000]),
        ("stop", ["x"] * 50_000),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", list(range(300)) * 10),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"320": 1}),
        ("logit_bias", {"2147483648": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {str(i): 1 for i in range(5000)}),
        ("cache_salt", "x" * 2000),
        ("stream_options", {"include_usage": True}),
        ("speculation", {"mode": "warp"}),
        ("speculation", {"max_draft_tokens": 10**6}),
        ("speculation", {"max_draft_tokens": -1}),
        ("prediction", {"type": "content"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_value_out_of_range_is_refused_by_name(server, field, value):
    error = assert_error(server.post(TEXT, text(**{field: value})), 400)
    assert field in f"{error['param']} {error['message']}"


def test_one_megabyte_stop_and_half_a_million_stops(server):
    assert server.post(TEXT, text(stop="x" * 1_100_000)).status_code in (400, 413)
    assert server.post(TEXT, text(stop=["x"] * 500_000)).status_code in (400, 413)


def test_defined_edges_are_served(server):
    for fields in (
        {"n": 3, "best_of": 3},
        {"seed": -5},
        {"top_k": -1},
        {"top_k": 0},
        {"temperature": 2},
        {"logprobs": 0},
    ):
        assert server.post(TEXT, text(**fields)).status_code == 200, fields
    assert server.post(TEXT, text(max_tokens=0, echo=True)).status_code == 200
    assert_error(server.post(CHAT, {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3}), 400)


@pytest.mark.parametrize("ids", [[-1], [320], [2**31], [2**70], [1, 2, -3]], ids=str)
def test_token_ids_out_of_range(server, ids):
    assert_error(server.post(TEXT, text(prompt=ids)), 400, param="prompt")


# 19, 20: too much
def test_a_great_many_prompts(server):
    assert_error(server.post(TEXT, text(prompt=["a"] * 100_000)), 400, "at most", param="prompt")
    assert server.post(TEXT, text(prompt=["a"] * 1_000_000)).status_code in (400, 413)


def test_prompt_longer_than_the_context_names_both_counts(server):
    assert_error(server.post(TEXT, text(prompt=[5] * (CONTEXT + 8))), 400, str(CONTEXT + 8), str(CONTEXT))
    assert_error(server.post(TEXT, text(prompt=[5] * CONTEXT)), 400, str(CONTEXT))
    assert_error(server.post(TEXT, text(prompt=[5] * 500, max_tokens=13)), 400, "513", "512")
    assert server.post(TEXT, text(prompt=[5] * 500, max_tokens=12)).status_code == 200
    long = {"messages": [{"role": "user", "content": "word " * 2000}]}
    assert_error(server.post(CHAT, long), 400, str(CONTEXT))


LONG = "The quick brown fox. " * 45_000  # nearly a megabyte, which the server takes 0.7 s to tokenise
LONG_BODIES = {
    TEXT: text(prompt=["The quick", LONG]),
    f"{TEXT} prediction": text(prediction={"type": "content", "content": LONG}),
    CHAT: {"messages": [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "user", "content": LONG}]},
    "/tokenize": {"prompt": LONG},
    "/tokenize messages": {"messages": [{"role": "user", "content": LONG}]},
    "/tokenize inputs": {"inputs": LONG},
    "/generate": {"inputs": LONG},
    "/generate template": {"inputs": LONG, "parameters": {"apply_chat_template": True}},
}


@pytest.mark.parametrize("name", LONG_BODIES)
def test_text_that_must_be_too_long_is_refused_by_its_bytes(server, name):
    before = cpu_s(server.process.pid)
    response = server.post(name.split()[0], LONG_BODIES[name])
    assert response.status_code in (400, 422)
    for words in ("bytes of text are at least", f"the context holds {CONTEXT}"):
        assert words in response.text
    assert cpu_s(server.process.pid) - before < 0.4  # tokenising takes longer


def test_tokenising_a_long_text_holds_up_nobody_and_leaves_no_memory(server):
    body = {"inputs": LONG, "parameters": {"truncate": 8, "max_new_tokens": 1}}  # whatever its length, its end is used
    assert server.post("/generate", body).status_code == 200
    before, num_answers = resident_mib(server.process.pid), 0
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/generate", body)
        while not running.done():
            assert requests.get(server.url + "/health", timeout=60).status_code == 200
            num_answers += 1
    assert running.result().status_code == 200
    assert num_answers > 5  # held up, one would be answered before it and one behind it
    assert resident_mib(server.process.pid) < before + 20


def cpu_s(pid) -> float:
    """What the process has computed so far, however busy the machine is."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_prompt_longer_than_the_kv_cache_names_both_counts_and_is_never_queued(model_dir):
    token_bytes = 2 * 2 * 2 * 16 * 4
    small = ServerProcess(model_dir, "--kv-cache-gib", str(4 * 16 * token_bytes / 2**30)).wait_ready()
    try:
        want = small.complete([5] * 40)["text"]
        long, words = [7] * 100, "The quick brown fox jumps over the lazy dog. " * 12
        for body in (text(prompt=long), text(prompt=[[5], long]), text(prompt=long, n=2, stream=True)):
            assert_error(small.post(TEXT, body), 400, "100", "64")
        assert_error(small.post(TEXT, text(prompt=[5] * 60, max_tokens=100)), 400, "160", "64")
        assert_error(small.post(CHAT, {"messages": [{"role": "user", "content": words}]}), 400, "64")
        for path in ("/generate", "/generate_stream", "/"):
            reply = small.post(path, {"inputs": words, "parameters": {}})
            assert reply.status_code == 422 and "64" in reply.json()["error"], reply.text
        small.wait_baseline()
        assert small.complete([5] * 40)["text"] == want
    finally:
        assert small.stop() == 0


# 22, 23: what chat must not take
@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ 7*7 }}"},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"tokenize": True},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"response_format": {"type": "yaml"}},
        {"guided_json": 5},
        {"made_up_field": 1},
        {"suffix": "x"},
        {"add_special_tokens": True},
        {"echo": True},
        {"mm_processor_kwargs": {"crops": 4}},
        {"truncate_prompt_tokens": 4},
        {"prompt_logprobs": 1},
        {"length_penalty": 1.5},
        {"allowed_token_ids": [4]},
        {"bad_words": ["a"]},
        {"return_token_ids": True},
        {"spaces_between_special_tokens": False},
    ],
    ids=str,
)
def test_field_that_would_change_the_output_is_refused_by_name(server, fields):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **fields}
    error = assert_error(server.post(CHAT, body), 400)
    assert next(iter(fields)) in error["message"] and error["param"] == next(iter(fields))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "wizard", "content": "a"}],
        [{"content": "a"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "tool", "content": "a", "tool_call_id": "x"}],
        [{"role": "user", "content": "a"}] * 10_000,
        "hello",
        [5],
    ],
    ids=lambda value: str(value)[:50],
)
def test_messages_that_are_not_served(server, messages):
    error = assert_error(server.post(CHAT, {"messages": messages, "max_tokens": 2}), 400)
    assert "messages" in f"{error['param']} {error['message']}"


# 29: tools
def tool(name="f", **fields):
    return {"type": "function", "function": {"name": name, **fields}}


NOT = {"type": "object", "properties": {"a": {"not": {}}}}
BAD_TOOLS = {
    "duplicates": {"tools": [tool(), tool()]},
    "10,000 tools": {"tools": [tool(f"f{idx}") for idx in range(10_000)]},
    "129 tools": {"tools": [tool(f"f{idx}") for idx in range(129)]},
    "unknown tool_choice": {"tools": [tool()], "tool_choice": "sometimes"},
    "tool_choice of another tool": {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    "tool_choice is a number": {"tools": [tool()], "tool_choice": 5},
    "tool_choice is nested": {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": ["f"]}}},
    "name with a quote": {"tools": [tool('f"')]},
    "name with a line end": {"tools": [tool("f\n")]},
    "empty name": {"tools": [tool("")]},
    "tools is text": {"tools": "f"},
    "tools holds null": {"tools": [None]},
    "deep schema": {"tools": [tool(parameters=json.loads('{"items":' * 50 + "{}" + "}" * 50))]},
    "large schema": {"tools": [tool(parameters={"description": "x" * 100_000})]},
    "unenforceable schema": {"tools": [tool(parameters=NOT)], "tool_choice": "required"},
    "remote $ref": {"tools": [tool(parameters={"$ref": "http://127.0.0.1/x"})], "tool_choice": "required"},
    "parallel_tool_calls is text": {"tools": [tool()], "parallel_tool_calls": "no"},
    "adapter path": {"tools": [{**tool(), "x-adapter": "../good"}]},
    "adapter list": {"tools": [{**tool(), "x-adapter": ["good"]}]},
}


@pytest.mark.parametrize("name", BAD_TOOLS)
def test_tools_that_are_not_served(server, name):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **BAD_TOOLS[name]}
    error = assert_error(server.post(CHAT, body), 400)
    assert "tool" in f"{error['param']} {error['message']}" and len(error["message"]) < 1000


def test_unknown_adapter_of_a_tool(server):
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [{**tool(), "x-adapter": "nobody"}]}
    assert_error(server.post(CHAT, body), 404, "'f'", "nobody")


# 30, 31: names and paths
@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        ("nobody", {404}),
        ("../good", {400}),
        ("..", {400}),
        ("/etc/passwd", {400}),
        ("good\0", {400}),
        ("%2e%2e/good", {400}),
        ("good/../good", {400}),
        ("a" * 5000, {400}),
        ("\x1b[31mred\nname", {400}),
        ("http://example.com/x", {400}),
        ("s3://bucket/x", {400}),
        (" good", {400}),
    ],
)
def test_adapter_names_that_are_none(server, name, statuses):
    for field in ("model", "adapter_id"):
        reply = server.post(TEXT, text(**{field: name}))
        assert reply.status_code in statuses
        message = assert_error(reply, reply.status_code)["message"]
        assert "\x1b" not in message and "\n" not in message and len(message) < 400
    assert_error(server.post(TEXT, text(model="good", adapter_id="other")), 400, "adapter_id")


def load(server, name, path):
    body = {"lora_name": name, "lora_path": str(path)}
    return server.post("/v1/load_lora_adapter", body, headers={"Authorization": f"Bearer {ADMIN}"})


@pytest.mark.parametrize(
    "path", ["http://example.com/x", "s3://b/x", "hf://x/y", "/etc", "../..", "good\0", "", "nobody/x"]
)
def test_load_paths_outside_the_adapters_folder(server, path):
    reply = load(server, "fresh", path)
    assert reply.status_code in (400, 403), reply.text
    assert_error(server.post(TEXT, text(model="fresh")), 404)


def test_links_that_leave_the_adapters_folder(server, adapters_dir, model_dir, tmp_path):
    outside = make_peft_adapter(model_dir, tmp_path / "outside", r=2)
    (adapters_dir / "linked").symlink_to(outside)
    inner = shutil.copytree(adapters_dir / "good", adapters_dir / "inner")
    (inner / "adapter_model.safetensors").unlink()
    (inner / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    try:
        for name in ("linked", "inner"):
            assert_error(server.post(TEXT, text(model=name)), 403, "link")
        assert_error(load(server, "fresh", adapters_dir / "linked"), 403)
    finally:
        (adapters_dir / "linked").unlink()
        shutil.rmtree(inner)


# 32 to 35: adapters that cannot be served
def pickle_only(path):
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(b"\x80\x04")


def remote_code(path):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "auto_map": {"a": "b"}}))


def truncated(path):
    os.truncate(path / "adapter_model.safetensors", 1000)


def change(edit):
    def spoil(path):
        tensors = load_file(path / "adapter_model.safetensors")
        name = next(key for key in sorted(tensors) if "lora_A" in key)
        tensors[name] = edit(tensors[name])
        save_file(tensors, path / "adapter_model.safetensors")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (pickle_only, "pickle"),
        (remote_code, "remote code"),
        (truncated, "safetensors"),
        (change(lambda a: a[:, :-1].contiguous()), "shape"),
        (change(lambda a: a * float("nan")), "NaN"),
        (change(lambda a: a / 0), "NaN"),
    ],
    ids=["pickle", "remote code", "truncated", "shape", "nan", "infinity"],
)
def test_adapter_that_cannot_be_served_is_refused_at_load(server, adapters_dir, spoil, word):
    path = shutil.copytree(adapters_dir / "good", adapters_dir / "spoiled")
    try:
        spoil(path)
        complete(path)
        assert_error(server.post(TEXT, text(model="spoiled")), 400, word)
        assert_error(load(server, "spoiled2", path), 400, word)
        assert_error(server.post(TEXT, text(model="spoiled2")), 404)
    finally:
        shutil.rmtree(path)


# 50 and others: what reaches logs, and raw protocol
def test_garbage_on_the_socket_is_closed(server):
    host, port = server.url.removeprefix("http://").split(":")
    for data in (
        b"\x00\xff\x00\xff\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=60) as sock:
            sock.sendall(data)
            assert b" 400 " in sock.recv(65536).split(b"\r\n")[0]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", [{}, {"prompt": 5}, {"tokens": [-1]}, {"tokens": [10**9]}, {"tokens": "x"}, {"x": 1}])
def test_tokenize_and_detokenize_refuse_what_they_cannot_read(server, path, body):
    assert_error(server.post(path, body), 400)
