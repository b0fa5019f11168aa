"""huggingface_hub's InferenceClient: text_generation plain, streamed and with details; chat_completion; embeddings,
classes and similarities by the routes of text-embeddings-inference."""

import json

from cases import DOCUMENTS, MESSAGES, SCHEMA, check_answer, run
from huggingface_hub import AsyncInferenceClient, InferenceClient

FIELDS = {"max_new_tokens": 12}


def case_text_generation(url, key):
    client = InferenceClient(url, token=key)
    text = client.text_generation("The quick", **FIELDS)
    assert "".join(client.text_generation("The quick", stream=True, **FIELDS)) == text
    detailed = client.text_generation("The quick", details=True, decoder_input_details=True, **FIELDS)
    assert detailed.generated_text == text and detailed.details.generated_tokens == len(detailed.details.tokens)
    assert detailed.details.prefill[1].logprob < 0
    events = list(client.text_generation("The quick", details=True, stream=True, **FIELDS))
    assert events[-1].generated_text == text and events[-1].details.finish_reason in ("length", "eos_token")
    assert events[0].token.id == detailed.details.tokens[0].id


def case_parameters(url, key):
    client = InferenceClient(url, token=key)
    fields = {"adapter_id": "alpha", "do_sample": True, "seed": 3, "temperature": 0.9, "top_k": 20, "top_p": 0.9}
    first, second = (client.text_generation("The", **fields, return_full_text=True, **FIELDS) for _ in range(2))
    assert first == second and first.startswith("The")


def case_chat_completion(url, key):
    client = InferenceClient(base_url=url, api_key=key)
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat_completion(**fields).choices[0].message.content
    chunks = client.chat_completion(**fields, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole


def case_feature_extraction(url, key):
    vectors = InferenceClient(f"{url}/embed", token=key).feature_extraction(DOCUMENTS, truncate=True, normalize=True)
    assert vectors.shape == (3, 64) and abs(float((vectors[0] ** 2).sum()) - 1) < 1e-5
    one = InferenceClient(f"{url}/embed?model=embedder", token=key).feature_extraction(DOCUMENTS[0])
    assert one.shape == (1, 64) and not (one[0] == vectors[0]).all()


def case_sentence_similarity(url, key):
    same, other, _ = InferenceClient(f"{url}/similarity", token=key).sentence_similarity(
        DOCUMENTS[0], other_sentences=DOCUMENTS
    )
    assert abs(same - 1) < 1e-5 and other < 1


def case_text_classification(url, key):
    client = InferenceClient(f"{url}/predict?model=mood", token=key)
    classes = client.text_classification(DOCUMENTS[0])
    assert {each.label for each in classes} == {"LABEL_0", "LABEL_1"} and classes[0].score >= classes[1].score
    assert abs(sum(each.score for each in classes) - 1) < 1e-5
    assert len(client.text_classification(DOCUMENTS[0], top_k=1, function_to_apply="sigmoid")) == 1


async def case_async(url, key):
    async with AsyncInferenceClient(url, token=key) as client:
        text = await client.text_generation("The quick", **FIELDS)
        parts = [part async for part in await client.text_generation("The quick", stream=True, **FIELDS)]
    assert "".join(parts) == text


def case_structured_grammar(url, key):
    client = InferenceClient(url, token=key)
    text = client.text_generation("Answer:", max_new_tokens=100, grammar={"type": "json", "value": SCHEMA})
    check_answer(**json.loads(text))
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    client = InferenceClient(base_url=url, api_key=key)
    answer = client.chat_completion(model="tiny", messages=MESSAGES, max_tokens=100, response_format=form)
    check_answer(**json.loads(answer.choices[0].message.content))


if __name__ == "__main__":
    run(globals())
