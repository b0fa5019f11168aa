"""Re-ranking and scores in the shapes of Cohere, Jina, vLLM and text-embeddings-inference."""

from __future__ import annotations

import pytest
from pooling_stand_in import values_of

from specserve.pooled_values import sigmoid

DOCUMENTS = ["A lazy dog", "Pack my box with five dozen jugs", "fox"]
BODY = {"model": "ranker", "query": "Who jumps?"}
RERANKS = ("/rerank", "/v1/rerank", "/v2/rerank")


def scores(client):
    """What the engine said of each document, by its index."""
    requests = sorted(client.engine.asked, key=lambda request: int(request.request_id.rpartition("-")[2]))
    return [sigmoid(values_of(request)[0]) for request in requests]


@pytest.mark.parametrize("path", RERANKS)
async def test_documents_come_best_first_with_their_place_and_score(client, path):
    answer = await client.post(path, {**BODY, "documents": DOCUMENTS})
    want = scores(client)
    order = sorted(range(3), key=lambda idx: -want[idx])
    assert [result["index"] for result in answer["results"]] == order
    assert [result["relevance_score"] for result in answer["results"]] == [want[idx] for idx in order]
    pairs = [client.ids(f"Query: Who jumps?\nDocument: {document}") for document in DOCUMENTS]
    assert [request.prompt_token_ids for request in client.engine.asked] == pairs
    num = sum(map(len, pairs))
    assert answer["usage"] == {"prompt_tokens": num, "total_tokens": num}
    assert answer["meta"]["tokens"] == {"input_tokens": num, "output_tokens": 0}
    assert answer["model"] == "ranker" and answer["id"].startswith("rerank-") and "warnings" not in answer["meta"]
    has_texts = ["document" in result for result in answer["results"]]
    assert has_texts == [path != "/v2/rerank"] * 3  # as each API does where nothing is said


async def test_fewer_results_raw_scores_and_documents_as_objects(client):
    objects = [{"text": text, "id": idx} for idx, text in enumerate(DOCUMENTS)]
    answer = await client.post("/v2/rerank", {**BODY, "documents": objects, "top_n": 2, "return_documents": True})
    assert len(answer["results"]) == 2
    assert all(result["document"] == {"text": DOCUMENTS[result["index"]]} for result in answer["results"])
    for top_n in (0, 3, 100):
        answer = await client.post(
            "/rerank", {**BODY, "documents": DOCUMENTS, "top_n": top_n, "return_documents": False}
        )
        assert len(answer["results"]) == 3 and "document" not in answer["results"][0]
    raw = await client.post("/rerank", {**BODY, "documents": DOCUMENTS, "use_activation": False})
    assert [sigmoid(result["relevance_score"]) for result in raw["results"]] == [
        result["relevance_score"] for result in answer["results"]
    ]


async def test_documents_are_cut_to_what_fits_and_the_answer_says_which(client):
    long = "fox " * 500
    answer = await client.post("/v2/rerank", {**BODY, "documents": ["A dog", long]})
    assert [len(request.prompt_token_ids) for request in client.engine.asked][1] == 128
    assert answer["meta"]["warnings"] == ["1 documents were cut to what fits: 1"]
    client.engine.asked.clear()
    body = {**BODY, "documents": [" fox", " fox fox fox"], "max_tokens_per_doc": len(client.ids(" fox fox"))}
    answer = await client.post("/v2/rerank", body)
    assert answer["meta"]["warnings"] == ["1 documents were cut to what fits: 1"]
    assert client.engine.asked[1].prompt_token_ids == client.ids("Query: Who jumps?\nDocument:  fox fox")
    refused = {**BODY, "documents": ["A dog", long], "truncation": False}
    await client.refused("/rerank", refused, 400, "documents[1]", param="documents", code="context_length_exceeded")
    await client.refused("/v2/rerank", {**BODY, "query": long, "documents": ["A"]}, 400, "query", param="query")


async def test_rerank_with_texts_is_text_embeddings_inferences(client):
    answer = await client.post("/rerank", {**BODY, "texts": DOCUMENTS, "return_text": True})
    want = await client.post("/rerank", {**BODY, "documents": DOCUMENTS})
    assert answer == [
        {"index": result["index"], "score": result["relevance_score"], "text": result["document"]["text"]}
        for result in want["results"]
    ]
    answer = await client.post("/rerank", {**BODY, "texts": DOCUMENTS, "raw_scores": True})
    assert [sigmoid(rank["score"]) for rank in answer] == [result["relevance_score"] for result in want["results"]]
    assert all("text" not in rank for rank in answer)
    for body, word in (({"texts": []}, "texts"), ({"texts": ["A"], "query": ""}, "query"), ({"texts": "A"}, "texts")):
        await client.refused_as_lorax("/rerank", {**BODY, **body}, word)


@pytest.mark.parametrize(
    ("first", "second"), [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
async def test_scores_of_pairs_by_a_re_ranker(client, first, second):
    answer = await client.post("/score", {"model": "ranker", first: "Who jumps?", second: DOCUMENTS})
    assert [item["score"] for item in answer["data"]] == scores(client)
    assert [item["index"] for item in answer["data"]] == [0, 1, 2] and answer["object"] == "list"
    client.engine.asked.clear()
    queries = ["Who?", "What?"]
    answer = await client.post("/score", {"model": "ranker", first: queries, second: DOCUMENTS[:2]})
    texts = zip(queries, DOCUMENTS[:2], strict=True)
    pairs = [client.ids(f"Query: {query}\nDocument: {text}") for query, text in texts]
    assert [request.prompt_token_ids for request in client.engine.asked] == pairs
    assert [item["score"] for item in answer["data"]] == scores(client)


async def test_scores_by_an_embedder_or_the_base_are_cosines(client):
    vectors = await client.post("/v1/embeddings", {"input": ["A dog", "A dog", "0123"]})
    one, same, other = (item["embedding"] for item in vectors["data"])
    answer = await client.post("/score", {"text_1": "A dog", "text_2": ["A dog", "0123"]})
    want = [sum(a * b for a, b in zip(one, vector, strict=True)) for vector in (same, other)]
    assert [item["score"] for item in answer["data"]] == pytest.approx(want, abs=1e-6)
    client.engine.asked.clear()
    await client.post("/score", {"model": "embedder", "text_1": "A dog", "text_2": "A dog"})
    asked = [request.prompt_token_ids for request in client.engine.asked]
    assert asked == [client.ids("query: A dog"), client.ids("text: A dog")]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_1": "A"}, "text_1"),
        ({"text_1": "A", "documents": "A"}, "text_1"),
        ({"text_1": "A", "text_2": "A", "queries": "A"}, "text_1"),
        ({"text_1": ["A", "A"], "text_2": ["A", "A", "A"]}, "text_1"),
        ({"text_1": ["A", "A"], "text_2": "A"}, "text_1"),
        ({"text_1": "A", "text_2": []}, "text_2"),
        ({"text_1": "", "text_2": "A"}, "text_1"),
        ({"queries": "A", "documents": ["A", ""]}, "documents"),
    ],
    ids=str,
)
async def test_sides_that_do_not_match_are_refused(client, body, param):
    await client.refused("/score", {"model": "ranker", **body}, 400, param=param)
    assert not client.engine.asked


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": ["A", ""]}, "documents"),
        ({"documents": "A"}, "documents"),
        ({"documents": [{"title": "A"}]}, "documents[0].text"),
        ({"top_n": -1}, "top_n"),
        ({"max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        ({"rank_fields": ["title"]}, "rank_fields"),
        ({"max_chunks_per_doc": 10}, "max_chunks_per_doc"),
        ({"relevant_spans": {"enabled": True}}, "relevant_spans"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"made_up": 1}, "made_up"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", RERANKS)
async def test_bad_fields_are_refused_by_name(client, path, fields, param):
    await client.refused(path, {**BODY, "documents": ["A"], **fields}, 400, param=param)
    assert not client.engine.asked
