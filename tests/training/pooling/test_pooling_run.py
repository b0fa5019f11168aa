"""`specserve train` with task embed, rerank and classify: to directories that peft and the engine load as the same."""

import json
import os
import shutil
import signal

import msgspec
import peft
import pytest
import torch
from engine_fixture import make_engine
from pooling_rows import write_pooling_rows
from safetensors import safe_open
from tiny_models import make_tiny_model
from transformers import AutoModel, AutoModelForSequenceClassification

from specserve.adapters.pooling_config import parse_pooling_config
from specserve.cli.main import exit_code_of as cli
from specserve.pooling_messages import PoolingParams
from specserve.text.pooled_text import classified_ids, embedded_ids, pair_ids
from specserve.text.tokenizer import TextTokenizer
from specserve.training.pooling.model import PoolingModel
from specserve.training.pooling.served import pooled_values
from specserve.training.run_config import LoraConfig
from specserve.training.trainer import Trainer

SETTINGS = """
task: {task}
model: {model}
output: out/{task}
data: {{train: {task}.train.jsonl, eval: {task}.dev.jsonl, max_len: 64}}
lora: {{r: 4, alpha: 8, target_modules: [q_proj, v_proj]}}
optimizer: {{lr: 0.01, batch_tokens: 600, epochs: 3}}
"""
MORE = {
    "embed": [
        "embed.dimensions=[16, 32]",
        "embed.mined_negatives=2",
        "embed.symmetric=true",
        "pooling.append_eos=true",
    ],
    "rerank": ["rerank.loss=pairwise"],
    "classify": ["classify.class_weights=balanced", "classify.calibration_share=0.3", "optimizer.epochs=4"],
}
TASKS = tuple(MORE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("pooling")
    model_dir = make_tiny_model(root / "model")
    for task in TASKS:
        write_pooling_rows(root / f"{task}.train.jsonl", task, 70 if task == "classify" else 48)
        write_pooling_rows(root / f"{task}.dev.jsonl", task, 16, seed=1)
        (root / f"{task}.yaml").write_text(SETTINGS.format(task=task, model=model_dir))
        assert cli(arguments(root, task)) == 0
    return root, model_dir


def arguments(root, task):
    sets = [part for setting in MORE[task] for part in ("--set", setting)]
    return ["train", str(root / f"{task}.yaml"), *sets]


def shape_of(directory):
    return parse_pooling_config("test", (directory / "pooling_config.json").read_bytes())


@pytest.mark.parametrize("task", TASKS)
def test_the_directory_is_complete_and_the_engine_takes_it_for_what_it_is(trained, task):
    root, model_dir = trained
    directory = root / "out" / task
    names = {path.name for path in directory.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "pooling_config.json", "metrics.jsonl"}
    assert names >= {"run.yaml", "report.json", "report.html", "README.md", "plots"}
    assert not names & {"checkpoint.pt", "run.lock", "lookahead_config.json"}
    assert len({path.stat().st_mode for path in directory.iterdir() if path.is_file()}) == 1
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["task_type"] == ("FEATURE_EXTRACTION" if task == "embed" else "SEQ_CLS")
    assert ("score" in (config["modules_to_save"] or [])) == (task != "embed")
    info = make_engine(model_dir).load_adapter(task, directory)
    assert info.adapter_type == task and info.pooling is not None
    assert info.pooling.num_outputs == {"embed": 64, "rerank": 1, "classify": 14}[task]


@pytest.mark.parametrize("task", TASKS)
def test_the_report_says_what_was_measured(trained, task):
    directory = trained[0] / "out" / task
    report = json.loads((directory / "report.json").read_text())
    losses = [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0] and report["steps"] == len(losses) and report["rows"] == 16
    page, card = (directory / "report.html").read_text(), (directory / "README.md").read_text()
    name = {"embed": "recall@10", "rerank": "mrr", "classify": "calibration_error"}[task]
    assert 0 <= report["task"][name] <= 1 and name in page and name in card and "<script" not in page
    assert (directory / "plots" / "metrics.png").is_file()
    if task == "embed":
        assert set(report["by_dimensions"]) == {"16", "32"} and report["searched_documents"] == 16 * 2 + 48
        is_better = report["task"]["main"] > report["base"]["main"]
        assert is_better != any("no better than the base model without it" in text for text in report["warnings"])
    if task == "classify":
        assert set(report["questions"]) == {"what", "is_animal", "has"} and "uncalibrated" in report


def test_peft_and_transformers_have_the_same_vectors(trained):
    root, model_dir = trained
    directory = root / "out" / "embed"
    shape, tokenizer = shape_of(directory), TextTokenizer(model_dir)
    ids = embedded_ids(tokenizer, shape, "quick fox brown 7", is_query=True)
    assert ids[-1] == tokenizer.eos_token_id and shape.dimensions == (16, 32) and shape.pooling == "mean"
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(model_dir), directory)
    want = theirs(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    ours = PoolingModel(model_dir, LoraConfig(adapter=str(directory)), "mean", None)
    assert torch.allclose(ours.for_all([ids, ids[:3]], 100, scored=False)[0], want, atol=1e-5)


def test_in_bf16_the_lora_multiplies_in_bf16_and_is_held_in_fp32(trained):
    root, model_dir = trained
    lora = LoraConfig(adapter=str(root / "out" / "embed"))
    model = PoolingModel(model_dir, lora, "mean", None, torch.bfloat16)
    seen = set()
    for name, module in model.peft.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    vectors = model.pooled([[5, 6, 7, 8], [9, 10]])
    vectors.square().sum().backward()
    assert seen == {torch.bfloat16} and vectors.dtype == torch.float32
    assert {(p.dtype, p.grad.dtype) for p in model.parameters if p.grad is not None} == {(torch.float32,) * 2}
    exact = PoolingModel(model_dir, lora, "mean", None).pooled([[5, 6, 7, 8], [9, 10]])
    assert torch.nn.functional.cosine_similarity(vectors, exact).min() > 0.999


@pytest.mark.parametrize("task", ["rerank", "classify"])
def test_peft_and_transformers_have_the_same_logits(trained, task):
    root, model_dir = trained
    directory = root / "out" / task
    shape, tokenizer = shape_of(directory), TextTokenizer(model_dir)
    ids = (
        pair_ids(tokenizer, shape, "a fox", "quick fox")
        if task == "rerank"
        else classified_ids(tokenizer, shape, "quick fox brown 7")
    )
    num = 1 if task == "rerank" else 14
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=num)
    want = peft.PeftModel.from_pretrained(base, directory)(input_ids=torch.tensor([ids])).logits[0]
    ours = PoolingModel(model_dir, LoraConfig(adapter=str(directory)), "last", num)
    assert torch.allclose(ours.for_all([ids, ids[:3]], 100, scored=True)[0], want, atol=1e-5)
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        assert [key for key in file.keys() if "score" in key] == ["base_model.model.score.weight"]


@pytest.mark.parametrize("task", TASKS)
def test_what_is_served_is_what_was_trained(trained, task):
    """In fp32; of texts of all lengths at once, the longest one cut."""
    root, model_dir = trained
    directory, tokenizer = root / "out" / task, TextTokenizer(model_dir)
    shape, num = shape_of(directory), {"embed": None, "rerank": 1, "classify": 14}[task]
    texts = [classified_ids(tokenizer, shape, text) for text in ("a", "quick fox brown 7", "lazy dogs " * 80)]
    model = PoolingModel(model_dir, LoraConfig(adapter=str(directory)), shape.pooling, num)
    engine = make_engine(model_dir)
    content_hash = engine.load_adapter(task, directory).content_hash
    params = PoolingParams("embed", normalize=False) if task == "embed" else PoolingParams("score")
    got = torch.tensor(pooled_values(engine, [(content_hash, ids) for ids in texts], params))
    want = model.for_all(texts, 100, scored=task != "embed")
    assert len(texts[-1]) == 64 and torch.allclose(got, want, atol=1e-5 * want.abs().max().item())


def test_rows_without_a_label_that_is_learned_are_left_out_and_said(trained, tmp_path, capsys):
    root, _ = trained
    rows = (root / "classify.train.jsonl").read_text() + json.dumps({"text": "x", "answers": {"what": "rare"}}) + "\n"
    (tmp_path / "rows.jsonl").write_text(rows)
    options = ["--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), "--max-steps", "1"]
    assert cli(["train", str(root / "classify.yaml"), *options, "--set", "eval.rows=0"]) == 0
    said = "".join(capsys.readouterr())
    assert "1 training rows answer no question" in said and "question 'what': 1 labels of fewer than 5 rows" in said


def test_a_classifier_says_its_questions_in_order_with_calibration(trained):
    shape = shape_of(trained[0] / "out" / "classify")
    assert [(q.name, q.kind, q.first_output) for q in shape.questions] == [
        ("has", "multi_label", 0),
        ("is_animal", "multi_class", 4),
        ("what", "multi_class", 6),
    ]
    assert shape.questions[1].labels == ("no", "yes")
    assert any(q.temperature != 1.0 for q in shape.questions) and len(shape.questions[0].thresholds) == 4


@pytest.mark.parametrize("task", TASKS)
def test_eval_repeats_the_report(trained, task, tmp_path, capsys):
    directory = shutil.copytree(trained[0] / "out" / task, tmp_path / task)
    before = json.loads((directory / "report.json").read_text())
    assert cli(["eval", str(directory)]) == 0
    after = json.loads((directory / "report.json").read_text())
    assert after["task"] == pytest.approx(before["task"], abs=0.07) and after["rows"] == before["rows"]
    assert "report.json; 16 rows" in capsys.readouterr().out


def test_a_stopped_run_goes_on_with_the_negatives_that_it_had_mined(trained, tmp_path, capsys, monkeypatch):
    """Stopped in the middle of an epoch, whose negatives are of the weights at its beginning."""
    root, _ = trained
    steps = (root / "out/embed/metrics.jsonl").read_text().splitlines()
    stop_at = len(steps) // 2 + 1
    options = [*arguments(root, "embed"), "--output", str(tmp_path / "out"), "--set", "eval.rows=0"]
    step = Trainer.train_step

    def stopped(trainer):
        if trainer.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        assert cli(options) == 2
    assert "with --resume" in capsys.readouterr().err
    assert cli([*options, "--resume", "--set", "embed.temperature=0.1"]) == 2
    assert "embed.temperature was 0.05 and is 0.1" in capsys.readouterr().err
    assert cli([*options, "--resume"]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    keep = ("step", "loss", "loss_with_mined", "grad_norm")
    whole, parts = (
        [{k: v for k, v in json.loads(line).items() if k in keep} for line in lines]
        for lines in (steps, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    )
    assert "loss_with_mined" in whole[-1] and "loss_with_mined" not in whole[0]
    assert whole == parts


def test_an_adapter_is_trained_on_only_as_its_own_kind(trained, tmp_path, capsys):
    root, _ = trained
    options = [*arguments(root, "classify"), "--output", str(tmp_path / "out"), "--set", "optimizer.max_steps=2"]
    options += ["--set", "eval.rows=0"]
    assert cli([*options, "--adapter", str(root / "out/embed")]) == 2
    assert "task_type 'FEATURE_EXTRACTION', and task 'classify' goes on from 'SEQ_CLS'" in capsys.readouterr().err
    assert cli([*options, "--adapter", str(root / "out/rerank")]) == 2
    assert "has 1 outputs, and the rows need 14" in capsys.readouterr().err
    assert cli([*options, "--adapter", str(root / "out/classify")]) == 0
    again, first = (
        json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for directory in (tmp_path / "out", root / "out/classify")
    )
    assert again < first


@pytest.mark.parametrize(
    ("task", "setting", "named"),
    [
        ("embed", "head.lr=0.1", "head.lr is 0.1, which says nothing of task 'embed'"),
        ("embed", "rerank.loss=pairwise", "rerank.loss is 'pairwise', which says nothing"),
        ("embed", "embed.dimensions=[100]", "embed.dimensions is [100]; the base model's vectors have 64"),
        ("embed", "data.max_len=1000", "but the base model has 512 positions"),
        ("rerank", "lora.target_modules=[lm_head]", "lm_head"),
        ("rerank", "data.system=x", "data.system"),
        ("classify", "pooling.query_prefix=x", "pooling.query_prefix"),
        ("classify", "classify.min_label_rows=60", "classify.min_label_rows"),
        ("classify", f"pooling.suffix={'x' * 20_001}", "what would be served cannot be: adapter 'of this run'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(trained, tmp_path, capsys, task, setting, named):
    output = ["--output", str(tmp_path / "out"), "--set", setting]
    assert cli(["train", str(trained[0] / f"{task}.yaml"), *output]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_which_transformers_has_none_with_a_score_head_is_refused(trained, tmp_path, capsys):
    model_dir = make_tiny_model(tmp_path / "model", "granite")
    output = ["--output", str(tmp_path / "out"), "--set", f"model={model_dir}"]
    assert cli(["train", str(trained[0] / "rerank.yaml"), *output]) == 2
    assert "has none of for GraniteForCausalLM; task 'embed' can be trained" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_checking_the_data_shows_every_bad_row_and_what_is_in_the_others(trained, tmp_path, capsys, task):
    root, _ = trained
    rows = (root / f"{task}.train.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:40], rows[3], "{", '{"query": "a"}', '{"text": ""}']) + "\n")
    (tmp_path / "b.jsonl").write_text(rows[5] + "\n")
    options = ["--data", str(tmp_path / "a.jsonl"), "--eval-data", str(tmp_path / "b.jsonl"), "--check-data"]
    assert cli(["train", str(root / f"{task}.yaml"), *options]) == 1
    out = capsys.readouterr().out
    assert "bad rows: 3" in out and "line 41 repeats 4" in out and "line 6 is held-out line 1" in out
    assert "nearly an earlier one (similarity from 0.7 on): " in out and "nearly a held-out one" in out
    assert "tokens of a text: mean" in out and ("question 'what'" in out) == (task == "classify")


def test_a_dry_run_says_how_long_it_will_take(trained, capsys):
    assert cli([*arguments(trained[0], "embed"), "--dry-run"]) == 0
    assert "time: about " in capsys.readouterr().out


def test_pooling_config_is_written_as_the_format_says(trained):
    for task in TASKS:
        shape = shape_of(trained[0] / "out" / task)
        assert shape.adapter_type == task and shape.max_tokens == 64 and msgspec.json.encode(shape)
