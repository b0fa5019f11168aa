"""`specserve route`: profiles that are written, and who gets the prompts of a file."""

import shutil

import pytest
from places import ROOT

from specserve.cli.main import exit_code_of
from specserve.routing_profile import PROFILE_FILE

DATA = ROOT / "examples" / "data"


@pytest.fixture
def adapters(tmp_path):
    for name in ("debtags", "summary"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "examples/adapters" / name / "adapter_config.json", tmp_path / name)
    return tmp_path


def run(capsys, *words):
    code = exit_code_of(["route", *map(str, words)])
    return code, *capsys.readouterr()


def test_profiles_are_written_and_tried_on_held_out_rows(adapters, capsys):
    for name in ("debtags", "summary"):
        assert run(capsys, "profile", adapters / name, "--data", DATA / f"{name}.train.jsonl", "--prompts", 16)[0] == 0
    files = [f"--data={DATA}/debtags.dev.jsonl", f"--data=base={ROOT}/bench/data/chat_prompts.jsonl"]
    code, out, _ = run(capsys, "test", "--adapters-dir", adapters, *files)
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["wanted", "debtags", "summary", "base", "right"]
    assert [line.split()[0] for line in lines[1:3]] == ["debtags", "base"]
    assert all(float(line.split()[-2]) > 90 for line in lines[1:3]), out
    assert "of 124 right" in lines[3] and "microseconds a request, 2 profiles" in lines[4]


def test_mistakes_are_named(adapters, capsys):
    code, _, err = run(capsys, "test", "--adapters-dir", adapters, "--data", DATA / "debtags.dev.jsonl")
    assert code == 1 and f"no adapter in {adapters} has a {PROFILE_FILE}" in err
    code, _, err = run(capsys, "profile", DATA, "--data", DATA / "debtags.train.jsonl")
    assert code == 2 and "adapter_config.json" in err
    code, _, err = run(capsys, "profile", ROOT / "examples/adapters/search", "--data", DATA / "debtags.train.jsonl")
    assert code == 2 and "never chosen" in err
    run(capsys, "profile", adapters / "debtags", "--data", DATA / "debtags.train.jsonl")
    code, _, err = run(capsys, "test", "--adapters-dir", adapters, "--data", DATA / "summary.dev.jsonl")
    assert code == 2 and "'summary' is neither" in err and "NAME=FILE" in err
    (adapters / "debtags" / PROFILE_FILE).write_text("[]")
    code, _, err = run(capsys, "test", "--adapters-dir", adapters, "--data", DATA / "debtags.dev.jsonl")
    assert code == 2 and PROFILE_FILE in err
