"""JSONL rows to tokens: every format, loss on the assistant's tokens only, errors that name file, line and field."""

import json

import pytest
from tiny_models import make_tiny_model

from specserve.errors import UserError
from specserve.text.tokenizer import TextTokenizer
from specserve.training.data.check import shown_as_trained
from specserve.training.data.dataset import read_rows, tokenize

EOS = 319


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer(make_tiny_model(tmp_path_factory.mktemp("model")))


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


SAME = [
    {"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes"}]},
    {"prompt": "Hi there", "completion": "Yes"},
    {"conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Yes"}]},
    {"instruction": "Hi there", "output": "Yes"},
]


def test_all_formats_of_one_row_give_the_same_tokens(tokenizer, tmp_path):
    examples = tokenize(read_rows(write(tmp_path, *SAME)), tokenizer, [EOS])
    assert len({tuple(example.tokens) for example in examples}) == 1
    assert [example.line for example in examples] == [1, 2, 3, 4]


def test_lines_behind_the_last_row_that_is_wanted_are_not_looked_at(tmp_path):
    path = write(tmp_path, SAME[0], "", SAME[1], "{")
    assert [row.line for row in read_rows(path, 2)] == [1, 3]
    with pytest.raises(UserError, match="line 4"):
        read_rows(path)


def test_an_instruction_takes_its_input_along(tmp_path):
    rows = read_rows(write(tmp_path, {"instruction": "Add", "input": "1 2", "output": "3"}))
    assert rows[0].messages[0]["content"] == "Add\n\n1 2"


def test_the_prompt_is_what_the_server_makes_of_the_same_messages(tokenizer, tmp_path):
    (example,) = tokenize(read_rows(write(tmp_path, SAME[0])), tokenizer, [EOS])
    assert example.prompt == tokenizer.encode_chat([{"role": "user", "content": "Hi there"}])
    assert example.completion == [*tokenizer.encode("Yes", add_special_tokens=False), EOS]
    assert sum(example.loss_mask) == len(example.completion)


def test_every_turn_of_the_assistant_carries_loss(tokenizer, tmp_path):
    turns = ["Hi", "Yes", "More", "No"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    (example,) = tokenize(read_rows(write(tmp_path, {"messages": messages})), tokenizer, [EOS])
    shown = shown_as_trained(example, tokenizer)
    assert shown.count("[[") == 2 and "[[Yes" in shown and "[[No" in shown and "[[More" not in shown


def test_text_that_spells_a_special_token_stays_text(tokenizer, tmp_path):
    (example,) = tokenize(read_rows(write(tmp_path, {"prompt": "a", "completion": "<|im_end|> b"})), tokenizer, [EOS])
    assert example.completion.count(EOS) == 1


def test_a_system_message_is_put_first_unless_there_is_one(tokenizer, tmp_path):
    own = {"messages": [{"role": "system", "content": "Own"}, *SAME[0]["messages"]]}
    with_system, kept = tokenize(read_rows(write(tmp_path, SAME[0], own)), tokenizer, [EOS], "Be brief")
    assert "Be brief" in tokenizer.decode(with_system.prompt)
    assert "Own" in tokenizer.decode(kept.prompt) and "Be brief" not in tokenizer.decode(kept.prompt)


def test_the_field_system_is_a_system_message_in_every_format(tokenizer, tmp_path):
    rows = [{"system": "Own", **row} for row in SAME]
    rows.append({"messages": [{"role": "developer", "content": "Own"}, *SAME[0]["messages"]]})
    examples = tokenize(read_rows(write(tmp_path, *rows)), tokenizer, [EOS], "Be brief")
    assert len({tuple(example.tokens) for example in examples}) == 1
    assert "<|im_start|>system\nOwn" in tokenizer.decode(examples[0].prompt)
    bare = read_rows(write(tmp_path, SAME[0], {"system": "", **SAME[0]}, {"system": None, **SAME[0]}))
    assert len({tuple(example.tokens) for example in tokenize(bare, tokenizer, [EOS])}) == 1


def test_an_answer_of_weight_0_is_context(tokenizer, tmp_path):
    turns = [("user", "Hi", None), ("assistant", "Yes", 0), ("user", "More", None), ("assistant", "No", 1)]
    messages = [{"role": role, "content": text, "weight": weight} for role, text, weight in turns]
    (example,) = tokenize(read_rows(write(tmp_path, {"messages": messages})), tokenizer, [EOS])
    assert shown_as_trained(example, tokenizer).endswith(
        "Yes<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n[[No<|im_end|>]]"
    )


def test_text_parts_null_fields_and_unread_ones(tmp_path):
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    message = {"role": "user", "content": parts, "name": None, "tool_calls": None}
    row = {"id": 3, "messages": [message, SAME[0]["messages"][1]], "tools": None, "source": "web"}
    (read,) = read_rows(write(tmp_path, row))
    assert read.messages == SAME[0]["messages"] and read.conversation.unread == ("id", "source")


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLED = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]


def test_calls_of_data_sets_get_the_ids_and_the_shape_of_the_api(tmp_path):
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": ""}]
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    (row,) = read_rows(
        write(tmp_path, {"messages": [CALLED[0], calling, *results, {"role": "assistant", "content": "b"}]})
    )
    ids = [call["id"] for call in row.messages[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in row.messages[2:4]] == ids == ["call00001", "call00002"]
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("prompt,completion", "give one JSON object a line"),
        ("[1]", "line 2 is list, not an object; give one JSON object a line"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "line 2: the key 'prompt' stands twice"),
        ('{"messages": [{"role": "user", "role": "x", "content": "a"}]}', "line 2: the key 'role' stands twice"),
        ('{"prompt": "a", "completion": NaN}', "line 2: NaN is not a JSON number"),
        ('{"prompt": "\\ud800", "completion": "b"}', "line 2 holds half of a surrogate pair"),
        ("[" * 100_000, "line 2 is nested too deep"),
        ({"messages": [*SAME[0]["messages"]], "functions": []}, "line 2: functions is not read"),
        ({"prompt": "a", "completion": "b", "history": []}, "line 2: history is not read"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}, *CALLED]}, "keep one"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, r"messages\[0\].name is not read"),
        ({"messages": [{"role": "user", "content": "a", "thinking": "x"}]}, r"messages\[0\].thinking: only assis"),
        ({"messages": [{"role": "user", "content": "a", "audio": {}}]}, r"messages\[0\].audio is not read"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, r"messages\[0\].tool_calls: only as"),
        ({"messages": [*CALLED, {"role": "tool", "tool_call_id": "x", "content": "1"}]}, "'x' answers no tool call"),
        ({"messages": [CALLED[0], {"role": "tool", "content": "1"}]}, r"messages\[1\] answers no tool call"),
        ({"messages": [*CALLED, {"role": "tool", "name": "g", "content": "1"}]}, "'g', but the call is of 'f'"),
        (
            {"messages": [CALLED[0], {"role": "assistant", "tool_calls": [{}]}]},
            r"messages\[1\].tool_calls\[0\] must be",
        ),
        ({"messages": CALLED, "tools": {}}, "line 2: tools is dict"),
        ({"messages": CALLED, "tools": [{"name": "f"}]}, r"line 2: tools\[0\] must be"),
        ({"messages": [CALLED[0], {"role": "assistant", "content": "a", "weight": 2}]}, "weight is 2"),
        ({"messages": [CALLED[0], {"role": "assistant", "content": "a", "weight": 0}]}, "nothing to learn"),
        ({"conversations": [{"from": "human", "value": "a", "tool_calls": [CALL]}]}, "tool_calls is not read"),
        ("[1]", "line 2 is list"),
        ({"text": "a"}, "line 2 has the fields 'text'"),
        ({"prompt": "a"}, "line 2: completion is missing"),
        ({"prompt": "a", "completion": ""}, "line 2: completion is empty"),
        ({"prompt": 3, "completion": "b"}, "line 2: prompt is int"),
        ({"messages": []}, "line 2: messages is list"),
        ({"messages": [3]}, r"messages\[0\] is int"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\].role is 'robot'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message is the user's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing stands before"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: value is missing"),
        ({"instruction": "a"}, "line 2: response is missing"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as error:
        read_rows(write(tmp_path, SAME[1], row))
    assert "rows.jsonl" in str(error.value)


def test_a_row_beyond_any_context_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("specserve.training.data.rows.MAX_ROW_BYTES", 100)
    with pytest.raises(UserError, match="line 2 is longer than 100 characters"):
        read_rows(write(tmp_path, SAME[1], {"prompt": "a" * 200, "completion": "b"}))


def test_a_file_without_rows_or_without_existence(tmp_path):
    with pytest.raises(UserError, match="holds no rows"):
        read_rows(write(tmp_path, ""))
    with pytest.raises(UserError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")


def test_a_row_may_weigh_and_have_several_answers_that_weigh(tokenizer, tmp_path):
    several = {"prompt": "Hi there", "system": "Be brief", "weight": 0.5}
    several["completions"] = [{"completion": "Yes", "weight": 0.8}, {"completion": "No"}]
    path = write(tmp_path, {**SAME[0], "weight": 3}, several, SAME[1])
    examples = tokenize(read_rows(path), tokenizer, [EOS])
    assert [(e.line, e.weight) for e in examples] == [(1, 3.0), (2, 0.4), (2, 0.5), (3, 1.0)]
    assert examples[0].tokens == examples[3].tokens and examples[0].content != examples[3].content
    assert examples[1].prompt == examples[2].prompt and examples[1].completion != examples[2].completion
    assert "Be brief" in tokenizer.decode(examples[2].prompt, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "a", "completion": "b", "weight": 0}, "weight is 0; a number above 0"),
        ({"prompt": "a", "completion": "b", "weight": True}, "weight is True"),
        ({"prompt": "a", "completions": []}, "completions is []; a list with answers"),
        ({"prompt": "a", "completions": [{"text": "b"}]}, "completions[0] is {'text': 'b'}"),
        ({"prompt": "a", "completions": [{"completion": ""}]}, "completions[0]: completion is empty"),
        ({"prompt": "a", "completions": [{"completion": "b", "weight": "1"}]}, "completions[0].weight is '1'"),
        ({"prompt": "a", "completion": "b", "completions": [{"completion": "b"}]}, "keep one"),
    ],
)
def test_bad_weights_and_answers_are_named(tmp_path, row, named):
    with pytest.raises(UserError) as error:
        read_rows(write(tmp_path, row))
    assert named in str(error.value)
