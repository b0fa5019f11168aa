"""Embeddings, classes and scores from Python: what the server answers, for more texts than one body has."""

import pytest
from pooling_adapters import make_pooling_adapter

from specserve import UserError
from specserve.llm import pooled

TEXTS = ["The quick brown fox", "Pack my box", "A server answers many requests", "box"]


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    """In folders that the server does not know."""
    root = tmp_path_factory.mktemp("pooling")
    shapes = {"embedder": ("FEATURE_EXTRACTION", 0), "classifier": ("SEQ_CLS", 3), "ranker": ("SEQ_CLS", 1)}
    return {
        name: make_pooling_adapter(model_dir, root / name, task, num_labels=num) for name, (task, num) in shapes.items()
    }


def test_the_base_embeds_as_the_server_does(llm, server):
    theirs = server.post("/v1/embeddings", {"input": TEXTS, "pooling": "mean", "encoding_format": "float"}).json()
    ours = llm.embed(TEXTS, pooling="mean")
    assert [each.outputs.embedding for each in ours] == [each["embedding"] for each in theirs["data"]]
    assert ours[0].outputs.hidden_size == 64 and ours[0].lora_request is None
    (one,) = llm.embed({"prompt": TEXTS[0]}, pooling="mean", use_tqdm=False)
    assert one == ours[0]
    ids = llm.get_tokenizer().encode(TEXTS[0])
    assert llm.embed(ids, pooling="mean") == [one]


def test_adapters_of_each_kind_answer_in_bodies_of_any_number(llm, adapters, monkeypatch):
    whole = llm.embed(TEXTS, adapter=adapters["embedder"])
    classes = llm.classify(TEXTS, lora_request=adapters["classifier"])
    scores = llm.score(TEXTS[0], TEXTS, adapter=adapters["ranker"])
    assert classes[0].outputs.num_classes == 3 and sum(classes[0].outputs.probs) == pytest.approx(1)
    assert classes[0].outputs.label in ("LABEL_0", "LABEL_1", "LABEL_2") and classes[0].lora_request == "classifier"
    assert all(0 < each.outputs.score < 1 for each in scores)
    assert llm.score(TEXTS, TEXTS, adapter="embedder")[2].outputs.score == pytest.approx(1)
    monkeypatch.setattr(pooled, "MAX_TEXTS", 1)
    done = []
    monkeypatch.setattr(pooled.PooledCalls, "_all", _noting(pooled.PooledCalls._all, done))
    assert llm.embed(TEXTS, adapter="embedder") == whole
    assert llm.classify(TEXTS, adapter="classifier") == classes
    assert llm.score(TEXTS[0], TEXTS, adapter="ranker") == scores
    assert done == [4, 4, 4]


def _noting(function, done):
    async def called(self, answer, bodies, *others):
        done.append(len(bodies))
        return await function(self, answer, bodies, *others)

    return called


def test_what_cannot_be_done_is_said_by_field(llm, adapters, monkeypatch):
    with pytest.raises(UserError, match="gives embeddings"):
        llm.classify(TEXTS, adapter=adapters["embedder"])
    with pytest.raises(UserError, match="/v1/embeddings"):
        llm.generate(TEXTS[0], adapter=adapters["embedder"])
    with pytest.raises(UserError, match="dimensions is 7"):
        llm.embed(TEXTS, dimensions=7)
    with pytest.raises(UserError, match="nope"):
        llm.embed(TEXTS, nope=1)
    with pytest.raises(UserError, match="2 texts and the second 3"):
        llm.score(TEXTS[:2], TEXTS[:3], adapter=adapters["ranker"])
    for wrong in (None, 5, b"text", [None], [5.0], [b"text"], "\ud800", [{"text": "x"}]):
        with pytest.raises(UserError):
            llm.embed(wrong)
        with pytest.raises(UserError):
            llm.score(TEXTS[0], wrong)
    with pytest.raises(UserError, match="adapter="):
        llm.embed(TEXTS, model="embedder")
    with pytest.raises(UserError, match="one adapter"):
        llm.embed(TEXTS, adapter=["embedder"] * len(TEXTS))
    monkeypatch.setattr(pooled, "MAX_TEXTS", 2)
    with pytest.raises(UserError, match=r"input\[1\]") as caught:
        llm.embed([*TEXTS[:3], ""])
    assert caught.value.__notes__ == ["texts are counted from text 2 of the call"]
    assert llm.embed(iter(TEXTS[:1])) == llm.embed(TEXTS[:1])
