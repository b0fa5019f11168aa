"""`specserve train` from a YAML to a directory that peft loads and the engine drafts with; `specserve eval` of it."""

import json

import peft
import pytest
from engine_fixture import make_engine, request, run, tokens_of
from tiny_models import make_tiny_model
from training_fixture import torchrun, write_rows
from transformers import AutoModelForCausalLM

from specserve.cli import run as cli

SETTINGS = """
model: {model}
output: out/task
data: {{train: train.jsonl, eval: dev.jsonl, max_len: 200}}
lora: {{r: 4, alpha: 8}}
head: {{hidden_size: 16, vocab_size: 64, draft_len: 5, train_steps_ahead: 4, copy_window: 4}}
optimizer: {{lr: 0.005, batch_tokens: 400, epochs: 2}}
distill: {{rows: 12, epochs: 2, max_tokens: 24}}
eval: {{rows: 6, max_tokens: 24}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    model_dir = make_tiny_model(root / "model")
    write_rows(root / "train.jsonl", 40)
    write_rows(root / "dev.jsonl", 8, seed=1)
    (root / "run.yaml").write_text(SETTINGS.format(model=model_dir))
    assert cli(["train", str(root / "run.yaml"), "--set", "optimizer.warmup=0.1"]) == 0
    return root, model_dir


def test_the_directory_is_complete(trained):
    root, _ = trained
    names = {path.name for path in (root / "out" / "task").iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lookahead_config.json",
        "lookahead.safetensors",
        "lookahead_history.bin",
        "metrics.jsonl",
        "run.yaml",
        "report.json",
        "README.md",
        "plots",
    }
    assert "checkpoint.pt" not in names
    assert {path.name for path in (root / "out/task/plots").iterdir()} == {
        "loss.png",
        "accepted_length.png",
        "reached_by_position.png",
    }
    config = json.loads((root / "out/task/lookahead_config.json").read_text())
    assert config["draft_len"] == 5 and config["acceptance"]["head"]


def test_two_processes_finish_one_directory(trained, tmp_path):
    root, model_dir = trained
    (tmp_path / "run.yaml").write_text(SETTINGS.format(model=model_dir))
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    torchrun(2, "-m", "specserve.cli", "train", str(tmp_path / "run.yaml"), "--set", "optimizer.warmup=0.1")
    names = {path.name for path in (tmp_path / "out" / "task").iterdir()}
    assert names == {path.name for path in (root / "out" / "task").iterdir()}
    losses = [
        [json.loads(line)["loss"] for line in (folder / "out/task/metrics.jsonl").read_text().splitlines()]
        for folder in (root, tmp_path)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_the_report_says_what_was_measured(trained):
    report = json.loads((trained[0] / "out/task/report.json").read_text())
    assert report["rows"] == 6
    assert report["mean_accepted_length"] >= 1.0
    assert report["answers_equal_with_and_without_drafts"] >= 0.5
    assert report["lookahead"] == {
        "draft_len": 5,
        "history_tokens": report["lookahead"]["history_tokens"],
        "error": None,
    }
    assert report["speed"]["batch 8"]["tokens_per_s"] > 0


def test_the_lora_loads_in_peft_alone_and_answers_as_served(trained):
    root, model_dir = trained
    adapter = root / "out" / "task"
    engine = make_engine(model_dir)
    info = engine.load_adapter("task", adapter)
    assert info.lookahead is not None and info.lookahead.error is None
    prompt = [7, 8, 9, 10, 11]
    got = tokens_of(run(engine, [request("a", prompt, adapter=info.content_hash, max_tokens=12, ignore_eos=True)]))["a"]
    import torch

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter)
    want = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert got == want[0, len(prompt) :].tolist()


def test_eval_repeats_the_report(trained, capsys):
    root, _ = trained
    before = json.loads((root / "out/task/report.json").read_text())
    assert cli(["eval", str(root / "out/task"), "--rows", "6", "--max-tokens", "24"]) == 0
    after = json.loads((root / "out/task/report.json").read_text())
    assert after["task"] == before["task"]
    assert "tokens/s" in capsys.readouterr().out


def test_an_output_that_is_there_is_not_overwritten(trained, capsys):
    assert cli(["train", str(trained[0] / "run.yaml")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_an_existing_lora_gets_a_head(trained, tmp_path):
    root, model_dir = trained
    adapter = root / "out" / "task"
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    arguments = [
        "--adapter",
        str(adapter),
        "--head-only",
        "--data",
        str(root / "train.jsonl"),
        "--model",
        str(model_dir),
    ]
    small = ["--set", "head.hidden_size=16", "--set", "head.copy_window=0", "--set", "distill.rows=8"]
    small += ["--set", "distill.epochs=1", "--set", "distill.max_tokens=16"]
    assert cli(["train", *arguments, "--output", str(tmp_path / "new"), *small]) == 0
    from safetensors.torch import load, load_file

    new, old = load_file(tmp_path / "new" / "adapter_model.safetensors"), load(weights)
    assert new.keys() == old.keys() and all((new[name] == old[name]).all() for name in old)
    info = make_engine(model_dir).load_adapter("new", tmp_path / "new")
    assert info.lookahead is not None and info.lookahead.error is None


def test_checking_the_data_finds_what_is_wrong_with_it(trained, tmp_path, capsys):
    root, model_dir = trained
    rows = (root / "train.jsonl").read_text().splitlines()[:5]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, rows[0]]) + "\n")
    (tmp_path / "b.jsonl").write_text(rows[2] + "\n")
    common = ["--data", str(tmp_path / "a.jsonl"), "--eval-data", str(tmp_path / "b.jsonl"), "--model", str(model_dir)]
    assert cli(["train", *common, "--output", str(tmp_path / "o"), "--check-data", "--dry-run"]) == 1
    out = capsys.readouterr().out
    assert "line 6 repeats 1" in out and "line 3 is held-out line 1" in out and "[[" in out
    assert "GiB" in out and "minutes" in out
    assert not (tmp_path / "o").exists()


def test_head_only_needs_an_adapter(trained, tmp_path, capsys):
    root, model_dir = trained
    data = ["--data", str(root / "train.jsonl"), "--model", str(model_dir), "--output", str(tmp_path / "x")]
    assert cli(["train", *data, "--head-only"]) == 2
    assert "--adapter" in capsys.readouterr().err
