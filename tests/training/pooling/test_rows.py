"""Rows of tasks that pool: what is read, and how a bad one is named."""

import json
import math

import pytest
from places import EXAMPLES

from specserve.errors import UserError
from specserve.training.pooling.prepare import check_sections
from specserve.training.pooling.questions import questions_of, targets_of
from specserve.training.pooling.rows import parse_pooling_row, read_pooling_rows
from specserve.training.run_file import check_ready, load_run


def parse(task, **row):
    return parse_pooling_row(json.dumps(row), 7, "rows.jsonl", task)


def test_every_shape_is_read():
    assert parse("embed", query="q", positive="p").negatives == ()
    assert parse("embed", query="q", positive="p", negatives=["n"], id=3).unread == ("id",)
    listed = parse("rerank", query="q", documents=["a", "b", "c"], positive=[1, 2])
    assert listed.scores == (0.0, 1.0, 1.0)
    assert parse("rerank", query="q", documents=["a", "b"], scores=[0, 2.5]).scores == (0.0, 2.5)
    assert parse("rerank", query="q", positive="a", negatives=["b"]).documents == ("a", "b")
    assert parse("classify", text="t", label="x").answers == {"label": "x"}
    assert parse("classify", text="t", labels=["x", "x", "y"]).answers == {"labels": ("x", "y")}
    answers = parse("classify", text="t", answers={"a": "x", "b": [], "c": True, "d": None}).answers
    assert answers == {"a": "x", "b": (), "c": True}


@pytest.mark.parametrize(
    ("task", "row", "named"),
    [
        ("embed", {"query": "q"}, "positive is missing; it has the fields 'query', wanted are"),
        ("embed", {"query": " ", "positive": "p"}, "query is empty; text is expected"),
        ("embed", {"query": "q", "positive": "p", "negatives": "n"}, "negatives is str; a list of texts"),
        ("embed", {"query": "q", "positive": "p", "negatives": ["n", 3]}, "negatives[1] is int"),
        ("embed", {"query": "q", "positive": "p", "negatives": ["p"]}, "negatives[0] is the positive, too"),
        ("embed", {"prompt": "q", "completion": "p"}, "'prompt' is not read where task is embed"),
        ("rerank", {"query": "q", "documents": ["a", "b"]}, "one of 'scores' and 'positive'"),
        ("rerank", {"query": "q", "documents": ["a"], "positive": 0}, "there are 1 documents; two are the least"),
        ("rerank", {"query": "q", "documents": ["a", "a"], "positive": 0}, "documents[1] stands there twice"),
        ("rerank", {"query": "q", "documents": ["a", "b"], "positive": 2}, "positive is 2; the place of a document"),
        ("rerank", {"query": "q", "documents": ["a", "b"], "scores": [1]}, "scores: 1; a list of 2 numbers"),
        ("rerank", {"query": "q", "documents": ["a", "b"], "scores": [1, -1]}, "scores[1] is -1; a number of at least"),
        ("rerank", {"query": "q", "documents": ["a", "b"], "scores": [1, True]}, "scores[1] is True"),
        ("rerank", {"query": "q", "documents": ["a", "b"], "scores": [1, 1]}, "every document has the score 1"),
        ("classify", {"text": "t"}, "it has no label; wanted are 'text' and one of"),
        ("classify", {"text": "t", "label": "x", "labels": []}, "it has label and labels"),
        ("classify", {"text": "t", "label": 3}, "label is 3; text or true and false"),
        ("classify", {"text": "t", "labels": ["x", ""]}, "labels is ['x', '']; a list of labels"),
        ("classify", {"text": "t", "answers": {}}, "answers: an object with an answer"),
        ("classify", {"text": "t", "answers": {"a": 1.5}}, "answers['a'] is 1.5; a label, a list"),
        ("classify", {"text": "t", "answers": {"a": {}}}, "answers['a'] is {}; the probability of at least one label"),
        ("classify", {"text": "t", "answers": {"a": {"x": 1.5}}}, "answers['a']['x'] is 1.5; a probability"),
        ("classify", {"text": "t", "answers": {"a": {"x": True}}}, "answers['a']['x'] is True; a probability"),
        ("classify", {"text": "t", "answers": {"a": ["x", {"label": "y"}]}}, "answers['a'][0] is 'x'; {'label': ..."),
        ("classify", {"text": "t", "answers": {"a": [{"label": "y"}]}}, "answers['a'][0] is {'label': 'y'}; {'label'"),
        ("classify", {"text": "t", "answers": {"a": [{"label": "y", "probability": 2}]}}, "[0].probability is 2; a pr"),
        ("classify", {"text": "t", "answers": {"a": [{"label": "y", "probability": 0}] * 2}}, "'y' stands there twice"),
    ],
)
def test_a_bad_row_is_named_with_its_field(task, row, named):
    with pytest.raises(UserError) as error:
        parse(task, **row)
    assert str(error.value).startswith("rows.jsonl line 7: ") and named in str(error.value)


def classify_rows(path, *answers):
    path.write_text("".join(json.dumps({"text": "t", "answers": found}) + "\n" for found in answers))
    return read_pooling_rows(path, "classify")


def test_questions_are_laid_out_by_name_and_rare_labels_left_out(tmp_path):
    answers = [{"z": "a", "y": ["p", "q"], "x": True}, {"z": "b", "y": ["p"], "x": False}] * 3 + [{"z": "rare"}]
    rows = classify_rows(tmp_path / "rows.jsonl", *answers)
    questions = questions_of(rows, 2, "rows.jsonl")
    assert [(q.name, q.kind, q.labels, q.first_output) for q in questions] == [
        ("x", "multi_class", ("no", "yes"), 0),
        ("y", "multi_label", ("p", "q"), 2),
        ("z", "multi_class", ("a", "b"), 4),
    ]
    assert targets_of(rows[0], questions, "f") == (1, (1.0, 1.0), 0)
    assert targets_of(rows[1], questions, "f") == (0, (1.0, 0.0), 1)
    assert targets_of(rows[-1], questions, "f") == (None, None, None)


def test_answers_that_do_not_agree_are_named(tmp_path):
    rows = classify_rows(tmp_path / "rows.jsonl", {"a": "x"}, {"a": ["x"]})
    with pytest.raises(UserError, match="line 2: the answer to 'a' is a list, in line 1 a label"):
        questions_of(rows, 1, "rows.jsonl")
    with pytest.raises(UserError, match="question 'a' has 1 labels of at least 1 rows .*there are 'x' 1"):
        questions_of(rows[:1], 1, "rows.jsonl")
    questions = questions_of(classify_rows(tmp_path / "more.jsonl", {"a": "x"}, {"a": "y"}), 1, "more.jsonl")
    with pytest.raises(UserError, match="line 2: the answer to 'a' is a list; one label is expected"):
        targets_of(rows[1], questions, "rows.jsonl")
    (other,) = classify_rows(tmp_path / "other.jsonl", {"b": "x"})
    with pytest.raises(UserError, match="there is no question 'b' in the training rows; known are 'a'"):
        targets_of(other, questions, "other.jsonl")


@pytest.mark.parametrize("name", ["search", "rerank", "tags"])
def test_the_example_runs_have_their_rows(name):
    config = load_run(EXAMPLES / f"{name}.yaml", [], {})
    check_ready(config)
    check_sections(config)
    for file, num in ((config.data.train, 100), (config.data.eval, 60)):
        rows = read_pooling_rows(file, config.task)
        assert len(rows) >= num and not any(row.unread for row in rows)
    if config.task == "classify":
        found = questions_of(read_pooling_rows(config.data.train, "classify"), config.classify.min_label_rows, "rows")
        assert len(found) == 7


def test_probabilities_are_of_one_label_where_they_add_up_and_go_with_answers_of_either_kind(tmp_path):
    both = {"x": 0.75, "y": 0.25}
    rows = classify_rows(
        tmp_path / "rows.jsonl",
        {"one": both, "each": both, "told": {"p": 0.5}, "is": {"yes": 0.9, "no": 0.1}},
        {"one": {"x": 0.25, "z": 0.75}, "each": {"x": 0.75}, "told": ["p", "q"], "is": True},
        {"one": "y", "each": {"y": 1.0, "x": 0.5}, "told": {"q": 1.0}, "is": False},
    )
    questions = questions_of(rows, 1, "rows.jsonl")
    assert [(q.name, q.kind, q.labels) for q in questions] == [
        ("each", "multi_label", ("x", "y")),
        ("is", "multi_class", ("no", "yes")),
        ("one", "multi_class", ("x", "y")),  # of z less than a row is expected
        ("told", "multi_label", ("p", "q")),
    ]
    targets = [dict(zip("eiot", targets_of(row, questions, "rows.jsonl"), strict=True)) for row in rows]
    assert targets[0]["o"] == (0.75, 0.25) and targets[1]["o"] == (1.0, 0.0) and targets[2]["o"] == 1
    assert targets[0]["e"] == (0.75, 0.25) and targets[1]["e"][0] == 0.75 and math.isnan(targets[1]["e"][1])
    assert targets[0]["t"][0] == 0.5 and math.isnan(targets[0]["t"][1]) and targets[1]["t"] == (1.0, 1.0)
    assert targets[0]["i"] == (0.1, 0.9) and targets[1]["i"] == 1
    odd = classify_rows(tmp_path / "odd.jsonl", {"one": {"x": 0.75, "y": 0.75}})
    with pytest.raises(UserError, match=r"odd.jsonl line 1: the probabilities of 'one' add up to 1.5"):
        targets_of(odd[0], questions, "odd.jsonl")


def test_probabilities_in_a_list_are_of_several_labels_whatever_they_add_up_to(tmp_path):
    def listed(**chances):
        return [{"label": label, "probability": chance} for label, chance in chances.items()]

    rows = classify_rows(
        tmp_path / "rows.jsonl",
        {"each": listed(x=0.75, y=0.25), "only": listed(z=1), "old": {"a": 0.5, "b": 0.5}},
        {"each": listed(x=0.5, y=0.75), "only": listed(z=1.0), "old": listed(a=0.5, b=0.5)},
    )
    questions = questions_of(rows, 1, "rows.jsonl")
    assert [(q.name, q.kind, q.labels) for q in questions] == [
        ("each", "multi_label", ("x", "y")),
        ("old", "multi_label", ("a", "b")),
        ("only", "multi_label", ("z",)),
    ]
    assert targets_of(rows[0], questions, "rows.jsonl")[0] == (0.75, 0.25)
    mixed = classify_rows(tmp_path / "mixed.jsonl", {"each": "x"}, {"each": listed(x=1.0)})
    with pytest.raises(UserError, match=r"line 2: the answer to 'each' is a list, in line 1 a label"):
        questions_of(mixed, 1, "mixed.jsonl")
    single = questions_of(classify_rows(tmp_path / "single.jsonl", {"each": "x"}, {"each": "y"}), 1, "single.jsonl")
    with pytest.raises(UserError, match=r"line 2: the answer to 'each' is a list; one label is expected"):
        targets_of(mixed[1], single, "mixed.jsonl")
