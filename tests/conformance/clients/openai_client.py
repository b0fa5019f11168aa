"""The openai package: sync, async, streams, structured output with pydantic models, tools; chat and responses."""

import json
import time
from typing import Literal

import openai
from cases import DOCUMENTS, MESSAGES, TOOL, check_answer, run
from pydantic import BaseModel

FIELDS = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 24, "seed": 1}


class Answer(BaseModel):
    ok: bool
    level: Literal["low", "high"]


def client(url, key):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def case_models(url, key):
    models = {model.id for model in client(url, key).models.list()}
    assert models == {"tiny", "alpha", "embedder", "ranker", "tagger", "mood"}
    assert client(url, key).models.retrieve("alpha").id == "alpha"


def case_chat_and_its_stream(url, key):
    whole = client(url, key).chat.completions.create(**FIELDS)
    chunks = list(
        client(url, key).chat.completions.create(**FIELDS, stream=True, stream_options={"include_usage": True})
    )
    for usage in (whole.usage, chunks[-1].usage):
        usage.prompt_tokens_details = None  # the second finds the first one's prefix in the cache
    assert chunks[-1].usage == whole.usage
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content


def case_logprobs_n_and_prediction(url, key):
    fields = {**FIELDS, "temperature": 1.0, "n": 2, "logprobs": True, "top_logprobs": 3}
    answer = client(url, key).chat.completions.create(**fields, prediction={"type": "content", "content": "hello"})
    assert len(answer.choices) == 2
    assert all(len(item.top_logprobs) == 3 for item in answer.choices[0].logprobs.content)


def case_completions(url, key):
    fields = {"model": "alpha", "prompt": ["The", "A"], "max_tokens": 6, "best_of": 3, "logprobs": 2, "echo": True}
    answer = client(url, key).completions.create(**fields)
    assert len(answer.choices) == 2 and answer.choices[1].text.startswith("A")
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.text_offset)


def case_errors(url, key):
    try:
        client(url, key).chat.completions.create(**{**FIELDS, "model": "some/model"})
        raise AssertionError("an unknown model was served")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found" and error.request_id
    try:
        client(url, "wrong").models.list()
        raise AssertionError("a wrong key was accepted")
    except openai.AuthenticationError:
        pass


def case_embeddings(url, key):
    """The package asks for base64 and decodes it, unless it is told to ask for numbers."""
    session = client(url, key)
    for model in ("tiny", "embedder"):
        encoded = session.embeddings.create(model=model, input=DOCUMENTS)
        numbers = session.embeddings.create(model=model, input=DOCUMENTS, encoding_format="float")
        assert [item.embedding for item in encoded.data] == [item.embedding for item in numbers.data]
        assert [item.index for item in encoded.data] == [0, 1, 2] and encoded.usage.total_tokens > 3
        assert abs(sum(value * value for value in encoded.data[0].embedding) - 1) < 1e-5
    short = session.embeddings.create(model="embedder", input=DOCUMENTS[0], dimensions=16)
    assert len(short.data[0].embedding) == 16
    ids = session.embeddings.create(model="tiny", input=[[5, 6, 7], [8]])
    assert len(ids.data) == 2 and ids.usage.prompt_tokens == 4
    query = session.embeddings.create(model="embedder", input=DOCUMENTS[0], extra_body={"input_type": "query"})
    assert query.data[0].embedding != encoded.data[0].embedding
    for fields in ({"model": "tagger"}, {"model": "tiny", "input": []}, {"model": "tiny", "dimensions": 3}):
        try:
            session.embeddings.create(**{"input": "A", **fields})
        except openai.BadRequestError:
            continue
        raise AssertionError(f"{fields} was served")


async def case_async_stream(url, key):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as session:
        stream = await session.chat.completions.create(**FIELDS, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == (await session.chat.completions.create(**FIELDS)).choices[0].message.content


def case_structured_parse(url, key):
    fields = {**FIELDS, "max_completion_tokens": 100}
    parsed = client(url, key).chat.completions.parse(**fields, response_format=Answer).choices[0].message.parsed
    check_answer(parsed.ok, parsed.level)
    with client(url, key).chat.completions.stream(**fields, response_format=Answer) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def case_structured_json_object(url, key):
    fields = {**FIELDS, "max_completion_tokens": 100}
    answer = client(url, key).chat.completions.create(
        **fields, extra_body={"guided_json": TOOL["function"]["parameters"]}
    )
    check_answer(**json.loads(answer.choices[0].message.content))


def case_tools(url, key):
    choice = {"type": "function", "function": {"name": "set_level"}}
    fields = {**FIELDS, "max_completion_tokens": 200, "tools": [TOOL]}
    for tool_choice in (choice, "required"):
        answer = client(url, key).chat.completions.create(**fields, tool_choice=tool_choice).choices[0]
        call = answer.message.tool_calls[0]
        assert call.function.name == "set_level" and call.id
        check_answer(**json.loads(call.function.arguments))
    with client(url, key).chat.completions.stream(**fields, tool_choice="required") as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert streamed.function.arguments == call.function.arguments
    history = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    after = client(url, key).chat.completions.create(**{**fields, "messages": history, "tool_choice": "none"})
    assert after.choices[0].message.tool_calls is None


def case_responses_and_their_stream(url, key):
    fields = {"model": "tiny", "input": "Say hello", "temperature": 0, "max_output_tokens": 24}
    whole = client(url, key).responses.create(**fields)
    chat = client(url, key).chat.completions.create(**FIELDS)
    assert whole.output_text == chat.choices[0].message.content
    with client(url, key).responses.stream(**fields) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text
    fields["max_output_tokens"] = 100
    parsed = client(url, key).responses.parse(**fields, text_format=Answer).output_parsed
    check_answer(parsed.ok, parsed.level)


def case_files_and_batches(url, key):
    files, batches = client(url, key).files, client(url, key).batches
    rows = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {**FIELDS, "model": name}}
        for name in ("tiny", "alpha", "nobody")
    ]
    file = files.create(
        file=("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )  # fmt: skip
    assert files.wait_for_processing(file.id).bytes == file.bytes and file.expires_at - file.created_at == 3600
    batch = batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    while batch.status not in ("completed", "failed"):
        time.sleep(0.1)
        batch = batches.retrieve(batch.id)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1) and batch.metadata == {"a": "b"}
    assert batch.id in {found.id for found in batches.list(limit=1)}
    lines = {line["custom_id"]: line for line in map(json.loads, files.content(batch.output_file_id).iter_lines())}
    whole = client(url, key).chat.completions.create(**FIELDS)
    assert lines["tiny"]["response"]["body"]["choices"][0]["message"]["content"] == whole.choices[0].message.content
    assert json.loads(files.content(batch.error_file_id).text)["response"]["status_code"] == 404
    assert {batch.output_file_id, file.id} <= {found.id for found in files.list()}
    assert files.delete(file.id).deleted
    try:
        batches.cancel(batch.id)
        raise AssertionError("a batch was cancelled behind its end")
    except openai.ConflictError:
        pass


def case_responses_tools(url, key):
    tool = {"type": "function", **TOOL["function"], "strict": True}
    fields = {"model": "tiny", "temperature": 0, "max_output_tokens": 200, "tools": [tool]}
    forced = {**fields, "input": MESSAGES, "tool_choice": "required", "parallel_tool_calls": False}
    call = client(url, key).responses.create(**forced).output[0]
    check_answer(**json.loads(call.arguments))
    with client(url, key).responses.stream(**forced) as stream:
        final = stream.get_final_response()
    assert final.output[0].parsed_arguments == json.loads(call.arguments)
    history = [*MESSAGES, *final.output]
    history.append({"type": "function_call_output", "call_id": final.output[0].call_id, "output": "done"})
    after = client(url, key).responses.create(**{**fields, "input": history, "tool_choice": "none"})
    assert [item.type for item in after.output] == ["message"]


if __name__ == "__main__":
    run(globals())
