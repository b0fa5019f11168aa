"""`specserve train` from a YAML to a directory that peft loads and the engine drafts with; `specserve eval` of it."""

import datetime
import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import peft
import pytest
from engine_fixture import make_engine, request, run, tokens_of
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file, save_file
from tiny_models import CHAT_TEMPLATE, make_tiny_model
from training_fixture import SETTINGS, torchrun, write_rows
from transformers import AutoModelForCausalLM

from specserve.cli.main import exit_code_of as cli
from specserve.drafters.task_history import TaskHistory
from specserve.errors import UserError
from specserve.training.data.rows import read_rows
from specserve.training.evaluation.answers import answer
from specserve.training.evaluation.answers import make_engine as make_answering_engine
from specserve.training.evaluation.evaluate import evaluate_directory
from specserve.training.preflight import prepare
from specserve.training.run_directory import held_directory
from specserve.training.run_file import load_run
from specserve.training.trainer import Trainer

# The command, which must leave no thread of its group: one that lives on can abort the process at its end.
WORKER = """
import sys
from pathlib import Path
from specserve.cli.main import exit_code_of
from specserve.training.processes import Processes

def num_threads_of_gloo():
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))

def share_weights(*args, share=Processes.share_weights):
    share(*args)
    during.append(num_threads_of_gloo())

during, Processes.share_weights = [], share_weights
code = exit_code_of(["train", *sys.argv[1:]])
assert during[0] and not num_threads_of_gloo()
sys.exit(code)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    model_dir = make_tiny_model(root / "model")
    train = write_rows(root / "train.jsonl", 40)
    with open(train, "a") as file:  # alone in its batch: one of two processes has no row of it
        file.write(json.dumps({"prompt": "fox " * 220, "completion": "fox"}) + "\n")
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
        "report.html",
        "examples.json",
        "routing.json",
        "README.md",
        "plots",
    }
    assert "checkpoint.pt" not in names
    assert len({path.stat().st_mode for path in (root / "out/task").iterdir() if path.is_file()}) == 1
    assert {path.name for path in (root / "out/task/plots").iterdir()} == {
        "loss.png",
        "speed.png",
        "accepted_length.png",
        "reached_by_position.png",
    }
    config = json.loads((root / "out/task/lookahead_config.json").read_text())
    assert config["draft_len"] == 5 and config["acceptance"]["head"]


@pytest.mark.long
def test_two_processes_finish_one_directory_and_have_the_losses_of_one(trained, tmp_path):
    root, model_dir = trained
    (tmp_path / "run.yaml").write_text(SETTINGS.format(model=model_dir))
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    out = torchrun(2, str(script), str(tmp_path / "run.yaml"), "--set", "optimizer.warmup=0.1")
    assert out.count("is written") == 1 and "task, on 6 held-out rows" in out and "nothing was measured" not in out
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
    steps = len((trained[0] / "out/task/metrics.jsonl").read_text().splitlines())
    assert report["steps"] == steps < 24 and f"only {steps} optimizer steps" in report["warnings"][0]
    assert report["answers_equal_with_and_without_drafts"] >= 0.5
    assert report["lookahead"] == {
        "draft_len": 5,
        "history_tokens": report["lookahead"]["history_tokens"],
        "error": None,
    }
    assert report["speed"]["batch 8"]["tokens_per_s"] > 0
    page = (trained[0] / "out/task/report.html").read_text()
    assert page.count('<div class="answer">') == 4 and page.count("<span") > 4 * 5


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


def test_eval_names_a_prompt_beyond_the_models_positions(trained, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a " * 400, "completion": "x"}))
    assert cli(["eval", str(trained[0] / "out/task"), "--data", str(tmp_path / "long.jsonl")]) == 2
    assert "long.jsonl line 1: the prompt has " in (err := capsys.readouterr().err) and "512 positions" in err


def files_of(directory):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_touched(trained, capsys):
    root, _ = trained
    before = files_of(root / "out" / "task")
    arguments = ["train", str(root / "run.yaml"), "--set", "optimizer.warmup=0.1"]
    assert cli(arguments) == 2
    assert "is not empty: it holds a run (finished)" in capsys.readouterr().err
    assert cli([*arguments, "--resume"]) == 0
    assert "is finished already; there is nothing to resume" in capsys.readouterr().out
    assert cli([*arguments, "--resume", "--set", "lora.r=16"]) == 2
    assert "finished run in" in (err := capsys.readouterr().err) and "lora.r was 4 and is 16" in err
    assert files_of(root / "out" / "task") == before


def test_a_run_that_was_stopped_goes_on_only_as_itself(trained, tmp_path, capsys, monkeypatch):
    root, _ = trained
    output = tmp_path / "out"
    arguments = ["train", str(root / "run.yaml"), "--output", str(output), "--set", "head.enabled=false"]
    arguments += ["--set", "eval.rows=0", "--set", "checkpoint.every_steps=1", "--set", "optimizer.min_steps=4"]
    with monkeypatch.context() as patch:
        save = Trainer.save_checkpoint

        def stopped_after(trainer):
            save(trainer)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Trainer, "save_checkpoint", stopped_after)
        assert cli(arguments) == 2
    assert "with --resume" in capsys.readouterr().err
    before = files_of(output)
    rows = write_rows(tmp_path / "other.jsonl", 40, seed=7)
    for key, value, named in (
        ("optimizer.lr", "2e-3", "optimizer.lr was 0.005 and is 0.002"),
        ("lora.r", "8", "lora.r was 4 and is 8"),
        ("seed", "3", "seed was 0 and is 3"),
        ("data.train", str(rows), "the training rows as tokens was"),
        ("data.max_len", "10000", "data.max_len is 10000 tokens, but the base model has 512 positions"),
    ):
        assert cli([*arguments, "--resume", "--set", f"{key}={value}"]) == 2
        assert named in capsys.readouterr().err
        assert files_of(output).keys() == before.keys()
        assert {path: data for path, (data, _) in files_of(output).items()} == {
            p: data for p, (data, _) in before.items()
        }
    with held_directory(output, resume=True):
        assert cli([*arguments, "--resume"]) == 2
        assert f"process {os.getpid()}" in capsys.readouterr().err
    assert not (output / "adapter_model.safetensors").exists()
    later = SimpleNamespace(date=SimpleNamespace(today=lambda: datetime.date(2031, 1, 1)))  # templates may write it
    monkeypatch.setattr("specserve.training.run.datetime", later)
    before[output / "run.lock"] = (b"", 0)
    (output / "run.lock").touch()
    assert cli([*arguments, "--resume"]) == 0
    assert "is ready" in (out := capsys.readouterr().out) and "nothing was measured" in out
    assert not {"run.lock", "checkpoint.pt"} & {path.name for path in output.iterdir()}


def test_an_existing_lora_gets_a_head_and_stays_as_it_is(trained, tmp_path, capsys):
    root, model_dir = trained
    adapter = make_peft_adapter(model_dir, tmp_path / "old", r=4)  # in fp32, with a chat template of its own
    (adapter / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("<|im_start|>", "<|im_start|> "))
    arguments = ["--adapter", str(adapter), "--head-only", "--model", str(model_dir)]
    arguments += ["--data", str(root / "train.jsonl"), "--output", str(tmp_path / "new")]
    small = ["--set", "head.hidden_size=16", "--set", "head.copy_window=0", "--set", "distill.rows=8"]
    small += ["--set", "distill.epochs=1", "--set", "distill.max_tokens=16"]
    assert cli(["train", *arguments, *small]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"):
        assert (tmp_path / "new" / name).read_bytes() == (adapter / name).read_bytes()
    assert "  r: 4\n" in (tmp_path / "new" / "run.yaml").read_text()  # its own, and not a new LoRA's
    info = make_engine(model_dir).load_adapter("new", tmp_path / "new")
    assert info.lookahead is not None and info.lookahead.error is None
    assert cli(["train", *arguments, *small, "--resume"]) == 0  # it is finished
    arguments.remove("--head-only")
    assert cli(["train", *arguments, *small, "--resume"]) == 2
    assert "lora.frozen was True and is False" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"r": 8}, "has rank 4 but"),
    ],
)
def test_a_lora_that_cannot_be_continued_is_refused_before_anything(trained, tmp_path, capsys, changes, named):
    root, model_dir = trained
    adapter = make_peft_adapter(model_dir, tmp_path / "old", r=4)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    arguments = ["--adapter", str(adapter), "--model", str(model_dir), "--data", str(root / "train.jsonl")]
    assert cli(["train", *arguments, "--output", str(tmp_path / "new")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: lora.adapter: ") and named in err
    assert not (tmp_path / "new").exists()


def test_a_lora_of_another_size_and_a_layer_that_is_not_there_are_refused_by_name(trained, tmp_path, capsys):
    root, model_dir = trained
    common = ["--model", str(model_dir), "--data", str(root / "train.jsonl"), "--output", str(tmp_path / "new")]
    larger = make_tiny_model(tmp_path / "larger", hidden_size=128)
    adapter = make_peft_adapter(larger, tmp_path / "old", r=4)
    assert cli(["train", *common, "--adapter", str(adapter)]) == 2
    assert "was it trained for another base?" in capsys.readouterr().err
    assert cli(["train", *common, "--set", "head.tap_layer=99"]) == 2
    assert "head.tap_layer is 99, but the base model has 2 layers: give 0 to 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def edited_base(model_dir, path, tensors, **config):
    """A copy of a model with changed fields of its configuration, and weights as `tensors` makes them."""
    shutil.copytree(model_dir, path)
    file = path / "model.safetensors"
    save_file(tensors(load_file(file)), file, metadata={"format": "pt"})
    known = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**known, **config}))
    return path


def cut_to(size):
    return lambda found: {k: v[:size].clone() if len(v) == 320 else v for k, v in found.items()}


@pytest.mark.parametrize(
    ("tensors", "config", "named"),
    [
        (
            cut_to(319),
            {"vocab_size": 319},
            "line 1: messages[1]: its token '<|im_end|>' is number 319 of the tokenizer",
        ),
        (lambda found: {k: v for k, v in found.items() if "q_norm" not in k and "1.mlp.up" not in k}, {}, "is missing"),
        (
            dict,
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel is not supported; served are LlamaForCausalLM,",
        ),
    ],
)
def test_a_base_that_cannot_be_served_is_no_base_to_train_on(trained, tmp_path, capsys, tensors, config, named):
    root, model_dir = trained
    path = edited_base(model_dir, tmp_path / "base", tensors, **config)
    common = ["train", "--data", str(root / "train.jsonl"), "--output", str(tmp_path / "new")]
    assert cli([*common, "--model", str(path)]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    if "vocab_size" in config:
        assert cli([*common, "--model", str(path), "--check-data"]) == 1
        assert capsys.readouterr().out.count("bad row: ") == 41
        (tmp_path / "pairs.jsonl").write_text('{"query": "fox", "positive": "dog"}\n' * 2)
        embed = ["--task", "embed", "--set", "pooling.append_eos=true", "--data", str(tmp_path / "pairs.jsonl")]
        assert cli([*common, "--model", str(path), *embed]) == 2
        assert "pairs.jsonl line 1: its token '<|im_end|>' is number 319" in capsys.readouterr().err
    else:
        assert cli([*common, "--model", str(model_dir), "--set", "loss=kl", "--set", f"teacher={path}"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: teacher: {path}") and named in err


def test_bad_and_shared_held_out_rows_are_said_before_training(trained, tmp_path, capsys, monkeypatch):
    root, model_dir = trained
    rows = (root / "train.jsonl").read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text(rows[0] + "\n{\n")
    (tmp_path / "same.jsonl").write_text(rows[4] + "\n")
    common = ["--model", str(model_dir), "--data", str(root / "train.jsonl"), "--output", str(tmp_path / "new")]
    assert cli(["train", *common, "--eval-data", str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl line 2 is not JSON" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

    def not_reached(*args, **kwargs):
        raise UserError("training starts")

    monkeypatch.setattr("specserve.training.generation_run.LoraModel", not_reached)
    assert cli(["train", *common, "--eval-data", str(tmp_path / "same.jsonl")]) == 2
    out, err = capsys.readouterr()
    assert (
        "training starts" in err and "1 training prompts are in data.eval too (line 5 is held-out line 1)" in out + err
    )


def test_rows_too_long_are_left_out_whole_and_said_and_never_cut_to_nothing(trained, tmp_path, capsys, monkeypatch):
    root, model_dir = trained
    long = json.dumps({"prompt": "The quick brown fox " * 90, "completion": "x"}) + "\n"
    (tmp_path / "long.jsonl").write_text(long)
    (tmp_path / "some.jsonl").write_text((root / "train.jsonl").read_text() + long)

    def train(rows):
        common = ["--model", str(model_dir), "--data", str(tmp_path / rows), "--output", str(tmp_path / "new")]
        assert cli(["train", *common, "--set", "data.max_len=300"]) == 2
        return "".join(capsys.readouterr())

    def not_reached(*args, **kwargs):
        raise UserError("training starts")

    assert "every row is longer than data.max_len (300 tokens)" in train("long.jsonl")
    monkeypatch.setattr("specserve.training.generation_run.LoraModel", not_reached)
    said = train("some.jsonl")
    assert "1 of " in said and "longer than data.max_len and left out" in said and "training starts" in said


TEXT = "What is it that the quick brown fox does when it meets a lazy dog on a narrow road"


def test_checking_the_data_finds_what_is_wrong_with_it(trained, tmp_path, capsys):
    root, model_dir = trained
    rows = (root / "train.jsonl").read_text().splitlines()[:5]
    near = [json.dumps({"prompt": f"{TEXT}, {word}", "completion": "."}) for word in ("here", "there")]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, rows[0], *near]) + "\n")
    (tmp_path / "b.jsonl").write_text(rows[2] + "\n")
    common = ["--data", str(tmp_path / "a.jsonl"), "--eval-data", str(tmp_path / "b.jsonl"), "--model", str(model_dir)]
    assert cli(["train", *common, "--check-data"]) == 1
    out = capsys.readouterr().out
    assert "line 6 repeats 1" in out and "line 3 is held-out line 1" in out and "[[" in out and "bad rows: 0" in out
    assert "nearly an earlier one (similarity from 0.7 on): " in out and "line 8: " in out
    assert "nearly a held-out one (similarity from 0.7 on): 0" in out


def test_checking_the_data_shows_every_bad_row_of_both_files(trained, tmp_path, capsys):
    root, model_dir = trained
    rows = (root / "train.jsonl").read_text().splitlines()[:3]
    unread = json.dumps({**json.loads(rows[1]), "instruction": "p", "source": "web"})
    (tmp_path / "a.jsonl").write_text("\n".join([rows[0], "{", '{"prompt": "p"}', unread, '"text"']) + "\n")
    (tmp_path / "b.jsonl").write_text("[1]\n" + rows[2] + "\n")
    common = ["--data", str(tmp_path / "a.jsonl"), "--eval-data", str(tmp_path / "b.jsonl"), "--model", str(model_dir)]
    assert cli(["train", *common, "--output", str(tmp_path / "o"), "--check-data"]) == 1
    out = capsys.readouterr().out
    for where in ("a.jsonl line 2 is not JSON", "a.jsonl line 3", "a.jsonl line 5 is str", "b.jsonl line 1 is list"):
        assert where in out
    assert (
        "bad rows: 4" in out
        and "2 rows," in out
        and "fields that are not read: instruction (1 rows), source (1 rows)" in out
    )
    assert cli(["train", *common, "--output", str(tmp_path / "o")]) == 2  # a run stops at the first
    (tmp_path / "a.jsonl").write_text("{\n[\n")
    assert cli(["train", *common, "--output", str(tmp_path / "o"), "--check-data"]) == 1
    assert "bad rows: 3" in capsys.readouterr().out


def test_a_dry_run_names_the_time_of_each_phase_and_writes_nothing(trained, tmp_path, capsys):
    root, _ = trained
    arguments = ["train", str(root / "run.yaml"), "--output", str(tmp_path / "o"), "--dry-run"]
    assert cli(arguments) == 0
    out = capsys.readouterr().out
    steps = len((root / "out/task/metrics.jsonl").read_text().splitlines())
    assert "GiB" in out and "time: about" in out and f"for {steps} steps over 41 rows" in out
    for phase in ("training", "hidden states", "fit of the head", "28 answers to training", "24 answers to held-out"):
        assert f"  {phase}" in out
    assert not (tmp_path / "o").exists()


def test_the_longest_prompt_has_room_for_one_token(trained):
    engine = make_answering_engine(trained[1], batch=1, max_len=6)
    assert len(answer(engine, None, [[7, 8, 9, 10, 11]], 24).answers[0].tokens) == 1


def test_answers_at_a_temperature_differ_and_come_again(trained):
    engine = make_answering_engine(trained[1], batch=2, max_len=40)
    twice = [answer(engine, None, [[7, 8, 9, 10, 11]] * 2, 24, temperature=1.0) for _ in range(2)]
    (first, second), again = ([a.tokens for a in answers.answers] for answers in twice)
    assert again == [first, second] and first != second


def test_the_bare_base_gets_a_head_that_drafts_its_answers_and_changes_none(trained, tmp_path, capsys):
    root, model_dir = trained
    arguments = ["train", str(root / "run.yaml"), "--head-only", "--base", "--output", str(tmp_path / "base")]
    small = ["--set", "distill.rows=12", "--set", "distill.epochs=40"]
    for name in ("train", "dev"):  # prompts alone do
        asked = [json.dumps({"messages": row.messages[:-1]}) for row in read_rows(root / f"{name}.jsonl")]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(asked))
    held_out = tmp_path / "dev.jsonl"
    small += ["--data", str(tmp_path / "train.jsonl"), "--eval-data", str(held_out)]
    assert cli([*arguments, *small, "--set", "distill.rows=0"]) == 2
    assert "line 1: the last message is the user's; it must be the assistant's" in capsys.readouterr().err
    cli([*arguments, *small, "--check-data"])
    out = capsys.readouterr().out
    assert "bad rows: 0" in out and "line 3, which the base model will answer:\n<|im_start|>" in out and "[[" not in out
    assert cli([*arguments, *small, "--set", "distill.max_tokens=1", "--output", str(tmp_path / "mute")]) == 2
    assert "the base answered no training prompt with more than one token" in capsys.readouterr().err
    assert cli([*arguments, *small, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "if answers are as long as distill.max_tokens and drafts" in out and "steps over" not in out
    assert cli([*arguments, *small]) == 0
    assert f"specserve serve --base-head {tmp_path / 'base'}" in capsys.readouterr().out
    found = {path.name for path in (tmp_path / "base").iterdir()}
    assert {"lookahead_config.json", "lookahead.safetensors", "report.json", "README.md", "run.yaml"} <= found
    assert not {"adapter_config.json", "adapter_model.safetensors", "routing.json", "run.lock"} & found
    history_file = tmp_path / "base" / "lookahead_history.bin"
    assert len(TaskHistory.load(history_file, 320).completions()) <= 12  # nothing that stands for an answer is learned
    history_file.unlink()  # the head drafts, then
    report = json.loads((tmp_path / "base" / "report.json").read_text())
    assert report["is_base_head"] and report["lookahead"]["error"] is None
    assert report["task"] == {} and report["rows"] == 6 and report["answers_without_end"] > 0
    assert not any("task metric |" in (tmp_path / "base" / name).read_text() for name in ("README.md", "report.html"))
    assert cli(["eval", str(root / "out" / "task"), "--data", str(held_out)]) == 2  # an adapter is held against answers
    assert "dev.jsonl line 1: the last message is the user's" in capsys.readouterr().err
    answered = (root / "dev.jsonl").read_text().splitlines()
    held_out.write_text("\n".join([*held_out.read_text().splitlines()[:1], answered[1]]))
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ strftime_now('%F') }}" + CHAT_TEMPLATE)
    run_file = tmp_path / "base" / "run.yaml"
    run_file.write_text(re.sub(r"(?<= date: ).*", "2024-07-26", run_file.read_text()))
    report = evaluate_directory(tmp_path / "base", max_tokens=8)
    assert "<pre>2024-07-26" in (tmp_path / "base" / "report.html").read_text()  # the run's day, on any other
    assert report["rows"] == 2 and report["task"]["exact_match"] in (0, 1)  # of the row that has an answer
    assert report["answers_equal_with_and_without_drafts"] == 1.0
    assert "of the base model itself" in (tmp_path / "base" / "README.md").read_text()
    prepared = prepare(load_run(root / "run.yaml", [], {}))
    assert prepared.config.head.copy_jumps is not None  # the rows of a LoRA decide it
    prompts = [example.prompt for example in prepared.examples[:4]]
    engine, bare = make_engine(model_dir, base_head=str(tmp_path / "base")), make_engine(model_dir)
    asked = [request(i, prompt, mode="fixed", max_tokens=24) for i, prompt in enumerate(prompts)]
    assert tokens_of(run(engine, asked)) == tokens_of(run(bare, asked))
    stats = engine.stats()
    assert stats.accepted_by_source["head"] > 0
    assert cli([*arguments, *small, "--resume"]) == 0
    assert "is finished already" in capsys.readouterr().out


def test_head_only_needs_an_adapter_or_the_base(trained, tmp_path, capsys):
    root, model_dir = trained
    data = ["--data", str(root / "train.jsonl"), "--model", str(model_dir), "--output", str(tmp_path / "x")]

    def error(*arguments):
        assert cli(["train", *data, *arguments]) == 2
        return capsys.readouterr().err

    assert "needs --adapter DIR" in error("--head-only")
    assert "--base goes with --head-only" in error("--base")
    assert "leave --adapter out" in error("--head-only", "--base", "--adapter", str(root / "out" / "task"))
    assert "trains nothing" in error("--head-only", "--base", "--set", "head.enabled=false")
    assert "task is embed" in error("--head-only", "--base", "--task", "embed")
    assert "--head-only trains no LoRA" in error("--head-only", "--base", "--set", "loss=kl")
