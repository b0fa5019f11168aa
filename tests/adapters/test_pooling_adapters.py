"""Adapters that do not generate: what PEFT's files and ours say of them, and what is refused with one sentence."""

import json
import shutil

import msgspec
import pytest
import torch
from adapter_edits import base_of, config_of, edit_tensors, tensors_of
from pooling_adapters import make_pooling_adapter

from specserve.adapter_files import POOLING_FILE, content_hash
from specserve.adapter_kinds import PoolingInfo, Question, check_kind
from specserve.adapters.lora import read_adapter
from specserve.adapters.pooling_config import SCORE, PoolingConfig, parse_pooling_config, pooling_info
from specserve.adapters.sizes import expected_bytes
from specserve.errors import AdapterError, UserError

QUESTIONS = (
    Question("language", "multi_class", ("c", "python"), 0, temperature=1.5),
    Question("uses", "multi_label", ("games",), 2, thresholds=(0.3,)),
)
FILE = {"adapter_type": "classify", "questions": msgspec.to_builtins(QUESTIONS)}


@pytest.fixture(scope="module")
def classifier(model_dir, tmp_path_factory):
    return make_pooling_adapter(model_dir, tmp_path_factory.mktemp("classifier"), "SEQ_CLS", num_labels=3)


@pytest.fixture(scope="module")
def embedder(model_dir, tmp_path_factory):
    return make_pooling_adapter(model_dir, tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def base(model_dir):
    return base_of(model_dir)


@pytest.fixture
def edited(tmp_path):
    """A copy of an adapter with changes."""

    def make(path, *changes, file=None):
        copy = tmp_path / "adapter"
        shutil.copytree(path, copy)
        for change in changes:
            change(copy)
        if file is not None:
            (copy / POOLING_FILE).write_bytes(msgspec.json.encode(file))
        return copy

    return make


def test_task_type_says_what_an_adapter_without_a_file_is(classifier, embedder, base, edited):
    info = read_adapter(classifier, base).info()
    assert info.adapter_type == "classify" and info.pooling.pooling == "last" and info.pooling.num_outputs == 3
    assert [(q.kind, q.labels) for q in info.pooling.questions] == [("multi_class", ("LABEL_0", "LABEL_1", "LABEL_2"))]
    info = read_adapter(embedder, base).info()
    assert (info.adapter_type, info.pooling.num_outputs, info.pooling.normalize) == ("embed", 64, True)
    one_row = tensors_of(lambda tensors: {**tensors, SCORE: tensors[SCORE][:1].clone()})
    info = read_adapter(edited(classifier, one_row), base).info()
    assert (info.adapter_type, info.pooling.num_outputs, info.pooling.questions) == ("rerank", 1, ())


def test_a_file_says_more_and_counts_into_the_identity(classifier, base, edited):
    path = edited(classifier, file=FILE)
    info = read_adapter(path, base).info()
    assert info.pooling.questions == QUESTIONS
    assert info.content_hash == content_hash(path) != content_hash(classifier)


def test_the_score_matrix_counts_into_what_is_expected_and_what_is_held(classifier, base):
    adapter = read_adapter(classifier, base)
    lora = sum(pair.a.nbytes + pair.b.nbytes for pair in adapter.pairs)
    assert adapter.num_bytes == lora + 3 * 64 * 4 <= expected_bytes(classifier, 4)
    there = adapter.copied(torch.clone)
    assert there.pooling.score is adapter.pooling.score


@pytest.mark.parametrize(
    "targets",
    [r"layers\.1\.(self_attn|mlp)\.(q|up)_proj", ["q_proj", "embed_tokens"], "all-linear", ["layers.0.mlp.down_proj"]],
)
def test_modules_of_a_model_without_lm_head_are_matched_as_in_peft(model_dir, base, tmp_path, targets):
    path = make_pooling_adapter(model_dir, tmp_path, target_modules=targets)
    adapter = read_adapter(path, base)
    saved = {key.split(".lora_")[0] for key in tensors_in(path) if ".lora_" in key}
    held = {f"base_model.model.layers.{layer}" for layer, _ in adapter.layers}
    assert len(saved) == len(adapter.pairs) and held <= {
        key.partition(".self_attn")[0].partition(".mlp")[0] for key in saved
    }


def tensors_in(path):
    found = {}
    edit_tensors(path, lambda tensors: found.update(tensors) or tensors)
    return found


def with_score(change):
    return tensors_of(lambda tensors: {**tensors, SCORE: change(tensors[SCORE])})


def without_score(tensors):
    return {key: tensor for key, tensor in tensors.items() if key != SCORE}


REFUSED = {
    "no score": ("classifier", [tensors_of(without_score)], None, "modules_to_save=['score']"),
    "NaN in the score": ("classifier", [with_score(lambda score: score * float("nan"))], None, "NaN or infinite"),
    "score of another size": ("classifier", [with_score(lambda score: score[:, :9].clone())], None, "[3, 9]"),
    "integer score": ("classifier", [with_score(lambda score: score.to(torch.int64))], None, "torch.int64"),
    "no row in the score": ("classifier", [with_score(lambda score: score[:0].clone())], None, "0 rows"),
    "more modules to save": (
        "classifier",
        [config_of(modules_to_save=["score", "embed_tokens"])],
        None,
        "modules_to_save",
    ),
    "a score beside generation": (
        "classifier",
        [config_of(task_type="CAUSAL_LM", modules_to_save=None)],
        None,
        "it has a score head",
    ),
    "a bias beside the score": (
        "classifier",
        [tensors_of(lambda tensors: {**tensors, SCORE.replace("weight", "bias"): torch.zeros(3)})],
        None,
        "score.bias",
    ),
    "task type says otherwise": ("embedder", [], {"adapter_type": "generate"}, "they must agree"),
    "labels and rows": (
        "classifier",
        [],
        {"adapter_type": "classify", "questions": msgspec.to_builtins(QUESTIONS[:1])},
        "2 labels",
    ),
    "rerank with rows": ("classifier", [], {"adapter_type": "rerank"}, "3 rows"),
    "dimensions beyond the model": ("embedder", [], {"adapter_type": "embed", "dimensions": [32, 65]}, "65"),
    "no object": ("embedder", [], [], "holds list"),
    "task type of another kind": ("embedder", [config_of(task_type=["SEQ_CLS"])], None, "task_type"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_together_is_refused_with_one_sentence(case, base, edited, request):
    fixture, changes, file, wanted = REFUSED[case]
    path = edited(request.getfixturevalue(fixture), *changes, file=file)
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, base, name="mine")
    assert wanted in str(caught.value) and str(caught.value).startswith("adapter 'mine'")


def question(**changes):
    return {"adapter_type": "classify", "questions": [{**FILE["questions"][0], **changes}]}


BAD_FILES = {
    "another version": ({"adapter_type": "embed", "format_version": 2}, "format_version 2"),
    "no type": ({}, "adapter_type"),
    "unknown type": ({"adapter_type": "reward"}, "generate, embed, rerank, classify"),
    "unknown pooling": ({"adapter_type": "embed", "pooling": "cls"}, "last, mean, weighted_mean"),
    "unknown field": ({"adapter_type": "embed", "pool": "mean"}, "pool"),
    "wrong type of value": ({"adapter_type": "embed", "normalize": "yes"}, "normalize"),
    "questions of an embedder": ({**FILE, "adapter_type": "embed"}, "questions"),
    "pooling of a generator": ({"adapter_type": "generate", "pooling": "mean"}, "pooling"),
    "dimensions of a classifier": ({"adapter_type": "classify", "dimensions": [8]}, "dimensions"),
    "dimensions in no order": ({"adapter_type": "embed", "dimensions": [32, 16]}, "ascending"),
    "no tokens": ({"adapter_type": "embed", "max_tokens": 0}, "max_tokens"),
    "half a character": ({"adapter_type": "embed", "suffix": "\ud800"}, "suffix"),
    "a long prefix": ({"adapter_type": "embed", "query_prefix": "x" * 20_001}, "query_prefix"),
    "unknown kind of question": (question(kind="ordinal"), "multi_class, multi_label"),
    "one label of several": (question(labels=["c"]), "2 or more"),
    "equal labels": (question(labels=["c", "c"]), "different texts"),
    "a gap between outputs": (question(first_output=1), "0 is expected"),
    "no temperature": (question(temperature=0), "temperature"),
    "thresholds of one class": (question(thresholds=[0.5, 0.5]), "thresholds"),
    "a threshold beyond": (
        {**FILE, "questions": [{**question(kind="multi_label", thresholds=[0.1, 7])["questions"][0]}]},
        "of 0 to 1",
    ),
    "equal names": (
        {**FILE, "questions": [FILE["questions"][0], {**FILE["questions"][0], "first_output": 2}]},
        "two of them",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_by_field_and_value(case):
    file, wanted = BAD_FILES[case]
    with pytest.raises(AdapterError, match=wanted) as caught:
        parse_pooling_config("mine", json.dumps(file).encode())
    assert "pooling_config.json" in str(caught.value) and len(str(caught.value)) < 600


def test_what_the_trainer_writes_is_read_back():
    for config in (
        PoolingConfig("classify", questions=QUESTIONS, suffix="\n", max_tokens=512),
        PoolingConfig("embed", pooling="mean", normalize=False, dimensions=(16, 32), query_prefix="query: "),
        PoolingConfig("rerank", append_eos=True),
        PoolingConfig("generate"),
    ):
        assert parse_pooling_config("mine", msgspec.json.encode(config)) == config


def test_a_request_of_another_kind_is_told_where_to_go():
    check_kind("mine", "embed", ("rerank", "embed"))
    with pytest.raises(UserError, match=r"gives embeddings.*/v1/embeddings") as caught:
        check_kind("mine", "embed", ("generate",))
    assert caught.value.code == "wrong_adapter_type" and caught.value.status == 400


def test_whatever_the_file_holds_is_served_or_refused_with_one_sentence_that_can_be_sent():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    texts = st.text(max_size=8) | st.sampled_from(["\ud800", "x" * 30_000, "a\nb", "classify", "mean", "multi_label"])
    scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts
    values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(texts, scalars, max_size=2)
    fields = st.sampled_from([*PoolingConfig.__struct_fields__, "k" * 3000, "\ud800"])
    inner = st.sampled_from([*Question.__struct_fields__, "other"])
    outcomes = {"served": 0, "refused": 0}

    @hypothesis.settings(
        max_examples=150, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(st.dictionaries(fields, values, max_size=1), st.dictionaries(inner, values, max_size=1))
    def whatever_it_holds(changes, of_question):
        first, *others = FILE["questions"]
        file = {**FILE, "questions": [{**first, **of_question}, *others], **changes}
        try:
            config = parse_pooling_config("mine", json.dumps(file).encode())
            info = pooling_info("mine", config.adapter_type, config, 3, 64)
        except AdapterError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
            msgspec.msgpack.encode(error.info())
            outcomes["refused"] += 1
        else:
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=PoolingInfo) == info
            outcomes["served"] += 1

    whatever_it_holds()
    assert min(outcomes.values()) > 2, outcomes
