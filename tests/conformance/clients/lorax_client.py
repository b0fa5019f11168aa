"""The lorax-client package: generate, its stream, details, adapters, best_of, schemas, errors; sync and async."""

import json

from cases import SCHEMA, check_answer, run
from lorax import AsyncClient, Client
from lorax.errors import GenerationError, ValidationError

FIELDS = {"max_new_tokens": 12, "ignore_eos_token": True}


def client(url, key):
    return Client(url, headers={"Authorization": f"Bearer {key}"})


def case_generate_and_its_stream(url, key):
    for adapter in (None, "alpha"):
        whole = client(url, key).generate("The quick", adapter_id=adapter, **FIELDS)
        events = list(client(url, key).generate_stream("The quick", adapter_id=adapter, **FIELDS))
        assert "".join(event.token.text for event in events) == whole.generated_text == events[-1].generated_text
        assert whole.details.finish_reason == events[-1].details.finish_reason == "length"
        assert whole.details.generated_tokens == len(whole.details.tokens) == len(events) == 12


def case_adapter_source_and_token(url, key):
    fields = {"adapter_id": "alpha", "adapter_source": "local", "api_token": "unused", **FIELDS}
    assert client(url, key).generate("The", **fields).generated_text


def case_details(url, key):
    answer = client(url, key).generate(
        "The quick", decoder_input_details=True, return_k_alternatives=2, do_sample=True, seed=5, **FIELDS
    )
    assert answer.details.seed == 5 and answer.details.prefill[0].logprob is None
    assert all(len(token.alternative_tokens) == 2 for token in answer.details.tokens)


def case_best_of_and_stop(url, key):
    answer = client(url, key).generate("The quick", best_of=3, do_sample=True, **FIELDS)
    assert len(answer.details.best_of_sequences) == 2
    text = client(url, key).generate("The quick", **FIELDS).generated_text
    stopped = client(url, key).generate("The quick", stop_sequences=[text[3:6]], return_full_text=True, **FIELDS)
    assert stopped.details.finish_reason == "stop_sequence" and stopped.generated_text.startswith("The quick")


def case_errors(url, key):
    for fields, kind in (({"adapter_id": "nobody"}, GenerationError), ({"watermark": True}, ValidationError)):
        for ask in (client(url, key).generate, lambda *a, **k: list(client(url, key).generate_stream(*a, **k))):
            try:
                ask("The", **fields, **FIELDS)
            except kind as error:
                assert next(iter(fields)).split("_")[0] in str(error) or "nobody" in str(error)
            else:
                raise AssertionError(f"{fields} was served")


def case_embed(url, key):
    embedding = client(url, key).embed("The quick").embeddings
    assert len(embedding) == 64 and abs(sum(value * value for value in embedding) - 1) < 1e-5


def case_classify_needs_an_adapter(url, key):
    """The client cannot name one with these, and is told so."""
    for ask, inputs in ((client(url, key).classify, "The"), (client(url, key).classify_batch, ["The", "A"])):
        try:
            ask(inputs)
        except ValidationError as error:
            assert "adapter" in str(error)
        else:
            raise AssertionError("the base model classified")


async def case_async(url, key):
    session = AsyncClient(url, headers={"Authorization": f"Bearer {key}"})
    whole = await session.generate("The quick", **FIELDS)
    texts = [event.token.text async for event in session.generate_stream("The quick", **FIELDS)]
    assert "".join(texts) == whole.generated_text


def case_structured_schema(url, key):
    answer = client(url, key).generate(
        "Answer:", max_new_tokens=100, response_format={"type": "json_object", "schema": SCHEMA}
    )
    check_answer(**json.loads(answer.generated_text))


if __name__ == "__main__":
    run(globals())
