"""`specserve store`: what a person does with a shared store, in one folder."""

import json

import pytest

from specserve.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from specserve.cli.main import exit_code_of


@pytest.fixture
def run(tmp_path, capsys):
    def run(*words, code=0):
        assert exit_code_of(["store", *map(str, words), "--store", str(tmp_path / "store")]) == code
        return capsys.readouterr()

    return run


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (path / name).write_text(name)
    return path


def test_adapters_are_pushed_listed_pointed_to_removed_and_pruned(run, adapter):
    assert "nothing is in" in run("list").err
    first = run("push", adapter).out.split()[-1]
    assert run("push", adapter, "--name", "other").out.strip() == f"other -> {first} (was there)"
    (adapter / WEIGHTS_FILE).write_text("new")
    second = run("push", adapter).out.split()[-1]
    listed = {row["name"]: row["version"] for row in json.loads(run("list", "--json").out)}
    assert listed == {"mine": second, "other": first}
    assert run("point", "mine", first[:10]).out.strip() == f"mine -> {first}"
    assert [line.split()[:2] for line in run("list").out.splitlines()] == [
        ["mine", first[:16]],
        ["other", first[:16]],
        ["-", second[:16]],
    ]
    assert "0 versions went" in run("prune").err
    assert run("prune", "--older-than", "0s", "--dry-run").out.strip() == second
    assert run("prune", "--older-than", "0s").out.strip() == second
    run("remove", "mine", "other")
    assert run("prune", "--older-than", "0s").out.strip() == first
    run("push", adapter, "--no-name")


def test_mistakes_are_named(run, adapter, tmp_path):
    assert "is no directory" in run("push", tmp_path / "nowhere", code=2).err
    assert "has no adapter_config.json" in run("push", tmp_path, code=2).err
    assert "'nobody'" in run("remove", "nobody", code=2).err
    assert "no such version" in run("point", "x", "abc", code=2).err
    assert "is no age" in run("prune", "--older-than", "soon", code=2).err
    version = run("push", adapter).out.split()[-1]
    (tmp_path / "store" / "versions" / version / WEIGHTS_FILE).unlink()
    assert "not whole" in run("list", code=1).out
