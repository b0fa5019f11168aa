"""langchain-openai: chat, streams, completions, structured output, tools, embeddings; langchain-cohere: compressing."""

from typing import Literal

from cases import DOCUMENTS, check_answer, run
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """An answer."""

    model_config = ConfigDict(extra="forbid")  # or a model that knows nothing adds properties for ever

    ok: bool
    level: Literal["low", "high"]


@tool
def set_level(ok: bool, level: Literal["low", "high"]) -> str:
    """Set the level."""
    return "done"


def chat(url, key, **fields):
    return ChatOpenAI(base_url=f"{url}/v1", api_key=key, model="tiny", temperature=0, max_retries=0, **fields)


def case_chat_and_its_stream(url, key):
    model = chat(url, key, max_completion_tokens=24, stream_usage=True)
    whole = model.invoke("Say hello")
    chunks = list(model.stream("Say hello"))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert (
        sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata)
        == (whole.usage_metadata["output_tokens"])
    )


def case_completions(url, key):
    model = OpenAI(base_url=f"{url}/v1", api_key=key, model="alpha", max_tokens=8, temperature=0, max_retries=0)
    assert "".join(model.stream("The quick")) == model.invoke("The quick")


async def case_async(url, key):
    model = chat(url, key, max_completion_tokens=12)
    texts = [chunk.content async for chunk in model.astream("Say hello")]
    assert "".join(texts) == (await model.ainvoke("Say hello")).content


def case_structured_json_schema(url, key):
    model = chat(url, key, max_completion_tokens=200).with_structured_output(Answer, method="json_schema")
    answer = model.invoke("Say hello")
    check_answer(answer.ok, answer.level)


def case_tools(url, key):
    model = chat(url, key, max_completion_tokens=200).bind_tools([set_level], tool_choice="set_level")
    call = model.invoke("Say hello").tool_calls[0]
    assert call["name"] == "set_level"
    check_answer(**call["args"])
    answer = chat(url, key, max_completion_tokens=200).with_structured_output(Answer, method="function_calling")
    check_answer(**answer.invoke("Say hello").model_dump())


async def case_embeddings(url, key):
    """Without the check of lengths, for which it would send ids of another model's tokenizer."""
    fields = {"base_url": f"{url}/v1", "api_key": key, "check_embedding_ctx_length": False}
    model = OpenAIEmbeddings(model="embedder", **fields)
    vectors = model.embed_documents(DOCUMENTS)
    assert len(vectors) == 3 and vectors[0] == model.embed_query(DOCUMENTS[0])
    assert await model.aembed_documents(DOCUMENTS) == vectors
    query = OpenAIEmbeddings(model="embedder", model_kwargs={"extra_body": {"input_type": "query"}}, **fields)
    assert query.embed_query(DOCUMENTS[0]) != vectors[0]


async def case_compressor(url, key):
    compressor = CohereRerank(model="ranker", cohere_api_key=key, base_url=url, top_n=2)
    documents = [Document(text, metadata={"id": idx}) for idx, text in enumerate(DOCUMENTS)]
    found = compressor.compress_documents(documents, "Who jumps?")
    scores = [document.metadata["relevance_score"] for document in found]
    assert len(found) == 2 and scores == sorted(scores, reverse=True)
    assert all(document.page_content == DOCUMENTS[document.metadata["id"]] for document in found)
    again = await compressor.acompress_documents(documents, "Who jumps?")
    assert [document.page_content for document in again] == [document.page_content for document in found]


def case_responses_api(url, key):
    model = chat(url, key, max_completion_tokens=24, use_responses_api=True)
    whole = model.invoke("Say hello")
    assert whole.text and whole.text == chat(url, key, max_completion_tokens=24).invoke("Say hello").content
    chunks = list(model.stream("Say hello"))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    turn = [("human", "Say hello"), whole, ("human", "Again")]
    assert model.invoke(turn).usage_metadata["input_tokens"] > whole.usage_metadata["input_tokens"]


def case_responses_api_tools_and_formats(url, key):
    model = chat(url, key, max_completion_tokens=200, use_responses_api=True)
    bound = model.bind_tools([set_level], tool_choice="set_level")
    first = bound.invoke("Say hello")
    check_answer(**first.tool_calls[0]["args"])
    result = set_level.invoke(first.tool_calls[0])
    after = chat(url, key, max_completion_tokens=24, use_responses_api=True).invoke([("human", "Hi"), first, result])
    assert after.text
    streamed = None
    for chunk in bound.stream("Say hello"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["args"] == first.tool_calls[0]["args"]
    answer = model.with_structured_output(Answer, method="json_schema").invoke("Say hello")
    check_answer(answer.ok, answer.level)


if __name__ == "__main__":
    run(globals())
