"""A sweep of a tiny model: rungs, promotion, collapse, interruption."""

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import msgspec
import pytest
from places import ROOT
from safetensors.torch import load_file
from training_fixture import write_rows

from specserve.cli.main import exit_code_of as cli
from specserve.errors import UserError
from specserve.training.health import Health
from specserve.training.sweep.halving import best_of, default_rungs, healthy, order_of, share_of
from specserve.training.sweep.results import RungResult, SweepDirectory, write_result
from specserve.training.sweep.runner import Sweep
from specserve.training.sweep.sweep import SweepFlags, prepared_sweep

# What is made of a finished run, and how it is measured, is the trainer's: as little of it as there can be.
LITTLE = ("--set", "eval.max_tokens=8", "--set", "eval.rows=2", "--set", "distill.rows=2", "--set", "distill.epochs=1")
GRID = ("--grid", "optimizer.lr=0.005,0.001,1e-6", "--factor", "3", "--rungs", "2", *LITTLE)


@pytest.fixture(scope="module")
def swept(folder, in_this_process):
    """One that was interrupted within each rung."""
    seen = []

    def stop_once(name, rung):
        seen.append((name, rung))
        if len(seen) in (2, 5):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch, stop_once)
        command = ["sweep", str(folder / "run.yaml"), *GRID]
        assert [cli(command), cli(command), cli(command)] == [130, 130, 0]
    return folder / "out" / "task-sweep", seen


def test_all_runs_take_a_share_of_the_steps_and_the_best_goes_on(swept):
    directory, seen = swept
    table = json.loads((directory / "table.json").read_text())
    assert [run["rung"] for run in table["runs"]] == [2, 1, 1]
    assert table["best"] == table["runs"][0]["name"] == "1-lr-0.005"
    assert seen.count(("1-lr-0.005", 0)) == 1 and seen.count(("1-lr-0.005", 1)) == 2  # what was done is not done again
    best, second, third = table["runs"]
    assert best["losses"][0] < second["losses"][0] < third["losses"][0]
    assert best["step"] == best["num_steps"] and second["step"] == -(-second["num_steps"] // 3)
    assert best["tokens_per_s"] > 0 and best["tokens_per_verification"] >= 1 and best["num_bytes"] > 10_000
    assert all(run["general_ratio"] > 0 for run in table["runs"])
    assert (directory / "runs" / best["name"] / "task" / "adapter_config.json").is_file()
    assert table["serve"] == f"specserve serve --adapters-dir {directory / 'runs' / best['name']}"


def test_the_promoted_run_is_the_run_that_it_would_have_been_alone(swept, folder):
    directory, _ = swept
    alone = folder / "alone"
    settings = ["--set", "optimizer.lr=0.005", *LITTLE, "--set", "eval.rows=0"]
    swept_weights = load_file(directory / "runs" / "1-lr-0.005" / "task" / "adapter_model.safetensors")
    assert cli(["train", str(folder / "run.yaml"), "--output", str(alone), *settings]) == 0
    weights = load_file(alone / "adapter_model.safetensors")
    assert all(bool((weights[name] == swept_weights[name]).all()) for name in weights)


def test_the_report_holds_every_run(swept):
    page = (swept[0] / "report.html").read_text()
    assert all(name in page for name in ("1-lr-0.005", "2-lr-0.001", "3-lr-1e-06"))
    assert (
        page.count("<svg") == 2 and "<script" not in page and "http" not in re.sub(r"http://www\.w3\.org\S*", "", page)
    )


def test_the_same_command_prints_the_table_again_and_another_is_refused(swept, folder, monkeypatch, capsys):
    def fail(*args):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(Sweep, "_start", fail)
    assert cli(["sweep", str(folder / "run.yaml"), *GRID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] == "1-lr-0.005"
    assert cli(["sweep", str(folder / "run.yaml"), *GRID, "--set", "seed=1"]) == 2
    assert "holds another sweep (base differ)" in capsys.readouterr().err
    assert cli(["sweep", str(folder / "run.yaml"), *GRID, "--output", str(folder)]) == 2
    assert "no sweep of ours" in capsys.readouterr().err


def test_heads_alone_are_compared_by_what_they_draft(folder, in_this_process, monkeypatch, capsys):
    in_this_process(monkeypatch)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the quick {word}"}) + "\n" for word in ("fox", "dog", "jug")))
    flags = ["--set", "lora.enabled=false", "--set", f"data.eval={prompts}", *LITTLE, "--rungs", "1"]
    flags += ["--grid", "head.hidden_size=16,32", "--output", str(folder / "heads")]
    assert cli(["sweep", str(folder / "run.yaml"), *flags]) == 0
    table = json.loads((folder / "heads" / "table.json").read_text())
    runs = table["runs"]
    assert table["serve"] == f"specserve serve --base-head {runs[0]['directory']}"
    assert all(run["score"] == run["tokens_per_verification"] >= 1 for run in runs) and len(runs) == 2
    assert runs[0]["score"] >= runs[1]["score"] and "best: " in capsys.readouterr().out


def test_runs_that_collapse_are_marked(folder, in_this_process, monkeypatch, capsys):
    def let_it_diverge(name, rung):
        problem = "the loss is nan" if name.startswith("1-") else None
        monkeypatch.setattr(Health, "problem", lambda *values: problem)

    in_this_process(monkeypatch, let_it_diverge)
    flags = ["--grid", "lora.alpha=8,16", "--factor", "2", "--rungs", "1", *LITTLE]
    flags += ["--set", "optimizer.max_steps=6", "--set", "head.enabled=false", "--forgetting-limit", "0.01"]
    flags += ["--output", str(folder / "collapse")]
    assert cli(["sweep", str(folder / "run.yaml"), *flags]) == 0
    out = capsys.readouterr().out
    table = json.loads((folder / "collapse" / "table.json").read_text())
    assert [run["marks"] for run in table["runs"]] == [["forgets"], ["diverged"]], table
    assert "warning: it forgets" in out and "optimizer.lr" in table["runs"][1]["problem"]


def test_what_is_wrong_with_a_run_ends_the_sweep_with_its_message(folder, capsys):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    flags = ["--grid", "lora.r=2,4", "--output", str(folder / "bad"), "--set", f"data.train={folder / 'bad.jsonl'}"]
    assert cli(["sweep", str(folder / "run.yaml"), *flags]) == 2
    err = capsys.readouterr().err
    assert "the run 1-r-2 ended" in err and "bad.jsonl line 2" in err and "what is done is kept" in err


def test_what_a_base_cannot_do_is_said_before_any_run(folder, sweep_model, tmp_path, capsys):
    base = shutil.copytree(sweep_model, tmp_path / "base")
    command = ["sweep", str(folder / "run.yaml"), "--output", str(tmp_path / "sweep")]
    command += ["--grid", "lora.r=2,4", "--rungs", "1", "--set", f"model={base}"]
    (base / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('No') }}{% endif %}"
    )
    general = tmp_path / "general.jsonl"
    general.write_text('{"system": "Be brief.", "prompt": "Hello", "completion": "Hi"}\n')
    assert cli([*command, "--general", str(general)]) == 2
    assert "general.jsonl line 1: messages[2]: the chat template refuses" in capsys.readouterr().err
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["MixtralForCausalLM"]}))
    assert cli(command) == 2
    assert "MixtralForCausalLM is not supported" in capsys.readouterr().err and not (tmp_path / "sweep").exists()


def test_a_sweep_is_of_the_rows_logits_and_day_that_its_runs_read(folder, monkeypatch):
    rows, general, output = folder / "known.jsonl", folder / "general.jsonl", folder / "known"
    logits = rows.with_suffix(".logits.safetensors")
    write_rows(rows, 4), write_rows(general, 3)
    flags = SweepFlags(output, factor=2, rungs=1, forgetting_limit=2.0, general=general)
    settings = [f"data.train={rows}", "loss=kl"]

    def begin():
        directory, plan = prepared_sweep(folder / "run.yaml", settings, ["lora.r=2,4"], flags)
        with directory.held():
            directory.begin(plan)

    with pytest.raises(UserError, match="known.logits.safetensors is missing"):
        begin()
    logits.write_bytes(b"old")
    begin()
    begin()
    for path in (rows, general, logits):
        old = path.read_bytes()
        path.write_bytes(old + old)
        with pytest.raises(UserError, match=f"{path} changed since the sweep in {output} began"):
            begin()
        path.write_bytes(old)
    today = SweepDirectory(output).plan().base["data"]["date"]
    assert today == datetime.date.today().isoformat()
    tomorrow = datetime.date.today() + datetime.timedelta(days=1)
    later = SimpleNamespace(date=SimpleNamespace(today=lambda: tomorrow))
    monkeypatch.setattr("specserve.training.sweep.sweep.datetime", later)
    begin()
    assert SweepDirectory(output).plan().base["data"]["date"] == today


def result(loss, score=None, marks=()):
    return RungResult(step=1, num_steps=3, seconds=0, loss=loss, score=score, marks=tuple(marks))


def test_the_order_of_runs():
    results = {
        "a": result(0.5),
        "b": result(0.4, marks=["forgets"]),
        "c": result(0.6),
        "d": result(None, marks=["diverged"]),
        "e": result(0.1, marks=["zeros"]),
    }
    assert order_of(results) == ["a", "c", "b", "e", "d"] and healthy(results) == ["a", "c", "b"]
    assert best_of({"a": result(0.1, 0.8), "b": result(0.2, 0.9)}) == "b"
    assert best_of({"d": results["d"]}) is None
    assert [default_rungs(num, 3) for num in (2, 3, 8, 9, 100)] == [1, 2, 2, 3, 3]
    assert [share_of(rung, 3, 3) for rung in range(3)] == pytest.approx([1 / 9, 1 / 3, 1])


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_leaves_no_process(folder):
    output = folder / "killed"
    command = [sys.executable, "-m", "specserve.cli", "sweep", str(folder / "run.yaml"), *GRID, "--output", str(output)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    for line in process.stderr:
        if line.startswith("rung 1: 1-"):
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "rung 1: 1 of 3 runs were there before" in done.stderr or "2 of 3" in done.stderr
    assert json.loads((output / "table.json").read_text())["best"] == "1-lr-0.005"
    with SweepDirectory(output).held():  # nobody holds the lock any more
        pass


def test_where_all_runs_of_a_rung_collapse_the_next_ones_go_on(folder, monkeypatch, capsys):
    started = []

    def start(sweep, name, rung, lock):
        started.append((rung, name[:1]))
        number = int(name[:1])
        made = result(0.1 * number, marks=["diverged"] if rung and number < 3 else [])
        if rung and number == 3:
            made = msgspec.structs.replace(result(0.3, score=0.5), num_bytes=1)
        sweep._directory.run_folder(name).mkdir(parents=True, exist_ok=True)
        write_result(sweep._directory.result_file(name, rung), made)
        return SimpleNamespace(poll=lambda: 0, returncode=0, stdin=SimpleNamespace(close=lambda: None))

    monkeypatch.setattr(Sweep, "_start", start)
    flags = ["--grid", "lora.r=1,2,4,8", "--factor", "4", "--output", str(folder / "places")]
    assert cli(["sweep", str(folder / "run.yaml"), *flags]) == 0
    assert [name for rung, name in started if rung] == ["1", "2", "3"]
    assert "best: 3-r-4" in capsys.readouterr().out


def test_a_sweep_of_an_adapter_that_pools(folder, in_this_process, monkeypatch, sweep_model):
    in_this_process(monkeypatch)
    rows = [{"text": f"the {word} number {n}", "label": word} for n in range(8) for word in ("fox", "dog")]
    for name in ("train", "dev"):
        (folder / f"{name}.class.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task": "classify", "data.train": "train.class.jsonl", "data.eval": "dev.class.jsonl"}
    run = f"model: {sweep_model}\noutput: class\nlora: {{r: 2}}\noptimizer: {{batch_tokens: 200, epochs: 2}}\n"
    (folder / "class.yaml").write_text(run + "".join(f"{key}: {value}\n" for key, value in settings.items()))
    assert (
        cli(["sweep", str(folder / "class.yaml"), "--grid", "optimizer.lr=0.01,1e-6", "--factor", "2", "--debug"]) == 0
    )
    best, other = json.loads((folder / "class-sweep" / "table.json").read_text())["runs"]
    assert best["score"] >= 0.5 and best["tokens_per_s"] is None and other["score"] is None
    assert best["losses"][0] < other["losses"][0] and best["general_ratio"] is None


def test_an_output_that_cannot_be_written_is_the_users_to_know(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot write to the output directory .*sweep: Not a directory"),
        SweepDirectory(tmp_path / "file" / "sweep").held(),
    ):
        pass
