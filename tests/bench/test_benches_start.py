"""Benches are run by hand and seldom: each must import, know its options, and end in its JSON line as all do."""

import importlib
import itertools
import json
import re

import click
import pytest
from click.testing import CliRunner
from places import ROOT

from bench import common, options
from bench.tasks import in_turn

MAIN = re.compile(r"^(def main|main =)", re.MULTILINE)
MAINS = [path for path in sorted((ROOT / "bench").rglob("*.py")) if MAIN.search(path.read_text("utf-8"))]
NAMES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MAINS]


@pytest.mark.parametrize("name", NAMES)
def test_every_bench_starts_and_says_what_it_asks(name):
    module = importlib.import_module(name)
    assert "?" in module.__doc__.partition("\n\n")[0], "the docstring opens with the question"
    result = CliRunner().invoke(module.main, ["--help"])
    assert result.exit_code == 0, result.output
    assert f"python -m {name.removesuffix('.__main__')}" in module.__doc__


def test_a_run_is_one_json_line_that_is_kept_only_where_it_is_to_be_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    run = common.start("speed", "torch")
    run.finish({"figures": {"a": 1}}, save=False)
    assert not (tmp_path / "results").exists()
    run.finish({"figures": {"a": 2}, "versions": {"peer": "1"}}, save=True)
    first, second = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert (
        list(first) == ["bench", "date", "commit", "versions", "hardware", "figures"] and "torch" in first["versions"]
    )
    assert json.loads((tmp_path / "results" / "speed.jsonl").read_text()) == second and second["versions"] == {
        "peer": "1"
    }


@pytest.mark.parametrize("value", ["", "1,,2", "0", "1,-8", "eight"])
def test_lists_of_numbers_are_refused_by_their_value(value):
    @click.command()
    @options.numbers("--batch", "1,8")
    def command(batch):
        click.echo(batch)

    refused = CliRunner().invoke(command, ["--batch", value])
    assert refused.exit_code == 2 and repr(value) in refused.output
    assert CliRunner().invoke(command, []).output == "[1, 8]\n"


def test_tasks_take_turns_and_begin_again():
    turns = itertools.islice(in_turn(["ab", "x"]), 6)
    assert list(turns) == [(0, "a"), (1, "x"), (0, "b"), (1, "x"), (0, "a"), (1, "x")]
