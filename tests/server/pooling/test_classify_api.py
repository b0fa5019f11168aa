"""Classification: every question answered in one pass, in the shapes of vLLM, text-embeddings-inference and LoRAX."""

from __future__ import annotations

import base64
import math
import struct

import pytest
from pooling_stand_in import values_of

from specserve.pooled_values import sigmoid


def softmax(values):
    weights = [math.exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


async def test_every_question_is_answered_beside_vllms_fields(client):
    answer = await client.post("/classify", {"model": "tagger", "input": ["The fox", "A dog"]})
    assert len(client.engine.asked) == 2 and answer["id"].startswith("classify-")
    assert {request.pooling.task for request in client.engine.asked} == {"score"}
    for item, request in zip(answer["data"], client.engine.asked, strict=True):
        outputs = values_of(request)
        topic, traits = item["questions"]
        want = softmax([value / 2.0 for value in outputs[:3]])
        assert (topic["name"], topic["kind"]) == ("topic", "multi_class")
        assert topic["probs"] == pytest.approx(dict(zip(("fox", "dog", "jug"), want, strict=True)))
        assert topic["labels"] == [max(topic["probs"], key=topic["probs"].get)]
        long, even = map(sigmoid, outputs[3:])
        assert traits["probs"] == pytest.approx({"long": long, "even": even})
        assert traits["labels"] == ["long"] * (long >= 0.9) + ["even"] * (even >= 0.5)
        assert item["probs"] == pytest.approx([*want, long, even]) and item["num_classes"] == 5
        assert item["label"] is None  # five outputs are not one choice


async def test_one_question_of_one_label_is_what_vllm_answers(client):
    answer = await client.post("/classify", {"model": "mood", "input": "The fox"})
    (item,) = answer["data"]
    outputs = values_of(client.engine.asked[0])
    assert item["probs"] == pytest.approx(softmax(outputs)) and item["num_classes"] == 2
    assert item["label"] == ("sad", "glad")[outputs.index(max(outputs))]
    raw = await client.post("/classify", {"model": "mood", "input": "The fox", "use_activation": False})
    assert raw["data"][0]["probs"] == pytest.approx(outputs) and raw["data"][0]["label"] == item["label"]
    ids = client.ids("The fox")
    assert (await client.post("/classify", {"model": "mood", "input": ids}))["data"] == [item]


async def test_predict_has_labels_best_first(client):
    answer = await client.post("/predict", {"model": "mood", "inputs": "The fox"})
    assert {entry["label"] for entry in answer} == {"sad", "glad"}
    assert answer[0]["score"] > answer[1]["score"] and sum(entry["score"] for entry in answer) == pytest.approx(1.0)
    assert await client.post("/predict", {"model": "mood", "inputs": ["The fox"]}) == answer
    assert await client.post("/predict", {"model": "mood", "inputs": [["The fox"], ["The fox"]]}) == [answer, answer]
    raw = await client.post("/predict", {"model": "mood", "inputs": "The fox", "raw_scores": True})
    assert [entry["score"] for entry in raw] == sorted(values_of(client.engine.asked[-1]), reverse=True)
    several = await client.post("/predict", {"model": "tagger", "inputs": "The fox"})
    assert {entry["label"] for entry in several} == {
        "topic/fox",
        "topic/dog",
        "topic/jug",
        "traits/long",
        "traits/even",
    }


async def test_predict_with_parameters_is_what_huggingface_hub_reads(client):
    (whole,) = await client.post("/predict", {"model": "mood", "inputs": "The fox", "parameters": {}})
    (best,) = await client.post("/predict", {"model": "mood", "inputs": "The fox", "parameters": {"top_k": 1}})
    assert best == whole[:1]
    parameters = {"function_to_apply": "sigmoid"}
    (apart,) = await client.post("/predict", {"model": "mood", "inputs": "The fox", "parameters": parameters})
    outputs = values_of(client.engine.asked[-1])
    assert [entry["score"] for entry in apart] == pytest.approx(sorted(map(sigmoid, outputs), reverse=True))
    parameters = {"function_to_apply": "none"}
    (raw,) = await client.post("/predict", {"model": "mood", "inputs": "The fox", "parameters": parameters})
    assert [entry["score"] for entry in raw] == sorted(outputs, reverse=True)


async def test_a_pair_is_predicted_by_a_re_ranker(client):
    (entry,) = await client.post("/predict", {"model": "ranker", "inputs": ["Who?", "The fox"]})
    assert entry["label"] == "LABEL_0" and client.engine.asked[-1].prompt_token_ids == client.ids(
        "Query: Who?\nDocument: The fox"
    )
    for inputs in (["a", "b", "c"], [["a"], ["b", "c"]], [[]], [["a", 1]], [1], [], "", ["a", ""], [["a"], "b", 3]):
        await client.refused_as_lorax("/predict", {"model": "mood", "inputs": inputs}, "inputs")


async def test_loraxs_entities_are_the_labels_that_hold(client):
    body = {"inputs": "The fox", "parameters": {"adapter_id": "tagger"}}
    entities = await client.post("/classify", body)
    questions = (await client.post("/classify", {"model": "tagger", "input": "The fox"}))["data"][0]["questions"]
    held = [(f"{each['name']}/{label}", each["probs"][label]) for each in questions for label in each["labels"]]
    assert [(entity["entity_group"], entity["score"]) for entity in entities] == held
    assert all((each["word"], each["start"], each["end"]) == ("The fox", 0, 7) for each in entities)
    batch = {"inputs": ["The fox", "A dog"], "parameters": {"adapter_id": "mood"}, "stream": False}
    first, second = await client.post("/classify_batch", batch)
    assert first[0]["word"] == "The fox" and second[0]["word"] == "A dog"
    assert {first[0]["entity_group"], second[0]["entity_group"]} <= {"sad", "glad"}
    await client.refused_as_lorax("/classify", {"inputs": "", "parameters": {"adapter_id": "mood"}}, "inputs")
    await client.refused_as_lorax("/classify_batch", {"inputs": [], "model": "mood"}, "inputs")


async def test_pooling_gives_whatever_the_adapter_makes(client):
    async def pooled(model, **fields):
        answer = await client.post("/pooling", {"model": model, "input": "The fox", **fields})
        assert answer["id"].startswith("pool-")
        return answer["data"][0]["data"], values_of(client.engine.asked[-1])

    data, values = await pooled("embedder")
    assert data == pytest.approx(values) and len(data) == 16
    data, values = await pooled("ranker")
    assert data == pytest.approx([sigmoid(values[0])])
    data, values = await pooled("ranker", use_activation=False)
    assert data == pytest.approx(values)
    data, values = await pooled("mood", task="classify")
    assert data == pytest.approx(softmax(values))
    encoded, values = await pooled("mood", encoding_format="base64", use_activation=False)
    assert list(struct.unpack("<2f", base64.b64decode(encoded))) == pytest.approx(values)
    body = {"model": "mood", "input": "A"}
    await client.refused("/pooling", {**body, "task": "token_embed"}, 400, "token_embed", param="task")
    await client.refused("/pooling", {**body, "dimensions": 4}, 400, "gives none", param="dimensions")
    await client.refused("/pooling", {**body, "task": "embed"}, 400, "/classify", code="wrong_adapter_type")
