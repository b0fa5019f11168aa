"""`python -m bench.between_commits` measures each commit by its own files, and leaves the repository as it was."""

import json
import subprocess

import pytest
from click.testing import CliRunner

from bench import between_commits

BENCH = """
import json
rates = {{"case": {{"tokens_per_s": {{"median": {rate}, "min": 1}}}}}}
print(json.dumps({{"bench": "speed", "figures": rates, "ms": {{"median": 500 / {rate}}}}}))
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits whose bench reports 100 and 50 tokens/s, and a working tree that reports 200."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.invalid"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "specserve").mkdir()
    (tmp_path / "specserve" / "__init__.py").touch()
    (tmp_path / "bench").mkdir()
    for rate in (100, 50):
        (tmp_path / "bench" / "speed.py").write_text(BENCH.format(rate=rate))
        git("add", ".")
        git("commit", "-q", "-m", str(rate))
    (tmp_path / "bench" / "speed.py").write_text("from .fast import *")
    (tmp_path / "bench" / "fast.py").write_text(BENCH.format(rate=200))
    monkeypatch.setattr(between_commits.common, "ROOT", tmp_path)
    return tmp_path


def compare(*options, rounds=4):
    result = CliRunner().invoke(between_commits.main, [*options, "--rounds", str(rounds), "--", "bench.speed"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.output.splitlines()[-1])
    (figure,) = record["figures"].values()
    assert (record["all"]["ratio"]["median"], record["all"]["verdict"]) == (figure["ratio"], figure["verdict"])
    return figure


def test_a_commit_that_halves_the_rate_is_called_slower(repository):
    figure = compare("--old", "HEAD~1", "--new", "HEAD")
    assert figure["ratio"] == 0.5 and figure["verdict"] == "slower"


def test_of_times_less_is_faster(repository):
    figure = compare("--old", "HEAD~1", "--new", "HEAD", "--of", "ms")
    assert (figure["old"]["median"], figure["new"]["median"]) == (5, 10)
    assert figure["ratio"] == 0.5 and figure["verdict"] == "slower"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("results/auto/1 row at 0/ms", True), ("wall_s", True), ("tokens_per_s/off", False), ("gb_per_s", False),
     ("ms_beside", False), ("ms/p50", True)],
)  # fmt: skip
def test_times_are_known_by_their_unit(name, expected):
    assert between_commits.is_time(name) is expected


def test_equal_rates_are_noise(repository):
    assert compare("--old", "HEAD", "--new", "HEAD")["verdict"] == "noise"


def test_few_rounds_say_nothing(repository):
    assert compare("--old", "HEAD~1", "--new", "HEAD", rounds=2)["verdict"] == "too few rounds"


def test_the_working_tree_is_measured_with_its_changes_and_new_files_and_stays(repository):
    assert compare("--old", "HEAD", "--new", ".", rounds=1)["ratio"] == 4.0
    assert (repository / "bench" / "fast.py").exists()
    trees = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert len(trees.splitlines()) == 1


def test_numbers_of_lists_are_named_by_their_case():
    record = {
        "rounds": 3,
        "cells": [{"adapters": "no LoRA", "batch": 8, "peers": {"specserve": {"tokens_per_s": {"median": 7.5}}}}],
        "tokens_per_s": {"off": {"median": 2.0}, "on": 3},
    }
    assert between_commits.numbers_of(record) == {
        "cells/no LoRA 8/peers/specserve/tokens_per_s": 7.5,
        "tokens_per_s/off": 2.0,
        "tokens_per_s/on": 3.0,
    }


def test_an_unknown_commit_is_a_usage_error(repository):
    result = CliRunner().invoke(between_commits.main, ["--old", "nowhere"])
    assert result.exit_code == 2 and "nowhere" in result.output
