"""litellm: completion, streams, text completion, structured output, tools, errors."""

import json

import litellm
from cases import DOCUMENTS, MESSAGES, SCHEMA, TOOL, check_answer, run


def ask(url, key, **fields):
    base = {"model": "openai/tiny", "messages": MESSAGES, "max_tokens": 24, "temperature": 0, "num_retries": 0}
    return litellm.completion(**{**base, "api_base": f"{url}/v1", "api_key": key, **fields})


def case_completion_and_its_stream(url, key):
    whole = ask(url, key).choices[0].message.content
    chunks = list(ask(url, key, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole


def case_text_completion(url, key):
    answer = litellm.text_completion(
        model="text-completion-openai/alpha", prompt="The quick", max_tokens=8, api_base=f"{url}/v1", api_key=key
    )
    assert answer.choices[0].text


async def case_async(url, key):
    fields = {"model": "openai/tiny", "messages": MESSAGES, "max_tokens": 12, "api_base": f"{url}/v1", "api_key": key}
    assert (await litellm.acompletion(**fields)).usage.completion_tokens > 0


def case_embedding_and_rerank(url, key):
    fields = {"api_base": f"{url}/v1", "api_key": key}
    answer = litellm.embedding(model="openai/embedder", input=DOCUMENTS, **fields)
    assert [item["index"] for item in answer.data] == [0, 1, 2] and answer.usage.prompt_tokens > 0
    for provider in ("cohere", "hosted_vllm", "jina_ai"):
        base = url if provider == "hosted_vllm" else f"{url}/v1/rerank"
        ranked = litellm.rerank(
            model=f"{provider}/ranker", query="Who?", documents=DOCUMENTS, api_base=base, api_key=key, top_n=2
        )
        assert len(ranked.results) == 2, provider
        assert ranked.results[0]["relevance_score"] >= ranked.results[1]["relevance_score"], provider


def case_errors(url, key):
    try:
        ask(url, key, model="openai/some/model")
    except litellm.NotFoundError:
        return
    raise AssertionError("an unknown model was served")


def case_structured_json_schema(url, key):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    check_answer(**json.loads(ask(url, key, max_tokens=100, response_format=form).choices[0].message.content))


def case_tools(url, key):
    answer = ask(url, key, max_tokens=200, tools=[TOOL], tool_choice="required")
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "set_level"
    check_answer(**json.loads(call.function.arguments))


if __name__ == "__main__":
    run(globals())
