"""An answer against a schema, as specserve would serve it."""

import json

import pytest
from places import ROOT

from specserve.curation.answer_schema import AnswerSchema, read_schema
from specserve.errors import UserError

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def test_the_answers_of_the_example_rows_are_of_their_schemas_as_they_are():
    for task in ("control2json", "debtags"):
        schema = AnswerSchema(read_schema(ROOT / f"examples/data/{task}.schema.json"))
        answers = [json.loads(line)["completion"] for line in (ROOT / f"examples/data/{task}.train.jsonl").open()]
        assert [schema.normal(answer) for answer in answers] == answers


def test_white_space_is_written_as_it_is_served():
    text = AnswerSchema(SCHEMA).normal('{"name":"é\\u00e9",\n  "size": 3}\n')
    assert text == '{"name": "éé", "size": 3}'
    compact = {**SCHEMA, "x-guidance": {"item_separator": ",", "key_separator": ":"}}
    assert AnswerSchema(compact).normal(text) == '{"name":"éé","size":3}'


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('{"size": 3}', "'size"),
        ('{"name": "a", "size": -1}', "'-1}'"),
        ('{"name": "a", "size": 1, "more": 2}', "more"),
        ('{"name": "a", "name": "b"}', "appears twice"),
        ('{"name": "a"', "not valid JSON"),
        ("Sure! Here it is", "not valid JSON"),
        ("", "is empty"),
        ('"a"', "not of the schema"),
    ],
)
def test_what_is_wrong_is_named(answer, problem):
    assert problem in (AnswerSchema(SCHEMA).problem(answer) or "")


@pytest.mark.parametrize(
    ("content", "problem"),
    [("[1]", "an object"), ("{", "not valid JSON"), ('{"not": {}}', "'not'"), ('{"type": 5}', "cannot be")],
)
def test_a_schema_that_cannot_be_served_is_refused(tmp_path, content, problem):
    (tmp_path / "schema.json").write_text(content)
    with pytest.raises(UserError, match=problem):
        read_schema(tmp_path / "schema.json")


def test_a_schema_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read the schema .*No such file"):
        read_schema(tmp_path / "none.json")
