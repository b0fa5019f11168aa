"""/v1/embeddings, /embed and /similarity: what is asked of the engine, and what comes back."""

from __future__ import annotations

import base64
import struct

import pytest
from pooling_stand_in import HIDDEN, values_of

EMBEDDINGS = "/v1/embeddings"


async def test_texts_and_token_ids_in_every_form_are_embedded_in_order(client):
    one, two = client.ids("The fox"), client.ids("A dog")
    for sent, ids in (
        ("The fox", [one]),
        (["The fox", "A dog"], [one, two]),
        (one, [one]),
        ([one, two], [one, two]),
        (["The fox", two], [one, two]),
    ):
        client.engine.asked.clear()
        answer = await client.post(EMBEDDINGS, {"input": sent, "model": "base"})
        asked = client.engine.asked
        assert [request.prompt_token_ids for request in asked] == ids
        assert [item["index"] for item in answer["data"]] == list(range(len(ids)))
        for item, request in zip(answer["data"], asked, strict=True):
            assert item["embedding"] == pytest.approx(values_of(request)) and item["object"] == "embedding"
            assert request.pooling.task == "embed" and request.adapter_hash is None
        num = sum(map(len, ids))
        assert answer["usage"] == {"prompt_tokens": num, "total_tokens": num}
        assert answer["object"] == "list" and answer["model"] == "base"


async def test_base64_is_the_same_numbers(client):
    body = {"input": ["The fox", "A dog"], "model": "embedder"}
    floats = await client.post(EMBEDDINGS, {**body, "encoding_format": "float"})
    encoded = await client.post(EMBEDDINGS, {**body, "encoding_format": "base64"})
    for number, text in zip(floats["data"], encoded["data"], strict=True):
        assert list(struct.unpack(f"<{HIDDEN}f", base64.b64decode(text["embedding"]))) == number["embedding"]


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({}, "text: "),
        ({"input_type": "document"}, "text: "),
        ({"input_type": "passage"}, "text: "),
        ({"input_type": "query"}, "query: "),
        ({"prompt_name": "query"}, "query: "),
        ({"input_type": "search_query", "prompt_name": "query"}, "query: "),
    ],
    ids=str,
)
async def test_an_adapters_prefixes_stand_before_texts_and_not_before_ids(client, fields, prefix):
    ids = client.ids("A dog")
    await client.post(EMBEDDINGS, {"input": ["The fox", ids], "model": "embedder", **fields})
    assert [request.prompt_token_ids for request in client.engine.asked] == [client.ids(prefix + "The fox"), ids]
    assert client.engine.asked[0].adapter_hash == "embedder-1"


async def test_what_a_request_says_of_pooling_goes_to_the_engine(client):
    await client.post(EMBEDDINGS, {"input": "A dog", "pooling": "mean", "normalize": False, "dimensions": HIDDEN})
    params = client.engine.asked[-1].pooling
    assert (params.pooling, params.normalize, params.dimensions) == ("mean", False, HIDDEN)
    answer = await client.post(EMBEDDINGS, {"input": "A dog", "model": "embedder", "dimensions": 4})
    assert len(answer["data"][0]["embedding"]) == 4
    await client.post(EMBEDDINGS, {"input": "A dog", "model": "embedder", "use_activation": False})
    assert client.engine.asked[-1].pooling.normalize is False


async def test_texts_of_a_request_are_admitted_together(client):
    await client.post(EMBEDDINGS, {"input": ["The fox", "A dog", "A jug"], "adapter_id": "embedder"})
    first, *others = client.engine.asked
    assert first.is_first and not any(request.is_first for request in others)
    assert {request.together for request in others} == {first.together}
    lens = [len(request.prompt_token_ids) for request in client.engine.asked]
    assert (first.together.num, first.together.prompt_tokens) == (3, sum(lens))
    await client.post(EMBEDDINGS, {"input": "The fox"})
    assert client.engine.asked[-1].together is None and client.engine.asked[-1].is_first


async def test_long_texts_are_cut_only_where_that_is_wanted(client):
    long = "fox " * 500
    await client.refused(
        EMBEDDINGS, {"input": ["A dog", long]}, 400, "input[1]", "tokens", param="input", code="context_length_exceeded"
    )
    await client.refused(EMBEDDINGS, {"input": [7] * 129}, 400, "129 tokens", "128", param="input")
    assert not client.engine.asked
    for limit, num in ((-1, 128), (5, 5)):
        client.engine.asked.clear()
        await client.post(EMBEDDINGS, {"input": [long, [7] * 300, "A"], "truncate_prompt_tokens": limit})
        assert [len(request.prompt_token_ids) for request in client.engine.asked[:2]] == [num, num]
        assert client.engine.asked[0].prompt_token_ids == client.ids(long)[:num]


async def test_an_adapters_own_limit_and_end_hold(client):
    long = "The quick brown fox jumps over the lazy dog"
    assert len(client.ids(long)) > 6
    await client.refused(EMBEDDINGS, {"input": long, "model": "short"}, 400, "at most 6", param="input")
    await client.post(EMBEDDINGS, {"input": long, "model": "short", "truncate_prompt_tokens": -1})
    assert client.engine.asked[-1].prompt_token_ids == [*client.ids(long)[:5], client.tokenizer.eos_token_id]


# -- text-embeddings-inference


async def test_embed_is_a_list_of_lists_whatever_is_sent(client):
    want = [item["embedding"] for item in (await client.post(EMBEDDINGS, {"input": ["The fox", "A dog"]}))["data"]]
    assert await client.post("/embed", {"inputs": ["The fox", "A dog"]}) == want
    assert await client.post("/embed", {"inputs": "The fox", "truncate": True}) == want[:1]
    assert await client.post("/embed", {"inputs": client.ids("The fox")}) == want[:1]
    assert await client.post("/embed", {"inputs": [client.ids("A dog"), "The fox"]}) == want[::-1]
    await client.post("/embed", {"inputs": "The fox", "prompt_name": "query", "model": "embedder", "normalize": False})
    assert client.engine.asked[-1].prompt_token_ids == client.ids("query: The fox")
    assert client.engine.asked[-1].pooling.normalize is False
    answer = await client.post("/embed", {"inputs": "The fox", "adapter_id": "embedder", "dimensions": 4})
    assert len(answer[0]) == 4
    await client.refused_as_lorax("/embed", {"inputs": "fox " * 500}, "truncate: true")
    await client.post("/embed", {"inputs": "fox " * 500, "truncate": True})
    assert len(client.engine.asked[-1].prompt_token_ids) == 128
    await client.refused_as_lorax("/embed", {"inputs": "A", "truncation_direction": "Left"}, "truncation_direction")


async def test_embed_with_parameters_or_stream_is_loraxs(client):
    (want,) = await client.post("/embed", {"inputs": "The fox"})
    assert await client.post("/embed", {"inputs": "The fox", "parameters": None, "stream": False}) == {
        "embeddings": want
    }
    body = {"inputs": "The fox", "parameters": {"adapter_id": "embedder", "adapter_source": "local", "api_token": "x"}}
    await client.post("/embed", body)
    assert client.engine.asked[-1].adapter_hash == "embedder-1"
    await client.post("/embed", {"inputs": "The fox", "parameters": {"adapter_id": "__base_model__"}})
    assert client.engine.asked[-1].adapter_hash is None
    for parameters, word in (
        ({"adapter_source": "hub"}, "adapter_source"),
        ({"merged_adapters": {"ids": []}}, "merge"),
    ):
        await client.refused_as_lorax("/embed", {"inputs": "A", "parameters": parameters}, word)
    await client.refused_as_lorax("/embed", {"inputs": "A", "stream": True}, "stream")
    await client.refused_as_lorax("/embed", {"inputs": ["A"], "stream": False}, "inputs")


async def test_similarity_is_the_cosine_with_each_sentence(client):
    sentences = {"source_sentence": "The fox", "sentences": ["The fox", "0123 []", "The dog"]}
    same, other, near = await client.post("/similarity", {"inputs": sentences, "parameters": {}})
    assert same == pytest.approx(1.0) and other < near < 1.0
    assert await client.post("/similarity", {"inputs": sentences, "model": "embedder"}) != [same, other, near]
    await client.refused_as_lorax("/similarity", {"inputs": {"source_sentence": "A", "sentences": []}}, "sentences")
