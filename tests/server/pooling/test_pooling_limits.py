"""What pooling refuses and survives: bad texts, wrong kinds, too much, keys, deadlines, engines, clients that leave."""

from __future__ import annotations

import asyncio
import time

import pytest
from pooling_stand_in import ADAPTERS
from waiting import until

from specserve.errors import EngineLostError, OverloadedError, UserError
from specserve.server.access.key_file import entry_text, new_key
from specserve.server.pooling import texts as texts_module

EMBEDDINGS = "/v1/embeddings"
# Route, body without a model, and adapters of the kind that it takes.
ROUTES = [
    (EMBEDDINGS, {"input": "A dog"}, ("embedder", "short")),
    ("/v1/rerank", {"query": "Who?", "documents": ["A dog"]}, ("ranker",)),
    ("/v2/rerank", {"query": "Who?", "documents": ["A dog"]}, ("ranker",)),
    ("/rerank", {"query": "Who?", "documents": ["A dog"]}, ("ranker",)),
    ("/score", {"text_1": "Who?", "text_2": "A dog"}, ("ranker", "embedder", "short")),
    ("/classify", {"input": "A dog"}, ("tagger", "mood")),
    ("/pooling", {"input": "A dog"}, ("embedder", "short", "ranker", "tagger", "mood")),
]
LORAX_ROUTES = [
    ("/embed", {"inputs": "A dog"}, ("embedder", "short")),
    ("/rerank", {"query": "Who?", "texts": ["A dog"]}, ("ranker",)),
    ("/predict", {"inputs": "A dog"}, ("tagger", "mood")),
    ("/similarity", {"inputs": {"source_sentence": "A", "sentences": ["A"]}}, ("embedder", "short")),
    ("/classify", {"inputs": "A dog"}, ("tagger", "mood")),
    ("/classify_batch", {"inputs": ["A dog"]}, ("tagger", "mood")),
]
SERVED_AT = {
    "embed": "/v1/embeddings",
    "rerank": "/v1/rerank",
    "classify": "/classify",
    "generate": "/v1/chat/completions",
}


async def test_a_request_of_the_wrong_kind_is_told_where_to_go(client):
    for path, body, takes in ROUTES:
        for name, (kind, _) in ADAPTERS.items():
            if name in takes:
                await client.post(path, {**body, "model": name})
            else:
                where = SERVED_AT[kind]
                await client.refused(
                    path, {**body, "model": name}, 400, repr(name), where, param="model", code="wrong_adapter_type"
                )
        if "embedder" not in takes:  # the base model embeds, and nothing else
            await client.refused(path, body, 400, "names none", param="model", code="wrong_adapter_type")
    for path, body, takes in LORAX_ROUTES:
        for name, (kind, _) in ADAPTERS.items():
            if name not in takes:
                await client.refused_as_lorax(path, {**body, "model": name}, repr(name), SERVED_AT[kind])
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
    ):
        await client.refused(path, {**body, "model": "embedder"}, 400, "/v1/embeddings", code="wrong_adapter_type")
    lorax = {"inputs": "Hi", "parameters": {"adapter_id": "tagger"}}
    await client.refused_as_lorax("/generate", lorax, "/classify")


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ("", ["input is an empty text"]),
        ([], ["input is an empty list"]),
        ([""], ["input[0] is empty"]),
        (["A", ""], ["input[1] is empty"]),
        ([[]], ["input[0] is empty"]),
        ([[5], []], ["input[1] is empty"]),
        ([5, "A"], ["input[0] is int"]),
        ([None], ["input[0] is NoneType"]),
        ([True, True], ["input[0] is bool"]),
        ([[5, "A"]], ["input[0] is list"]),
        ([320], ["320", "319"]),
        ([[5], [-1]], ["input[1]", "-1"]),
        ([10**30], ["319"]),
        (5, ["input"]),
        ({"text": "A"}, ["input"]),
        (["A"] * 100_000, ["100000", "2048"]),
        ([[5]] * 2049, ["2049", "2048"]),
        ([7] * 129, ["129 tokens", "128"]),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("path", [EMBEDDINGS, "/embed"])
async def test_texts_that_cannot_be_pooled_are_refused_by_their_place(client, path, sent, words):
    if path == EMBEDDINGS:
        await client.refused(path, {"input": sent}, 400, *words, param="input")
    else:
        await client.refused_as_lorax(path, {"inputs": sent}, *[word.replace("input", "inputs") for word in words])
    assert not client.engine.asked


async def test_too_many_texts_are_refused_on_every_route(client):
    many = ["A"] * 100_000
    for path, body, model in (
        ("/v1/rerank", {"query": "Who?", "documents": many}, "ranker"),
        ("/score", {"text_1": "Who?", "text_2": many}, "ranker"),
        ("/classify", {"input": many}, "mood"),
        ("/pooling", {"input": many}, "mood"),
    ):
        await client.refused(path, {**body, "model": model}, 400, "100000", "2048", code="too_many_inputs")
    for path, body in (
        ("/rerank", {"query": "Who?", "texts": many, "model": "ranker"}),
        ("/predict", {"inputs": [["A"]] * 100_000, "model": "mood"}),
        ("/similarity", {"inputs": {"source_sentence": "A", "sentences": many}}),
        ("/classify_batch", {"inputs": many, "model": "mood"}),
    ):
        await client.refused_as_lorax(path, body, "100000", "2048")
    assert not client.engine.asked


async def test_too_many_tokens_in_all_are_refused_before_all_of_them_are_read(client, monkeypatch):
    monkeypatch.setattr(texts_module, "MAX_TOKENS", 100)
    await client.refused(EMBEDDINGS, {"input": [[7] * 60, [7] * 60]}, 400, "120", "100", code="too_many_tokens")
    query = "fox " * 20
    body = {"model": "ranker", "query": query, "documents": ["A"] * 50}
    read = []
    monkeypatch.setattr(texts_module, "pair_ids", lambda *args: read.append(args))
    await client.refused("/v1/rerank", body, 400, "100", param="documents", code="too_many_tokens")
    assert not read and not client.engine.asked


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 5}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 17}, "dimensions"),
        ({"pooling": "mean"}, "pooling"),
        ({"pooling": "max"}, "pooling"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"embed_dtype": "float16"}, "embed_dtype"),
        ({"endianness": "big"}, "endianness"),
        ({"input_type": "image"}, "input_type"),
        ({"prompt_name": "made-up"}, "prompt_name"),
        ({"prompt_name": "query", "input_type": "document"}, "prompt_name"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"messages": [{"role": "user", "content": "A dog"}]}, "messages"),
        ({"input": None, "messages": []}, "input"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"add_special_tokens": False}, "add_special_tokens"),
        (
            {"input": None, "messages": [{"role": "user", "content": "A"}], "add_special_tokens": True},
            "add_special_tokens",
        ),
        ({"cache_salt": "x" * 2000}, "cache_salt"),
        ({"priority": -1}, "priority"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"adapter_id": "ranker"}, "adapter_id"),
        ({"made_up": 1}, "made_up"),
    ],
    ids=str,
)
async def test_fields_out_of_range_are_refused_by_name(client, fields, param):
    await client.refused(EMBEDDINGS, {"input": "A dog", "model": "embedder", **fields}, 400, param=param)
    assert not client.engine.asked


async def test_a_value_that_is_none_of_a_few_is_answered_with_these_and_not_repeated_at_length(client):
    body = {"input": "A dog", "encoding_format": "x" * 10_000}
    error = await client.refused(EMBEDDINGS, body, 400, "'float'", "'base64'", param="encoding_format")
    assert len(str(error)) < 800
    body = {"model": "tiny", "prompt": "A", "speculation": {"mode": "fast"}}
    await client.refused("/v1/completions", body, 400, "'fast'", "'ngram'", param="speculation.mode")


async def test_shorter_embeddings_are_for_adapters_that_were_trained_for_them(client):
    body = {"input": "A dog", "dimensions": 4}
    await client.refused(EMBEDDINGS, body, 400, "the base model gives 16", param="dimensions")
    await client.refused(EMBEDDINGS, {**body, "model": "short"}, 400, "gives 16", param="dimensions")
    await client.refused(
        EMBEDDINGS, {**body, "model": "embedder", "dimensions": 3}, 400, "4 or 8 or 16", param="dimensions"
    )


async def test_unknown_models_broken_json_and_other_methods(client):
    await client.refused(EMBEDDINGS, {"input": "A", "model": "some/model"}, 404, code="model_not_found")
    for path in (EMBEDDINGS, "/classify", "/rerank"):
        response = await client.http.post(path, data=b'{"input": ', headers={"Content-Type": "application/json"})
        assert response.status == 400 and (await response.json())["error"]["type"] == "invalid_request_error"
        assert (await client.http.get(path)).status == 405
        for value in ([], 5, "texts", "inputs", ["inputs"]):
            await client.post(path, value, 400)
    response = await client.http.post("/embed", data=b'{"inputs": ', headers={"Content-Type": "application/json"})
    assert response.status == 422 and (await response.json())["error_type"] == "validation"


async def test_the_address_may_name_the_model(client):
    await client.post("/predict?model=mood", {"inputs": "A dog"})
    await client.post(f"{EMBEDDINGS}?model=embedder", {"input": "A dog", "model": "embedder"})
    assert [request.adapter_hash for request in client.engine.asked] == ["mood-1", "embedder-1"]
    await client.refused(f"{EMBEDDINGS}?model=embedder", {"input": "A", "model": "short"}, 400, param="model")
    await client.refused(f"{EMBEDDINGS}?made_up=1", {"input": "A"}, 400, param="made_up")
    await client.refused_as_lorax("/embed?model=nobody", {"inputs": "A"}, "nobody", status=404, error_type="generation")


# -- the engine


async def test_an_error_of_one_text_ends_the_request_and_aborts_the_others(client):
    client.engine.gate.clear()
    client.engine.refusals = [OverloadedError("full", retry_after_s=7)]
    await client.refused(EMBEDDINGS, {"input": ["A", "B", "C"]}, 429, "full", code="overloaded")
    assert client.headers["Retry-After"] == "7" and len(client.engine.aborted) == len(client.engine.asked) - 1
    client.engine.gate.set()
    await client.post(EMBEDDINGS, {"input": ["A", "B", "C"]})


async def test_a_score_head_that_gives_no_numbers_fails_its_request_alone(client):
    error = UserError("values that are not finite", status=500, code="model_failure")
    error.type = "server_error"
    client.engine.refusals = [error]
    sent = {"model": "mood", "input": ["A"]}
    await client.refused("/classify", sent, 500, "input[0]", "'mood'", "not finite", code="model_failure")
    client.engine.refusals = [error]
    body = {"model": "mood", "inputs": "A"}
    await client.refused_as_lorax("/predict", body, "not finite", status=424, error_type="generation")
    await client.post("/predict", body)


async def test_an_adapter_that_had_to_make_room_is_loaded_again_and_must_be_the_same(client):
    gone = UserError("not loaded", code="adapter_not_resident", status=409)
    client.engine.refusals = [gone]
    await client.post(EMBEDDINGS, {"input": ["A dog", "A fox"], "model": "embedder"})
    assert client.store.lost == ["embedder-1"] and len(client.engine.asked) == 3

    async def replaced(name, priority=0):
        client.store.versions[name] = 2
        return client.store.info(name)

    client.engine.refusals = [gone]
    client.store.resolve = replaced
    body = {"input": ["A dog", "A fox"], "model": "embedder"}
    await client.refused(EMBEDDINGS, body, 409, "other files", code="adapter_changed")
    await client.post(EMBEDDINGS, body)
    assert client.engine.asked[-1].adapter_hash == "embedder-2"


async def test_texts_outlive_their_engine(client):
    client.engine.refusals = [EngineLostError("it ended")]
    answer = await client.post(EMBEDDINGS, {"input": ["A dog", "A fox"]})
    assert len(answer["data"]) == 2 and len(client.engine.asked) == 3


async def test_a_client_that_leaves_aborts_its_texts(client):
    client.engine.gate.clear()
    task = asyncio.create_task(client.http.post(EMBEDDINGS, json={"input": ["A", "B"]}))
    await until(lambda: len(client.engine.asked) == 2)
    task.cancel()
    await until(lambda: len(client.engine.aborted) == 2)
    assert await client.metric('specserve_request_success_total{engine="0",finished_reason="abort"') == 2


async def test_deadlines_reach_the_engine_and_end_the_request(client):
    before = time.monotonic()
    await client.post(EMBEDDINGS, {"input": "A", "deadline_ms": 60_000, "priority": 3})
    (request,) = client.engine.asked
    assert before + 59 < request.deadline < time.monotonic() + 61 and request.priority == 3
    client.engine.gate.clear()
    body = {"input": ["A", "B"], "deadline_ms": 500}  # both have been asked for by then
    await client.refused(EMBEDDINGS, body, 504, "deadline_ms", code="deadline_exceeded")
    await until(lambda: len(client.engine.aborted) == 2)


async def test_a_request_may_not_take_for_ever(make_client):
    client = await make_client(request_timeout_s=0.05)
    client.engine.gate.clear()
    await client.refused(EMBEDDINGS, {"input": "A"}, 504, "--request-timeout-s", code="timeout")


# -- keys, counts, logs


async def test_keys_limit_pooling_as_they_limit_generation(make_client, tmp_path):
    keys = {name: new_key() for name in ("red", "blue", "admin")}
    fields = {
        "red": {"adapters": ["embed*"], "tokens_per_minute": 40},
        "blue": {"priority": True},
        "admin": {"scopes": ["admin"]},
    }
    path = tmp_path / "keys.yaml"
    path.write_text("".join(entry_text(name, keys[name], fields[name]) for name in keys))
    client = await make_client(api_keys_file=str(path))

    def auth(name):
        return {"headers": {"Authorization": f"Bearer {keys[name]}"}}

    await client.refused(EMBEDDINGS, {"input": "A"}, 401, code="invalid_api_key")
    await client.refused(EMBEDDINGS, {"input": "A"}, 403, code="insufficient_scope", **auth("admin"))
    await client.refused("/classify", {"input": "A", "model": "mood"}, 404, code="model_not_found", **auth("red"))
    body = {"input": [[7] * 10, [8] * 10], "model": "embedder", "cache_salt": "s"}
    await client.post(EMBEDDINGS, body, **auth("red"))
    assert {request.caller for request in client.engine.asked} == {"red"}
    assert {request.cache_salt for request in client.engine.asked} == {"3:red:s"}
    assert client.headers["x-ratelimit-remaining-tokens"] == "20"
    await client.post(EMBEDDINGS, body, **auth("red"))
    await client.refused(EMBEDDINGS, body, 429, "tokens_per_minute", code="rate_limit_exceeded", **auth("red"))
    refused = {"input": "A", "priority": 5}
    await client.refused(EMBEDDINGS, refused, 403, "priority", code="priority_not_allowed", **auth("red"))
    await client.post(EMBEDDINGS, refused, **auth("blue"))
    assert client.engine.asked[-1].cache_salt == "4:blue:"


async def test_a_request_that_fails_costs_nothing(make_client, tmp_path):
    key = new_key()
    path = tmp_path / "keys.yaml"
    path.write_text(entry_text("red", key, {"tokens_per_minute": 40}))
    client = await make_client(api_keys_file=str(path))
    client.engine.refusals = [OverloadedError("full")]
    headers = {"headers": {"Authorization": f"Bearer {key}"}}
    await client.refused(EMBEDDINGS, {"input": [7] * 30}, 429, code="overloaded", **headers)
    assert client.headers["x-ratelimit-remaining-tokens"] == "40"
    await client.post(EMBEDDINGS, {"input": [7] * 30}, **headers)
    assert client.headers["x-ratelimit-remaining-tokens"] == "10"


async def test_pooling_is_counted_under_vllms_names_and_has_a_line_in_the_log(client, caplog):
    with caplog.at_level("INFO"):
        await client.post(EMBEDDINGS, {"input": [[7] * 10, [8] * 5], "model": "embedder"})
    lines = [record.getMessage() for record in caplog.records if "'embedder'" in record.getMessage()]
    assert len(lines) == 1 and "pooled, 2 of 2 texts, 15 tokens (2 cached)" in lines[0]
    labels = '{engine="0",'
    assert await client.metric(f'specserve_request_success_total{labels}finished_reason="stop"') == 2
    assert await client.metric(f'specserve_prompt_tokens_total{labels}model="embedder"') == 15
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prompt_tokens"):
        assert await client.metric(f"specserve_{name}_count") == 2
    assert await client.metric("specserve_time_to_first_token_seconds_count") == 0
    assert await client.metric('specserve_http_requests_total{route="/v1/embeddings",status="200"}') == 1


async def test_requests_are_refused_during_a_drain_and_beyond_what_may_be_in_the_server(make_client):
    client = await make_client(max_concurrent_requests=1)
    client.engine.gate.clear()
    running = asyncio.create_task(client.http.post(EMBEDDINGS, json={"input": "A"}))
    await until(lambda: client.engine.asked)
    await client.refused(EMBEDDINGS, {"input": "A"}, 429, "--max-concurrent-requests")
    client.engine.gate.set()
    assert (await running).status == 200
    client.server.middlewares.draining = True
    await client.refused(EMBEDDINGS, {"input": "A"}, 503, code="shutting_down")
    await client.refused_as_lorax(
        "/embed", {"inputs": "A"}, "shutting down", status=503, error_type="incomplete_generation"
    )


async def test_a_body_over_the_limit_is_not_read(make_client):
    client = await make_client(max_body_mib=0.01)
    await client.refused(EMBEDDINGS, {"input": "A" * 20_000}, 413, "--max-body-mib", code="body_too_large")
