"""cohere: rerank of both versions, sync and async, and errors."""

import cohere
from cases import DOCUMENTS, run
from cohere.core.api_error import ApiError

FIELDS = {"model": "ranker", "query": "Who jumps?", "documents": DOCUMENTS}


def check(results, documents=DOCUMENTS) -> None:
    scores = [result.relevance_score for result in results]
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
    assert {result.index for result in results} <= set(range(len(documents)))


def case_rerank_v2(url, key):
    client = cohere.ClientV2(key, base_url=url)
    whole = client.rerank(**FIELDS)
    check(whole.results)
    assert len(whole.results) == len(DOCUMENTS) and whole.id and whole.meta.tokens.input_tokens > 0
    first = client.rerank(**FIELDS, top_n=1, max_tokens_per_doc=4096)
    assert [first.results[0].index] == [whole.results[0].index] and len(first.results) == 1


def case_rerank_v1(url, key):
    documents = [{"text": text} for text in DOCUMENTS]
    answer = cohere.Client(key, base_url=url).rerank(**{**FIELDS, "documents": documents}, return_documents=True)
    check(answer.results)
    assert all(result.document.text == DOCUMENTS[result.index] for result in answer.results)


async def case_async(url, key):
    client = cohere.AsyncClientV2(key, base_url=url)
    check((await client.rerank(**FIELDS)).results)


def case_errors(url, key):
    client = cohere.ClientV2(key, base_url=url)
    for fields, status in (({"model": "nobody"}, 404), ({"model": "embedder"}, 400), ({"documents": []}, 400)):
        try:
            client.rerank(**{**FIELDS, **fields})
        except ApiError as error:
            assert error.status_code == status and error.body["error"]["message"], error
        else:
            raise AssertionError(f"{fields} was served")


if __name__ == "__main__":
    run(globals())
