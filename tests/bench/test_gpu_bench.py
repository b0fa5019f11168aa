"""`python -m bench.gpu` reports every part: what passed, failed, ran out of time or was never begun."""

import json

import pytest
from click.testing import CliRunner

from bench import gpu


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Real processes: modules in a folder of their own."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    codes = {
        "fine": 'print(\'{"bench": "fine", "ms": 1}\')',
        "broken": "raise SystemExit(3)",
        "slow": "import time; time.sleep(60)",
        "late": "print('late')",
    }
    for name, code in codes.items():
        (tmp_path / f"part_{name}.py").write_text(code)
    limits = {"fine": 20, "broken": 20, "slow": 1, "late": 20}
    monkeypatch.setattr(gpu, "PARTS", tuple(gpu.Part(n, (f"part_{n}",), limits[n]) for n in codes))
    return tmp_path


def test_every_part_is_accounted_for_and_results_are_gathered(parts):
    result = CliRunner().invoke(gpu.main, ["--out", str(parts / "out"), "--budget", "120"])
    assert result.exit_code == 1
    states = json.loads(result.output.splitlines()[-1])["parts"]
    assert states == {"fine": "ok", "broken": "failed", "slow": "timeout", "late": "ok"}
    assert json.loads((parts / "out" / "gpu.jsonl").read_text()) == {"bench": "fine", "ms": 1}
    assert (parts / "out" / "broken.log").exists()


def test_a_part_that_does_not_fit_the_budget_is_skipped_and_fails_the_run(parts):
    result = CliRunner().invoke(gpu.main, ["--out", str(parts / "out"), "--budget", "1", "--only", "late"])
    assert result.exit_code == 1 and '"late": "skipped"' in result.output


def test_an_unknown_part_is_refused_by_name(parts):
    result = CliRunner().invoke(gpu.main, ["--only", "nope"])
    assert result.exit_code == 2 and "nope" in result.output
