"""Labels of answers that are compared as sets."""

from bench.pooling_tags import _written, label_f1


def test_labels_count_over_all_questions_and_for_each():
    said = [{"a": {"x"}, "b": {"p", "q"}}, {"a": {"y"}, "b": set()}]
    wanted = [{"a": {"x"}, "b": {"p"}}, {"b": {"r"}}]  # the second has no answer to a
    found = label_f1(said, wanted, ["a", "b"])
    assert found == {"all": round(2 * 2 / (3 + 3), 4), "a": 1.0, "b": 0.5}


def test_written_answers_are_read_as_labels_and_no_json_is_none():
    text = '{"package": "n", "a": "x", "b": ["p", "q"], "c": null}'
    assert _written(text, ["a", "b", "c"]) == {"a": {"x"}, "b": {"p", "q"}}
    assert _written('{"a": ', ["a"]) == {} and _written("[1]", ["a"]) == {}
