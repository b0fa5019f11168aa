"""The real openai client, sync and async, streaming and not, against a real server."""

import asyncio

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def server(locked_server):
    return locked_server


@pytest.fixture(scope="module")
def client(server, api_key):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0)


def test_chat_and_its_stream_agree(client):
    fields = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 20, "temperature": 0, "seed": 3}
    whole = client.chat.completions.create(**fields)
    assert whole.usage.completion_tokens <= 20
    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_completions_and_their_stream_agree(client):
    fields = {"model": "alpha", "prompt": "The quick", "max_tokens": 15, "temperature": 0.7, "seed": 11, "n": 2}
    whole = client.completions.create(**fields)
    texts = ["", ""]
    for chunk in client.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_models_logprobs_prediction_and_extra_fields(client):
    assert {model.id for model in client.models.list()} == {"tiny", "alpha"}
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    scored = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    assert all(len(item.top_logprobs) == 2 for item in scored.choices[0].logprobs.content)
    predicted = client.chat.completions.create(
        **fields, prediction={"type": "content", "content": scored.choices[0].message.content}
    )
    assert predicted.choices[0].message.content == scored.choices[0].message.content
    assert predicted.usage.completion_tokens_details.accepted_prediction_tokens >= 0
    extra = client.chat.completions.create(**fields, extra_body={"speculation": {"mode": "off"}, "top_k": 5})
    assert extra.choices[0].message.content == scored.choices[0].message.content


def test_errors_become_the_clients_exceptions(server, client):
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.chat.completions.create(model="nope", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f", "made_up": 1}}]
        )
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-test-kez", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


async def test_async_client_mixes_adapters_and_streams(server, api_key):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0) as client:

        async def ask(model, stream):
            fields = {"model": model, "messages": MESSAGES, "max_tokens": 25, "temperature": 0}
            if not stream:
                return (await client.chat.completions.create(**fields)).choices[0].message.content
            chunks = await client.chat.completions.create(**fields, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])

        models = ["tiny", "alpha"] * 5
        texts = await asyncio.gather(*(ask(model, i % 3 == 0) for i, model in enumerate(models)))
    assert texts[0] != texts[1]
    assert all(text == texts[i % 2] for i, text in enumerate(texts))


async def test_client_that_stops_reading_a_stream_frees_its_sequence(server, api_key):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0) as client:
        stream = await client.completions.create(
            model="tiny", prompt="The", max_tokens=480, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()
    server.wait_baseline()
