"""Seeds, log-probabilities, stops, biases, ids, ill-fitting adapters: refused by name, by OpenAI's and LoRAX's routes.

After each case golden requests on both APIs give the same tokens, and everything is given back.
"""

import json
import shutil

import pytest
import requests
from adapter_edits import complete
from golden import Golden
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file, save_file
from server_fixture import assert_error
from tiny_models import make_tiny_model

from specserve.server.routes import ERRORS, ROUTES

TEXT, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def adapters_dir(open_dir):
    return open_dir


@pytest.fixture(scope="module")
def server(open_server):
    return open_server


def lorax_tokens(server):
    body = {"inputs": "The quick", "parameters": {"adapter_id": "good", "max_new_tokens": 8, "details": True}}
    return [token["id"] for token in server.post(GENERATE, body).json()["details"]["tokens"]]


@pytest.fixture(scope="module")
def baseline(server):
    return Golden(server, ("tiny", "good")), lorax_tokens(server)


@pytest.fixture(autouse=True)
def golden(server, baseline):
    yield
    assert lorax_tokens(server) == baseline[1]
    baseline[0].check()


def assert_lorax_error(response, status, error_type, *words):
    assert response.status_code == status, f"{response.status_code}: {response.text[:300]}"
    assert response.json()["error_type"] == error_type
    for word in words:
        assert word in response.json()["error"]


def text(**fields):
    return {"prompt": "The quick", "max_tokens": 2, **fields}


def chat(**fields):
    return {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **fields}


def generate(**parameters):
    return {"inputs": "The quick", "parameters": {"max_new_tokens": 2, **parameters}}


# 15, 16: seeds and log-probabilities
@pytest.mark.parametrize("seed", [2**63, 2**64, 2**200, -(2**63) - 1, 1.5, "1", True, [1]], ids=str)
def test_seed_out_of_range(server, seed):
    assert "seed" in str(assert_error(server.post(TEXT, text(seed=seed)), 400))
    if seed != 2**63:  # LoRAX's seeds have no sign
        assert_lorax_error(server.post(GENERATE, generate(seed=seed)), 422, "validation", "seed")


@pytest.mark.parametrize("value", [-1, 21, 10**9, 2**63, 1.5, "2", True], ids=str)
def test_number_of_logprobs_out_of_range(server, value):
    assert_error(server.post(TEXT, text(logprobs=value)), 400, param="logprobs")
    body = chat(logprobs=True, top_logprobs=value)
    assert_error(server.post(CHAT, body), 400, param="top_logprobs")
    reply = server.post(GENERATE, generate(return_k_alternatives=value, details=True))
    assert_lorax_error(reply, 422, "validation", "return_k_alternatives")


def test_logprobs_of_the_wrong_kind(server):
    assert_error(server.post(CHAT, chat(logprobs=3)), 400, param="logprobs")
    assert_error(server.post(CHAT, chat(top_logprobs=3)), 400, param="top_logprobs")
    assert_error(server.post(CHAT, chat(logprobs=False, top_logprobs=3)), 400, param="top_logprobs")


# 17: stop strings
@pytest.mark.parametrize(
    "stop",
    [["x"] * 500_000, [""], ["x" * 2**20], ["ok"] * 16 + [""], ["a\ud800"[:1], "x" * 513]],
    ids=lambda s: str(len(s)),
)
def test_stop_strings_too_many_empty_or_too_long(server, stop):
    assert_error(server.post(TEXT, text(stop=stop)), 400, param="stop")
    assert_error(server.post(CHAT, chat(stop=stop)), 400, param="stop")
    for path in (GENERATE, "/generate_stream", "/"):
        assert_lorax_error(server.post(path, generate(stop=stop)), 422, "validation", "stop")


# 18: floods, and ids out of the vocabulary
@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 2**31, 2**63, 2**70])
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_ids_out_of_the_vocabulary(server, path, token):
    body = text() if path == TEXT else chat()
    assert_error(server.post(path, {**body, "logit_bias": {str(token): 1}}), 400, param="logit_bias")
    assert_error(server.post(path, {**body, "stop_token_ids": [token]}), 400)
    assert_error(server.post(TEXT, text(prompt=[1, token])), 400, param="prompt")
    assert_error(server.post("/detokenize", {"tokens": [token]}), 400)


def test_floods_of_biases_and_stop_ids(server):
    flood = {str(idx): 1.0 for idx in range(100_000)}
    assert_error(server.post(TEXT, text(logit_bias=flood)), 400, "at most", param="logit_bias")
    assert_error(server.post(TEXT, text(stop_token_ids=list(range(100_000)))), 400, "at most", param="stop_token_ids")
    for body in (generate(logit_bias=flood), generate(stop_token_ids=[1])):  # LoRAX has neither
        assert_lorax_error(server.post(GENERATE, body), 422, "validation", "unknown field")
    full = {str(idx): -100.0 for idx in range(VOCAB_SIZE)}
    assert server.post(TEXT, text(logit_bias=full)).status_code == 200


@pytest.mark.parametrize("key", ["", " 1", "1.0", "0x1", "one", "1" * 30, "\u0661"])
def test_bias_keys_that_are_no_ids(server, key):
    assert_error(server.post(TEXT, text(logit_bias={key: 1})), 400, param="logit_bias")


# 34: adapters that do not fit
def reshape(edit):
    def spoil(path):
        tensors = load_file(path / "adapter_model.safetensors")
        name = next(key for key in sorted(tensors) if "lora_A" in key)
        tensors[name] = edit(tensors[name]).contiguous()
        save_file(tensors, path / "adapter_model.safetensors")

    return spoil


def configure(**fields):
    def spoil(path):
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))

    return spoil


UNFIT = {
    "fewer columns": (reshape(lambda a: a[:, :-1]), ("lora_A", "[4, 95]", "[4, 96]")),
    "more rows": (reshape(lambda a: a.repeat(2, 1)), ("[64, 4]", "[64, 8]")),
    "one dimension": (reshape(lambda a: a.flatten()), ("lora_A", "[384]", "[rank, 96]")),
    "rank 1e6": (configure(r=10**6), ("1000000",)),
    "rank 0": (configure(r=0), ("0",)),
    "rank of no whole number": (configure(r=4.0), ("r is 4.0", "whole number")),
    "infinite alpha": (configure(lora_alpha=float("inf")), ("lora_alpha is inf", "finite")),
    "alpha pattern that is a list": (configure(alpha_pattern=["q_proj"]), ("alpha_pattern is ['q_proj']", "object")),
    "narrower than its tensors": (configure(target_modules=["q_proj"]), ("k_proj", "target_modules", "leaves it out")),
    "beyond the range": (reshape(lambda a: a.double() * 1e300), ("lora_A", "beyond the range of float32")),
}


@pytest.mark.parametrize("name", UNFIT)
def test_adapter_that_does_not_fit_is_refused_with_shape_found_and_shape_wanted(server, adapters_dir, name):
    spoil, words = UNFIT[name]
    path = shutil.copytree(adapters_dir / "good", adapters_dir / "unfit")
    try:
        spoil(path)
        complete(path)
        assert_error(server.post(TEXT, text(model="unfit")), 400, *words)
        for route in (GENERATE, "/generate_stream", "/"):
            assert_lorax_error(server.post(route, generate(adapter_id="unfit")), 424, "generation", *words)
    finally:
        shutil.rmtree(path)


def test_adapter_of_a_larger_base_is_refused_by_its_shapes(server, adapters_dir, tmp_path):
    other = make_tiny_model(tmp_path / "other", hidden_size=128, intermediate_size=96)
    complete(make_peft_adapter(other, adapters_dir / "foreign", r=4))
    try:
        assert_error(server.post(TEXT, text(model="foreign")), 400, "128", "64")
        assert_lorax_error(server.post(GENERATE, generate(adapter_id="foreign")), 424, "generation", "128", "64")
    finally:
        shutil.rmtree(adapters_dir / "foreign")


# 2, 3: broken JSON on every route that takes a body
BROKEN = {
    "syntax": b'{"prompt": ',
    "nothing": b"",
    "white space": b" \n",
    "two values": b'{"prompt": "a"} {"prompt": "b"}',
    "trailing comma": b'{"prompt": "a",}',
    "comment": b'{"prompt": "a"} // no',
    "single quotes": b"{'prompt': 'a'}",
    "duplicate keys": b'{"prompt": "a", "prompt": "b"}',
    "duplicate keys, one escaped": b'{"prompt": "a", "pr\\u006fmpt": "b"}',
    "duplicate keys, deep": b'{"messages": [{"role": "user", "role": "system"}]}',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "Latin-1": b'{"prompt": "caf\xe9"}',
    "cut character": b'{"prompt": "\xe2\x82"}',
    "overlong character": b'{"prompt": "\xc0\xaf"}',
    "encoded surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "control character": b'{"prompt": "a\x01"}',
    "arrays nested 10,000 deep": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "objects nested 10,000 deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "nested without end": b"[" * 100_000,
    "quotes nested without end": b"[" * 65 + b'"' + b'\\"' * 64_000,
}
BODY_ROUTES = [route.path for route in ROUTES if route.body is not None and route.path != "/v1/files"]  # a form


@pytest.mark.parametrize("path", BODY_ROUTES)
def test_broken_json_is_refused_at_once_on_every_route(server, path):
    wanted = 422 if ERRORS[path] == "lorax" else 400
    for name, data in BROKEN.items():
        reply = requests.post(server.url + path, data=data, headers={"Content-Type": "application/json"}, timeout=60)
        assert reply.status_code == wanted, f"{name}: {reply.status_code} {reply.text[:300]}"
        assert reply.elapsed.total_seconds() < 20, name  # quadratic readers take half a minute
        assert len(reply.content) < 1000, name


# 50: names and headers that would write into logs, headers or pages
EVIL = [
    "\x1b[31mred",
    "a\nFAKE 2026-01-01 ERROR forged",
    "a\r\nSet-Cookie: x=1",
    "<script>alert(1)</script>",
    "\u202egnp",
    "a\0b",
]


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_names_with_escapes_or_markup_reach_no_log_header_or_page_raw(server, evil):
    num_lines = len(server.log)
    answers = [
        server.post(TEXT, text(model=evil)),
        server.post(TEXT, text(adapter_id=evil)),
        server.post(CHAT, chat(model=evil)),
        server.post("/v1/load_lora_adapter", {"lora_name": evil, "lora_path": "good"}),
        server.post("/v1/load_lora_adapter", {"lora_name": "fine", "lora_path": evil}),
        server.post("/v1/unload_lora_adapter", {"lora_name": evil}),
        server.post(GENERATE, generate(adapter_id=evil)),
        server.post(TEXT, {**text(), evil: 1}),
        requests.get(f"{server.url}/v1/models/{requests.utils.quote(evil, safe='')}", timeout=60),
        requests.get(f"{server.url}/{requests.utils.quote(evil, safe='')}", timeout=60),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.headers["Content-Type"].startswith("application/json")
        assert "Set-Cookie" not in answer.headers and evil not in str(answer.headers)
        error = answer.json()["error"]
        message = error if isinstance(error, str) else error["message"]
        assert "<" in evil or evil not in message, message  # markup is text in JSON
    logged = "".join(server.log[num_lines:])
    assert not any(char in logged for char in ("\x1b", "\u202e", "\0")), logged
    assert not any(line.startswith(("FAKE", "Set-Cookie")) for line in server.log[num_lines:])


def test_request_ids_that_would_split_headers_are_replaced(server):
    for sent in ("a b", "a;b", "<b>", "x" * 129, "é"):
        answer = requests.post(server.url + TEXT, json=text(), headers={"X-Request-Id": sent.encode()}, timeout=60)
        assert answer.status_code == 200 and answer.headers["X-Request-Id"] not in (sent, "")


# 1 to 7, 30: the same faults in LoRAX's shape
@pytest.mark.parametrize("path", [GENERATE, "/generate_stream", "/"])
def test_broken_bodies_and_names_on_loraxs_routes(server, path):
    json_type = {"Content-Type": "application/json"}
    for data in (
        b"",
        b"{",
        b'{"inputs": "a", "inputs": "b"}',
        b'{"inputs": "\xff"}',
        b"[" * 10_000,
        b'{"inputs": NaN}',
    ):
        reply = requests.post(server.url + path, data=data, headers=json_type, timeout=60)
        assert_lorax_error(reply, 422, "validation")
    reply = requests.post(server.url + path, data=b"{}", headers={**json_type, "Content-Encoding": "gzip"}, timeout=60)
    assert_lorax_error(reply, 415, "validation", "compressed")
    assert_lorax_error(server.post(path, {"inputs": "a" * 5 * 2**20}), 413, "validation")
    for name in ("../good", "/etc/passwd", "good\0", "%2e%2e/good", "http://x/y"):
        assert_lorax_error(server.post(path, generate(adapter_id=name)), 422, "validation", "valid name")
    for name in ("nobody", "some/adapter"):
        assert_lorax_error(server.post(path, generate(adapter_id=name)), 404, "generation", name)
