"""`python -m bench.gpu` reports every part: what passed, failed, ran out of time or was never begun."""

import importlib
import json
import time

import pytest
import torch
from bench_process import bench_record
from click.testing import CliRunner
from peft_adapters import make_peft_adapter
from places import ROOT
from tiny_models import make_tiny_model

from bench import gpu, gpu_cases


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


def test_a_part_that_takes_too_long_ends_with_all_that_it_started(parts, monkeypatch):
    alive = parts / "alive"
    child = f"import time\nwhile True: open({str(alive)!r}, 'w').write(str(time.time())); time.sleep(0.05)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    (parts / "part_parent.py").write_text(code)
    for limit_s in (2, 60):  # two processes start meanwhile, which takes long on a busy machine
        monkeypatch.setattr(gpu, "PARTS", (gpu.Part("parent", ("part_parent",), limit_s),))
        result = CliRunner().invoke(gpu.main, ["--out", str(parts / "out")])
        assert '"parent": "timeout"' in result.output
        if alive.exists():
            break
    before = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == before


@pytest.mark.parametrize("part", gpu.PARTS, ids=lambda part: part.name)
def test_every_part_is_a_bench_that_knows_its_options_on_a_card_and_dry(part, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *arguments = part.arguments
    if name != "pytest":
        main = importlib.import_module(name).main
        for given in (arguments, part.dry):
            main.make_context(name, list(given))


def test_all_parts_together_fit_ten_minutes_but_for_some_spare_time():
    assert sum(part.limit_s for part in gpu.PARTS) < 900  # a part seldom takes its limit; what does not fit is last


@pytest.mark.slow
def test_the_bench_of_the_server_runs_on_a_tiny_model(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    for idx in range(2):
        make_peft_adapter(model, tmp_path / "adapters" / f"a{idx}", r=4, seed=idx)
    record = bench_record(
        "gpu_server", "--device", "cpu", "--model", str(model), "--adapters-dir", str(tmp_path / "adapters"),
        "--num", "4", "--late", "2", "--concurrency", "1,2", "--duration", "1", "--max-tokens", "8",
    )  # fmt: skip
    figures = record["figures"]
    assert figures["same_with_drafts"] == figures["same_beside_late"] == figures["same_after_kill"] == 4
    assert set(figures["levels"]) == {"1", "2"} and figures["back_s"] > 0


def test_an_unknown_part_is_refused_by_name(parts):
    result = CliRunner().invoke(gpu.main, ["--only", "nope"])
    assert result.exit_code == 2 and "nope" in result.output


def test_a_case_that_fails_on_a_card_leaves_the_others_their_results(monkeypatch, capsys):

    def too_large():
        raise torch.OutOfMemoryError("Tried to allocate 40.00 GiB")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_cases, "copy_bandwidth", lambda device, num_bytes: 1e12)
    with pytest.raises(SystemExit, match="1"):
        gpu_cases.run_cases("some", lambda limit, device: [lambda: {"us": 1}, too_large, lambda: {"us": 2}], 60, False)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["results"] == [{"us": 1}, {"us": 2}] and record["left_out"] == 0
    assert record["failed"] == ["OutOfMemoryError: Tried to allocate 40.00 GiB"]
