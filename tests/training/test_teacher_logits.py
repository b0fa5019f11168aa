"""A teacher's logits beside the rows: read as they were written, and refused where they belong to anything else."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from specserve.errors import UserError
from specserve.training.data.teacher_logits import TopLogits, logits_file, read_teacher_logits, write_teacher_logits


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "completion": str(i)}) + "\n" for i in range(3)))
    return path


def top(*lengths, num_top=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(n, num_top) for n in lengths]
    return [
        TopLogits(rng.integers(0, 50, s).astype(np.int32), np.log(rng.uniform(0.1, 0.4, s)).astype(np.float16))
        for s in shapes
    ]


def test_what_was_written_is_read_again_also_of_a_row_without_logits(rows_file):
    written = top(4, 0, 2)
    assert write_teacher_logits(rows_file, "family", written) == logits_file(rows_file)
    read = read_teacher_logits(rows_file, "family", 64)
    assert [len(row) for row in read] == [4, 0, 2]
    for a, b in zip((written[0], written[2]), (read[0], read[2]), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)


def test_logits_of_changed_rows_of_another_tokenizer_or_missing_are_refused(rows_file):
    with pytest.raises(UserError, match=r"rows.logits.safetensors is missing"):
        read_teacher_logits(rows_file, "family", 64)
    write_teacher_logits(rows_file, "family", top(1, 1, 1))
    with pytest.raises(UserError, match="another tokenizer"):
        read_teacher_logits(rows_file, "stranger", 64)
    with open(rows_file, "a") as file:
        file.write(json.dumps({"prompt": "b", "completion": "c"}) + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl has changed since"):
        read_teacher_logits(rows_file, "family", 64)


def test_rows_that_know_different_numbers_of_tokens_are_refused(rows_file):
    with pytest.raises(UserError, match=r"\[2, 3\] tokens a position"):
        write_teacher_logits(rows_file, "family", [*top(1, 1), *top(1, num_top=3)])
    assert not logits_file(rows_file).exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", np.full((6, 2), 64, np.int32), "vocabulary of 64"),
        ("ids", np.zeros((5, 2), np.int32), r"ids are \[5, 2\]"),
        ("ids", np.zeros((6, 2), np.int64), "ids is I64"),
        ("logprobs", np.full((6, 2), 0.5, np.float16), "at most 0"),
        ("logprobs", np.full((6, 2), np.nan, np.float16), "at most 0"),
        ("offsets", np.array([0, 4, 3, 6]), "ascending"),
        ("offsets", np.array([0, 4, 5]), "ascending"),
    ],
)
def test_damaged_values_are_refused_by_name(rows_file, name, value, message):
    path = write_teacher_logits(rows_file, "family", top(4, 0, 2))
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {name: value}, path, metadata)
    with pytest.raises(UserError, match=message):
        read_teacher_logits(rows_file, "family", 64)


def test_a_file_that_was_cut_is_refused(rows_file):
    path = write_teacher_logits(rows_file, "family", top(4, 0, 2))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="no file of teacher's logits"):
        read_teacher_logits(rows_file, "family", 64)
