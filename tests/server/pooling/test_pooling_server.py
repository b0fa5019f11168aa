"""The routes that pool over a real engine: what they answer is what transformers and peft compute."""

from __future__ import annotations

import base64
import threading

import numpy as np
import pytest
import torch
from pooling_adapters import make_pooling_adapter, peft_hidden, peft_outputs
from safetensors.torch import load_file, save_file
from served_poolers import QUESTIONS, make_poolers
from server_fixture import ServerProcess, assert_error

TEXTS = ["The quick brown fox", "A lazy dog", "jugs " * 60]


@pytest.fixture(scope="module")
def root(model_dir, tmp_path_factory):
    root = make_poolers(model_dir, tmp_path_factory.mktemp("adapters"))
    broken = make_pooling_adapter(model_dir, root / "broken", "SEQ_CLS", num_labels=2, seed=5)
    weights = load_file(broken / "adapter_model.safetensors")
    score = next(name for name in weights if "score" in name)
    save_file({**weights, score: torch.full_like(weights[score], 3e38)}, broken / "adapter_model.safetensors")
    return root


@pytest.fixture(scope="module")
def server(model_dir, root):
    server = ServerProcess(model_dir, "--adapters-dir", str(root), "--max-adapters", "2").wait_ready()
    yield server
    server.wait_baseline()
    assert server.stop() == 0


def ask(server, path, **body):
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


def ids_of(server, text):
    return ask(server, "/tokenize", prompt=text)["tokens"]


def embeddings(server, texts, **fields):
    return np.array([item["embedding"] for item in ask(server, "/v1/embeddings", input=texts, **fields)["data"]])


def unit(vector):
    return (vector / vector.norm()).numpy()


def test_a_conversation_is_pooled_as_its_chat_template_writes_it(server):
    messages = [{"role": "user", "content": "A dog<|im_end|>"}, {"role": "assistant", "content": "A cat"}]
    for fields in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        ending = {"add_generation_prompt": False, **fields}
        ids = ask(server, "/tokenize", messages=messages, **ending)["tokens"]
        (found,) = ask(server, "/v1/embeddings", messages=messages, model="embedder", **fields)["data"]
        assert found["embedding"] == embeddings(server, ids, model="embedder")[0].tolist()
    kinds = {"/classify": ("tagger", "probs"), "/pooling": ("ranker", "data")}
    for path, (model, field) in kinds.items():
        both = [
            ask(server, path, model=model, **given)["data"][0][field]
            for given in ({"messages": messages, **fields}, {"input": ids})
        ]
        assert both[0] == both[1]
    refused = server.post("/v1/embeddings", {"messages": messages, "truncate_prompt_tokens": 0})
    assert_error(refused, 400, param="truncate_prompt_tokens")
    both_ends = {"messages": messages, "add_generation_prompt": True, "continue_final_message": True}
    assert_error(server.post("/v1/embeddings", both_ends), 400, param="continue_final_message")


def test_embeddings_of_the_base_and_of_an_adapter_are_those_of_transformers_and_peft(server, model_dir, root):
    base = [peft_hidden(model_dir, None, ids_of(server, text)) for text in TEXTS]
    assert embeddings(server, TEXTS) == pytest.approx(np.array([unit(hidden[-1]) for hidden in base]), abs=1e-5)
    mean = embeddings(server, TEXTS, pooling="mean", normalize=False)
    assert mean == pytest.approx(np.array([hidden.mean(0).numpy() for hidden in base]), abs=1e-4)
    states = [peft_hidden(model_dir, root / "embedder", ids_of(server, f"query: {text}")) for text in TEXTS]
    got = embeddings(server, TEXTS, model="embedder", input_type="query")
    assert got == pytest.approx(np.array([unit(hidden.mean(0)) for hidden in states]), abs=1e-5)
    short = embeddings(server, TEXTS, model="embedder", input_type="query", dimensions=16)
    assert short == pytest.approx(np.array([unit(hidden.mean(0)[:16]) for hidden in states]), abs=1e-5)
    encoded = ask(server, "/v1/embeddings", input=TEXTS[0], model="embedder", encoding_format="base64")
    want = embeddings(server, TEXTS[0], model="embedder")[0].astype("float32")
    assert np.frombuffer(base64.b64decode(encoded["data"][0]["embedding"]), "<f4").tolist() == want.tolist()
    assert ask(server, "/embed", inputs=TEXTS, model="embedder")[0] == pytest.approx(want.tolist(), abs=1e-6)


def test_ranks_and_scores_are_a_score_heads_outputs(server, model_dir, root):
    eos = ids_of(server, "<|im_end|>")
    pairs = [ids_of(server, f"Query: Who?\nDocument: {text}") + eos for text in TEXTS]
    outputs = torch.cat([peft_outputs(model_dir, root / "ranker", ids, 1) for ids in pairs])
    want = outputs.sigmoid().tolist()
    answer = ask(server, "/v2/rerank", model="ranker", query="Who?", documents=TEXTS)
    assert [item["index"] for item in answer["results"]] == sorted(range(3), key=lambda idx: -want[idx])
    assert {item["index"]: item["relevance_score"] for item in answer["results"]} == pytest.approx(
        dict(enumerate(want)), abs=1e-5
    )
    raw = ask(server, "/rerank", model="ranker", query="Who?", texts=TEXTS, raw_scores=True)
    assert {item["index"]: item["score"] for item in raw} == pytest.approx(dict(enumerate(outputs.tolist())), abs=1e-4)
    scores = ask(server, "/score", model="ranker", text_1="Who?", text_2=TEXTS)["data"]
    assert [item["score"] for item in scores] == pytest.approx(want, abs=1e-5)
    one, *others = embeddings(server, [TEXTS[0], *TEXTS[:2]])
    cosines = [item["score"] for item in ask(server, "/score", text_1=TEXTS[0], text_2=TEXTS[:2])["data"]]
    assert cosines == pytest.approx([float(one @ other) for other in others], abs=1e-5)


def test_questions_are_answered_from_one_pass(server, model_dir, root):
    data = ask(server, "/classify", model="tagger", input=TEXTS)["data"]
    for item, text in zip(data, TEXTS, strict=True):
        outputs = peft_outputs(model_dir, root / "tagger", ids_of(server, text), 5)
        topic = torch.softmax(outputs[:3] / QUESTIONS[0].temperature, 0).tolist()
        traits = outputs[3:].sigmoid().tolist()
        assert item["probs"] == pytest.approx([*topic, *traits], abs=1e-5)
        assert item["questions"][0]["labels"] == [QUESTIONS[0].labels[topic.index(max(topic))]]
        held = [
            label for label, chance, least in zip(("long", "odd"), traits, (0.6, 0.5), strict=True) if chance >= least
        ]
        assert item["questions"][1]["labels"] == held
    outputs = peft_outputs(model_dir, root / "mood", ids_of(server, TEXTS[0]), 2)
    probs = torch.softmax(outputs, 0).tolist()
    (item,) = ask(server, "/classify", model="mood", input=TEXTS[0])["data"]
    assert item["probs"] == pytest.approx(probs, abs=1e-5) and item["label"] == f"LABEL_{probs.index(max(probs))}"
    entry = ask(server, "/predict", model="mood", inputs=TEXTS[0])[0]
    assert (entry["label"], entry["score"]) == (item["label"], pytest.approx(max(probs), abs=1e-5))
    (entity,) = ask(server, "/classify", inputs=TEXTS[0], parameters={"adapter_id": "mood"})
    assert entity["entity_group"] == item["label"]


def test_a_head_whose_outputs_overflow_fails_its_requests_alone(server):
    response = server.post("/classify", {"model": "broken", "input": ["A dog"]})
    assert assert_error(response, 500, "input[0]", "broken", "not finite")["code"] == "model_failure"
    response = server.post("/predict", {"model": "broken", "inputs": "A dog"})
    assert response.status_code == 424 and "broken" in response.json()["error"]
    ask(server, "/classify", model="mood", input="A dog")


def test_kinds_are_told_apart_and_models_say_which_they_are(server):
    for path, body, where in (
        ("/v1/embeddings", {"input": "A", "model": "tagger"}, "/classify"),
        ("/v1/embeddings", {"input": "A", "model": "alpha"}, "/v1/chat/completions"),
        ("/classify", {"input": "A", "model": "embedder"}, "/v1/embeddings"),
        ("/v1/rerank", {"query": "A", "documents": ["A"], "model": "embedder"}, "/v1/embeddings"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "A"}], "model": "ranker"}, "/v1/rerank"),
    ):
        assert_error(server.post(path, body), 400, where, param="model")
    for name in ("mood", "broken"):  # what nobody has asked for has not been read
        server.post("/classify", {"input": "A", "model": name})
    kinds = {entry["id"]: entry["adapter_type"] for entry in server.get("/v1/adapters").json()["data"]}
    assert kinds == {
        "alpha": "generate", "embedder": "embed", "ranker": "rerank", "tagger": "classify", "mood": "classify",
        "broken": "classify",
    }  # fmt: skip


def test_pooling_beside_generation_and_other_adapters_changes_nothing(server):
    texts = [f"{text} {idx}" for idx in range(8) for text in TEXTS]
    want = {model: embeddings(server, texts, model=model) for model in ("embedder", "tiny")}
    text = server.complete()["text"]
    found: list = []

    def work(idx: int) -> None:
        model = ("embedder", "tiny")[idx % 2]
        found.append(np.array_equal(embeddings(server, texts, model=model), want[model]))
        found.append(server.complete()["text"] == text)
        ranked = ask(server, "/v1/rerank", model="ranker", query="Who?", documents=texts)
        found.append(len(ranked["results"]) == len(texts))

    threads = [threading.Thread(target=work, args=(idx,)) for idx in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 18
    usage = ask(server, "/v1/embeddings", input=texts, model="embedder")["usage"]
    assert usage["prompt_tokens"] == sum(len(ids_of(server, f"text: {text}")) for text in texts)
