"""KL to a teacher: its gradient is the definition's, it is zero where both agree, and runs with it resume as others."""

import dataclasses
import json

import msgspec
import numpy as np
import pytest
import torch
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file
from tiny_models import make_tiny_model
from training_fixture import run_config, write_rows

from specserve.errors import UserError
from specserve.model.fingerprint import tokenizer_fingerprint
from specserve.training import generation_run, preflight
from specserve.training.answer_loss import token_losses, top_kl, whole_kl
from specserve.training.data.teacher_logits import TopLogits, write_teacher_logits
from specserve.training.generation_run import GenerationRun
from specserve.training.head_module import common_prefix_len
from specserve.training.lora_model import LoraModel
from specserve.training.preflight import prepare
from specserve.training.run_config import KlConfig, LoraConfig
from specserve.training.run_file import check_ready
from specserve.training.run_identity import run_identity
from specserve.training.teacher_model import open_teacher
from specserve.training.trainer import Trainer

CPU = torch.device("cpu")
VOCAB = 12


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1, intermediate_size=64)


def test_rows_are_looked_through_once_for_what_all_prompts_begin_with(model_dir, tmp_path, monkeypatch):
    lengths = []
    for module in (preflight, generation_run):
        monkeypatch.setattr(
            module,
            "common_prefix_len",
            lambda rows: lengths.append(common_prefix_len(rows)) or lengths[-1],
            raising=False,
        )
    run = GenerationRun.of(config_of(model_dir, write_rows(tmp_path / "rows.jsonl", 4), tmp_path / "out"))
    assert lengths == [run.objective(torch.float32, CPU).copy_start] != [0]


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory):
    return make_peft_adapter(model_dir, tmp_path_factory.mktemp("adapter"), r=4, lora_alpha=8, seed=3, std=0.2)


def config_of(model_dir, rows, output, **changes):
    config = run_config(epochs=1)
    data = msgspec.structs.replace(config.data, train=str(rows), max_len=128)
    return msgspec.structs.replace(config, model=str(model_dir), data=data, output=str(output), **changes)


def rows_with_logits(folder, model_dir, teacher_dir, num_rows=24, num_top=5):
    """Rows of the tiny task and the logits of the model in `teacher_dir` for them."""
    rows = write_rows(folder / "rows.jsonl", num_rows)
    examples = prepare(config_of(model_dir, rows, folder / "out")).examples
    model = LoraModel(teacher_dir, LoraConfig(r=1), torch.float32, CPU, None)
    tops = []
    with torch.no_grad():
        for example in examples:
            top = torch.log_softmax(model.logits(model.hidden([example]).last), dim=-1).topk(num_top)
            tops.append(TopLogits(top.indices.int().numpy(), top.values.half().numpy()))
    write_teacher_logits(rows, tokenizer_fingerprint(model_dir), tops)
    return rows


def trainer_of(config, directory):
    run = GenerationRun.of(config)
    torch.manual_seed(0)
    objective = run.objective(torch.float32, CPU)
    directory.mkdir(exist_ok=True)
    identity = run_identity(run.config, run.model_dir, run.rows, run.plan)
    return Trainer(run.config, objective, run.plan, directory, identity)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
def test_kl_over_known_tokens_has_value_and_gradient_of_the_definition(temperature):
    torch.manual_seed(0)
    teacher = torch.log_softmax(2 * torch.randn(6, VOCAB, dtype=torch.float64), dim=-1)
    logprobs, ids = teacher.topk(4)
    logprobs, ids = logprobs.half(), ids.int()
    ids[1, 2:] = -1  # fewer are known
    logprobs[2, 3] = float("-inf")  # known to be impossible
    logprobs[3] = torch.tensor([0.25] * 4).log().half()  # nothing is left, up to rounding
    student = torch.randn(6, VOCAB, dtype=torch.float64, requires_grad=True)

    outcomes_p, outcomes_q = [], []
    for row in range(6):
        known = ids[row][ids[row] >= 0].long()
        p = logprobs[row][ids[row] >= 0].double().exp()
        q = student[row].softmax(-1)[known]
        p, q = (torch.cat([x, (1 - x.sum()).clamp(min=0)[None]]) for x in (p, q))
        p = p / p.sum()
        outcomes_p.append(p ** (1 / temperature) / (p ** (1 / temperature)).sum())
        outcomes_q.append(q ** (1 / temperature) / (q ** (1 / temperature)).sum())
    wanted = (
        torch.stack(
            [torch.special.xlogy(p, p).sum() - (p * q.log()).sum() for p, q in zip(outcomes_p, outcomes_q, strict=True)]
        )
        * temperature**2
    )
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), student)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found = top_kl(student.to(dtype), ids, logprobs, temperature)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_over_the_whole_vocabulary_is_that_of_the_definition_also_beside_padding(temperature):
    torch.manual_seed(0)
    teacher = torch.randn(5, VOCAB + 3, dtype=torch.float64)
    student = torch.randn(5, VOCAB, dtype=torch.float64, requires_grad=True)
    p, q = (x[:, :VOCAB].div(temperature).softmax(-1) for x in (teacher, student))
    wanted = (p * (p.log() - q.log())).sum(-1) * temperature**2
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), student)
    found = whole_kl(student.float(), teacher.float(), temperature)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-5)


def test_mixed_is_the_weighted_mean_and_cross_entropy_where_nothing_is_known():
    torch.manual_seed(0)
    student = torch.randn(2, VOCAB, requires_grad=True)
    ids = torch.tensor([[3, 4], [-1, -1]], dtype=torch.int32)
    kl = top_kl(student, ids, torch.tensor([[-0.7, -1.0], [0.0, 0.0]]), 1.0)
    losses = token_losses("mixed", student, torch.tensor([3, 5]), kl, 0.25)
    entropy = -student.log_softmax(-1)[[0, 1], [3, 5]]
    torch.testing.assert_close(losses, torch.stack([0.75 * entropy[0] + 0.25 * kl[0], entropy[1]]))
    losses.sum().backward()
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("kind", ["base", "adapter", "model"])
def test_a_teacher_that_is_the_student_leaves_no_gradient(model_dir, adapter_dir, other_dir, tmp_path, kind):
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    teacher = {"base": model_dir, "adapter": adapter_dir, "model": other_dir}[kind]
    lora = LoraConfig(r=4, alpha=8, adapter=str(adapter_dir) if kind == "adapter" else None)
    base = other_dir if kind == "model" else model_dir
    config = config_of(base, rows, tmp_path / "out", lora=lora, loss="kl", teacher=str(teacher))
    trainer = trainer_of(config, tmp_path / "run")
    loss = trainer.objective.step_loss([0, 1, 2], 0, 1.0, 1, None).total
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-4)
    parameters = trainer.objective.model.parameters
    assert parameters
    assert max(float(parameter.grad.abs().max()) for parameter in parameters) < 1e-4


def test_a_teacher_on_the_same_base_answers_as_alone_and_leaves_the_student_as_it_was(model_dir, adapter_dir, tmp_path):
    examples = prepare(config_of(model_dir, write_rows(tmp_path / "rows.jsonl", 4), tmp_path / "out")).examples
    student = LoraModel(model_dir, LoraConfig(r=2, dropout=0.5), torch.float32, CPU, None)
    alone = LoraModel(model_dir, LoraConfig(adapter=str(adapter_dir)), torch.float32, CPU, None)
    alone.train(False)
    teacher = open_teacher(adapter_dir, student, model_dir)
    before = [id(parameter) for parameter in student.parameters]
    with torch.no_grad():
        wanted = alone.logits(alone.hidden(examples).last)
        bare = student.logits(student.hidden(examples).last)  # a new LoRA's B is zero
    torch.testing.assert_close(teacher.logits(examples), wanted, rtol=1e-5, atol=1e-4)
    assert [id(parameter) for parameter in student.parameters] == before
    assert any(module.training for module in student.peft.modules() if isinstance(module, torch.nn.Dropout))
    with torch.no_grad():
        torch.testing.assert_close(student.logits(student.hidden(examples).last), bare)
    student.save(tmp_path / "saved", "base")
    assert len(list((tmp_path / "saved").iterdir())) == 2
    assert not any("teacher" in name for name in load_file(tmp_path / "saved/adapter_model.safetensors"))


@pytest.mark.parametrize("source", ["file", "model", "adapter"])
def test_a_run_with_a_teacher_learns_and_resumes_as_if_it_had_never_stopped(
    model_dir, other_dir, adapter_dir, tmp_path, source
):
    rows = rows_with_logits(tmp_path, model_dir, other_dir)
    teacher = {"file": None, "model": str(other_dir), "adapter": str(adapter_dir)}[source]
    loss = "kl" if source == "file" else "mixed"
    config = config_of(model_dir, rows, tmp_path / "out", loss=loss, teacher=teacher, kl=KlConfig(temperature=1.5))
    config = msgspec.structs.replace(config, optimizer=msgspec.structs.replace(config.optimizer, epochs=2))
    whole = trainer_of(config, tmp_path / "whole")
    whole.train()
    first = trainer_of(config, tmp_path / "parts")
    stop = len(first.plan) // 2
    first.train(until=stop)
    second = trainer_of(config, tmp_path / "parts")
    second.resume()
    assert second.step == stop
    second.train()
    a, b = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert a == b
    assert a[-1] < 0.9 * a[0]
    for x, y in zip(whole.objective.model.parameters, second.objective.model.parameters, strict=True):
        assert torch.equal(x, y)


def test_logits_are_part_of_what_a_run_is(model_dir, other_dir, adapter_dir, tmp_path):
    identities = []
    for teacher in (other_dir, model_dir):
        rows = rows_with_logits(tmp_path, model_dir, teacher)
        run = GenerationRun.of(config_of(model_dir, rows, tmp_path / "out", loss="kl"))
        identities.append(run_identity(run.config, run.model_dir, run.rows, run.plan))
    differing = {key for key in identities[0] if identities[0][key] != identities[1][key]}
    assert differing == {"the training rows as tokens"}
    ways = [config_of(model_dir, rows, tmp_path / "out", loss="kl", teacher=str(d)) for d in (other_dir, adapter_dir)]
    found = [run_identity(way, model_dir, [], [])["the teacher"] for way in ways]
    assert None not in found and found[0] != found[1]


def test_rows_left_out_for_their_length_take_their_logits_along(model_dir, other_dir, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 5)
    lines = rows.read_text().splitlines()
    long = json.loads(lines[1])
    long["prompt"] *= 20
    lines[1] = json.dumps(long)
    rows.write_text("\n\n".join(lines) + "\n")  # blank lines are no rows
    config = config_of(model_dir, rows, tmp_path / "out")
    wide = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, max_len=512))
    lengths = [sum(e.loss_mask[1:]) for e in prepare(wide).examples]
    tops = [TopLogits(np.full((n, 1), idx, np.int32), np.zeros((n, 1), np.float16)) for idx, n in enumerate(lengths)]
    write_teacher_logits(rows, tokenizer_fingerprint(model_dir), tops)
    kept = prepare(msgspec.structs.replace(config, loss="kl")).examples
    assert [int(example.teacher.ids[0, 0]) for example in kept] == [0, 2, 3, 4]
    assert all(len(example.teacher) == sum(example.loss_mask[1:]) for example in kept)


def test_what_cannot_be_learned_from_is_refused_by_name(model_dir, other_dir, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    config = config_of(model_dir, rows, tmp_path / "out", loss="kl")

    def problem(config):
        with pytest.raises(UserError) as caught:
            check_ready(config)
            prepare(config)
        return str(caught.value)

    replace = msgspec.structs.replace
    assert "rows.logits.safetensors is missing" in problem(config)
    assert "loss is kl" in problem(replace(config, task="embed"))
    assert "--head-only trains no LoRA" in problem(replace(config, lora=LoraConfig(frozen=True, adapter="a")))
    assert "loss ce reads no teacher" in problem(replace(config, loss="ce", teacher=str(other_dir)))
    assert "holds neither a model" in problem(replace(config, teacher=str(tmp_path)))
    stranger = make_tiny_model(tmp_path / "stranger", vocab_size=330)
    assert "another tokenizer" in problem(replace(config, teacher=str(stranger)))
    short = make_tiny_model(tmp_path / "short", max_position_embeddings=64)
    assert "has 64 positions" in problem(replace(config, teacher=str(short)))
    wide = make_tiny_model(tmp_path / "wide", hidden_size=32)
    foreign = make_peft_adapter(wide, tmp_path / "foreign", r=2)
    assert problem(replace(config, teacher=str(foreign))).startswith("teacher: ")

    lengths = [sum(e.loss_mask[1:]) for e in prepare(replace(config, loss="ce")).examples]
    tops = [TopLogits(np.zeros((n, 1), np.int32), np.zeros((n, 1), np.float16)) for n in lengths]
    fingerprint = tokenizer_fingerprint(model_dir)
    write_teacher_logits(rows, fingerprint, tops[:2])
    assert "is of 2 rows" in problem(config)
    write_teacher_logits(rows, fingerprint, [tops[0], TopLogits(tops[1].ids[1:], tops[1].logprobs[1:]), tops[2]])
    assert "line 2: its answers have" in problem(config)
    write_teacher_logits(rows, fingerprint, [tops[0], TopLogits(tops[1].ids[:0], tops[1].logprobs[:0]), tops[2]])
    assert "1 of 3 answers have no teacher's logits" in problem(config)
    assert sum(e.teacher is None for e in prepare(replace(config, loss="mixed")).examples) == 1


def test_weights_of_rows_scale_their_loss_and_two_weighted_answers_are_a_distribution(model_dir, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 1)
    several = [{"completion": "yes", "weight": 0.75}, {"completion": "no", "weight": 0.25}]
    rows.write_text(json.dumps({"prompt": "a or b", "completions": several}) + "\n" + rows.read_text())
    trainer = trainer_of(config_of(model_dir, rows, tmp_path / "out"), tmp_path / "run")
    objective = trainer.objective

    def losses():
        return [objective.loss_sum([idx]).item() for idx in range(3)]

    weighted = losses()
    plain = objective.examples
    objective.examples = [dataclasses.replace(example, weight=1.0) for example in plain]
    assert weighted == pytest.approx([0.75 * losses()[0], 0.25 * losses()[1], losses()[2]], rel=1e-6)
    objective.examples = plain
    assert objective.loss_sum([0, 1, 2]).item() == pytest.approx(sum(weighted), rel=1e-5)
