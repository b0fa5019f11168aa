"""JSONL rows to tokens: every format, loss on the assistant's tokens only, errors that name file, line and field."""

import json

import pytest
from tiny_models import make_tiny_model

from specserve.errors import UserError
from specserve.tokenizer import TextTokenizer
from specserve.training.data_check import shown_as_trained
from specserve.training.dataset import read_rows, tokenize

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
    examples = tokenize(read_rows(write(tmp_path, *SAME)), tokenizer, EOS)
    assert len({tuple(example.tokens) for example in examples}) == 1
    assert [example.line for example in examples] == [1, 2, 3, 4]


def test_an_instruction_takes_its_input_along(tmp_path):
    rows = read_rows(write(tmp_path, {"instruction": "Add", "input": "1 2", "output": "3"}))
    assert rows[0].messages[0]["content"] == "Add\n\n1 2"


def test_the_prompt_is_what_the_server_makes_of_the_same_messages(tokenizer, tmp_path):
    (example,) = tokenize(read_rows(write(tmp_path, SAME[0])), tokenizer, EOS)
    assert example.prompt == tokenizer.encode_chat([{"role": "user", "content": "Hi there"}])
    assert example.completion == [*tokenizer.encode("Yes", add_special_tokens=False), EOS]
    assert sum(example.loss_mask) == len(example.completion)


def test_every_turn_of_the_assistant_carries_loss(tokenizer, tmp_path):
    turns = ["Hi", "Yes", "More", "No"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    (example,) = tokenize(read_rows(write(tmp_path, {"messages": messages})), tokenizer, EOS)
    shown = shown_as_trained(example, tokenizer)
    assert shown.count("[[") == 2 and "[[Yes" in shown and "[[No" in shown and "[[More" not in shown


def test_text_that_spells_a_special_token_stays_text(tokenizer, tmp_path):
    (example,) = tokenize(read_rows(write(tmp_path, {"prompt": "a", "completion": "<|im_end|> b"})), tokenizer, EOS)
    assert example.completion.count(EOS) == 1


def test_a_system_message_is_put_first_unless_there_is_one(tokenizer, tmp_path):
    own = {"messages": [{"role": "system", "content": "Own"}, *SAME[0]["messages"]]}
    with_system, kept = tokenize(read_rows(write(tmp_path, SAME[0], own)), tokenizer, EOS, "Be brief")
    assert "Be brief" in tokenizer.decode(with_system.prompt)
    assert "Own" in tokenizer.decode(kept.prompt) and "Be brief" not in tokenizer.decode(kept.prompt)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is not JSON"),
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


def test_a_file_without_rows_or_without_existence(tmp_path):
    with pytest.raises(UserError, match="holds no rows"):
        read_rows(write(tmp_path, ""))
    with pytest.raises(UserError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")
