"""A board of a tiny model: the base, two adapters, a task of JSON rows; what was run is there for all tests to read."""

import json
import random
import sqlite3

import pytest
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model
from training_fixture import write_rows

from specserve.cli.main import exit_code_of


class Board:
    def __init__(self, root, name="board.sqlite3"):
        self.root, self.path = root, root / name

    def cli(self, command, *words):
        return exit_code_of(["leaderboard", command, *map(str, words), "--board", str(self.path)])

    def shown(self, capsys):
        capsys.readouterr()
        assert self.cli("show", "--json") == 0
        return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def adapters(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second"), 1):
        make_peft_adapter(model_dir, root / name, r=4, seed=seed, std=0.3)
    return root


@pytest.fixture
def no_board(tmp_path):
    return Board(tmp_path)


@pytest.fixture
def begun(tmp_path, model_dir):
    """A board with a task and the base, not run yet."""
    board = Board(tmp_path)
    write_rows(tmp_path / "dev.jsonl", 6, seed=1)
    assert board.cli("add", "json", "--data", tmp_path / "dev.jsonl", "--max-tokens", 6) == 0
    assert board.cli("add-model", "base", "--model", model_dir) == 0
    return board


@pytest.fixture
def copied(ran, tmp_path):
    """`ran`, to be changed."""
    board = Board(tmp_path, "copy.sqlite3")
    with sqlite3.connect(ran.path) as source, sqlite3.connect(board.path) as copy:
        source.backup(copy)
    source.close(), copy.close()
    return board


@pytest.fixture(scope="session")
def ran(tmp_path_factory, model_dir, adapters):
    """Two tasks and three models, of which one has no score at the second task."""
    board = Board(tmp_path_factory.mktemp("board"))
    evil = "</pre><script>alert(1)</script>"
    write_rows(board.root / "json.jsonl", 30, seed=1)
    rng = random.Random(0)
    with open(board.root / "text.jsonl", "w") as file:
        for _ in range(4):
            words = " ".join(rng.choices(["fox", "dog", "the", "quick"], k=6))
            file.write(json.dumps({"prompt": f"{evil} {words}", "completion": words}) + "\n")
    assert board.cli("add", "json", "--data", board.root / "json.jsonl", "--max-tokens", 6) == 0
    assert board.cli("add", "text", "--data", board.root / "text.jsonl", "--max-tokens", 6, "--floor", 0.2) == 0
    assert board.cli("add-model", "base", "--model", model_dir) == 0
    for name in ("first", "second"):
        assert board.cli("add-model", name, "--model", model_dir, "--adapter", adapters / name) == 0
    assert board.cli("run", "--task", "json") == 0
    assert board.cli("run", "--task", "text", "--model", "base", "--model", "first") == 0
    return board
