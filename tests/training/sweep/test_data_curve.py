"""A learning curve of a tiny model: doublings of rows, one sweep's runs, a table and a plot."""

import json

import pytest
from training_fixture import write_rows

from specserve.cli.main import exit_code_of as cli
from specserve.errors import UserError
from specserve.training.sweep.data_curve import sizes_of
from specserve.training.sweep.runner import Sweep

FLAGS = ("--doublings", "1", "--set", "eval.max_tokens=8", "--set", "optimizer.max_steps=2", "--set", "eval.rows=2")
HEADLESS = ("--set", "head.enabled=false")  # a run without one ends soon


def test_the_number_of_rows_is_doubled_up_to_all_of_them():
    assert sizes_of(100, 3) == [12, 25, 50, 100] and sizes_of(9, 3) == [4, 9]
    with pytest.raises(UserError, match="has 7 rows; at least 8 are needed"):
        sizes_of(7, 3)


def test_each_doubling_is_trained_and_measured_on_the_same_rows(folder, in_this_process, monkeypatch, capsys):
    started = []

    def stop_once(name, rung):
        started.append(name)
        if len(started) == 2:
            raise KeyboardInterrupt

    in_this_process(monkeypatch, stop_once)
    command = ["curve", str(folder / "run.yaml"), *FLAGS, *HEADLESS]
    assert cli(command) == 130
    assert cli(command) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]  # runs in this process print, too
    assert started == ["1-max_rows-12", "2-max_rows-25", "2-max_rows-25"]
    directory = folder / "out" / "task-curve"
    curve = json.loads((directory / "curve.json").read_text())
    assert [point["rows"] for point in curve["points"]] == [12, 25]
    assert all(0 <= point["score"] <= 1 and point["task"] and point["loss"] > 0 for point in curve["points"])
    assert curve["eval"] == str(folder / "dev.jsonl")
    assert lines[0].split()[:2] == ["rows", "steps"] and [line.split()[0] for line in lines[1:3]] == ["12", "25"]
    assert "from 12 to 25 rows the score went" in lines[3]
    assert (directory / "curve.png").read_bytes()[:4] == b"\x89PNG"
    page = (directory / "curve.html").read_text()
    assert page.count("<svg") == 1 and "12" in page

    monkeypatch.setattr(Sweep, "_start", lambda *args: pytest.fail("nothing is left to do"))
    assert cli(command) == 0 and capsys.readouterr().out.splitlines() == lines
    write_rows(folder / "train.jsonl", 25, seed=5)
    assert cli(command) == 2 and f"{folder / 'train.jsonl'} changed since the sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--set", "data.max_rows=5"], "data.train has 5 rows"),
        (["--set", "data.eval=null"], "data.eval is missing"),
        (["--set", "data.train=none.jsonl"], "there is no file none.jsonl"),
        (["--set", "output=''"], "output is missing"),
    ],
)
def test_what_no_curve_can_be_made_of_is_refused(folder, capsys, flags, problem):
    assert cli(["curve", str(folder / "run.yaml"), *flags]) == 2
    assert problem in capsys.readouterr().err
