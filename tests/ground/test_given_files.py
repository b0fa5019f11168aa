"""A file that is given in place of another kind is named as what it is, with the command that takes it."""

import pytest
from places import ROOT

from specserve.curation.labelling.label_file import read_label_file
from specserve.errors import UserError
from specserve.training.run_file import load_run

ROWS, LABELS, RUN = "data/tags.train.jsonl", "labels.yaml", "tags.yaml"


@pytest.mark.parametrize(
    "file, wanted, said",
    [
        (
            ROWS,
            "run",
            "tags.train.jsonl holds rows, .* and is no run file of training: name it as data.train in one, or",
        ),
        (ROWS, "label", "tags.train.jsonl holds rows, .* and is no label file: name it as data in one"),
        (LABELS, "run", r"labels.yaml is a label file, no run file of training: run `specserve label \S+labels.yaml`"),
        (RUN, "label", r"tags.yaml is a run file of training, .*: run `specserve train \S+tags.yaml`"),
    ],
)
def test_each_is_told_from_the_others(file, wanted, said):
    path = ROOT / "examples" / file
    with pytest.raises(UserError, match=said):
        load_run(path, [], {}) if wanted == "run" else read_label_file(path)


def test_files_of_the_right_kind_pass():
    for path in (ROOT / "examples").glob("*.yaml"):
        if path.name == LABELS:
            assert read_label_file(path).questions
        elif path.name != "config.yaml":  # of serve
            assert load_run(path, [], {}).output


def test_a_run_file_in_json_is_no_row(tmp_path):
    (tmp_path / "run.json").write_text('{"output": "x", "data": {"train": "rows.jsonl"}, "lora": {"r": 4}}')
    assert load_run(tmp_path / "run.json", [], {}).lora.r == 4
