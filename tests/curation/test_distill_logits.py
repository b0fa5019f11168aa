"""A teacher's probabilities beside the rows: read here, told by an endpoint, of several, and of another tokenizer."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from fake_teacher import MODEL, OPTIONS, FakeTeacher, completion
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from specserve.curation.distillation.distill import Distillation
from specserve.curation.distillation.likely_tokens import as_logits, mixed
from specserve.curation.distillation.plan import DistillPlan
from specserve.curation.distillation.top_logits import Student
from specserve.errors import UserError
from specserve.teachers import TeacherSpec, TopTokens
from specserve.training.data.teacher_logits import read_teacher_logits
from specserve.training.preflight import prepare
from specserve.training.run_config import DataConfig, RunConfig

PROMPTS = [{"prompt": "The quick brown fox"}, {"prompt": "Pack my box", "system": "Be brief."}, {"prompt": "A server"}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def student(model_dir):
    return Student(str(model_dir))


def plan_of(folder, specs, student, **changes):
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    fields = {"teachers": tuple(specs), "data": data, "out": folder / "rows.jsonl", "student": str(student.model_dir)}
    return DistillPlan(**{**fields, "max_tokens": 60, "top_logprobs": 3, **changes})


def logits_of(plan, student):
    return read_teacher_logits(plan.out, student.tokenizer_hash, student.tokenizer.vocab_size)


def rows_of(plan):
    return [json.loads(line) for line in plan.out.read_text().splitlines()]


def likely(model, tokens, num_tokens, num_top=20):
    """The probabilities [num_tokens, V] of the last tokens by transformers, of the `num_top` best alone."""
    with torch.no_grad():
        probs = model(torch.tensor([tokens])).logits[0].softmax(-1)[len(tokens) - num_tokens - 1 : -1]
    best = probs.topk(num_top)
    return torch.zeros_like(probs).scatter(-1, best.indices, best.values)


@pytest.mark.parametrize("num_teachers", [1, pytest.param(2, marks=pytest.mark.slow)])  # engines that take turns
async def test_teachers_here_read_their_answers(model_dir, student, tmp_path, num_teachers):
    """Against transformers and peft; behind the teachers' own system message. Each tells 20 tokens for a mean."""
    from peft import PeftModel

    adapter = make_peft_adapter(model_dir, tmp_path / "adapter", r=4, std=0.2)
    plain = TeacherSpec(model=str(model_dir), options=OPTIONS, cache_dir=tmp_path)
    schema = {"enum": ["the fox", "a box of jugs"]}  # answers of random weights would have no end
    specs = (dataclasses.replace(plain, adapter=adapter), plain)[:num_teachers]
    plan = plan_of(tmp_path, specs, student, schema=schema, system="Q.")
    summary = await Distillation(plan).run()
    assert summary.rows == 3 and summary.logits["rows"] == 3

    config = RunConfig(model=str(model_dir), output="out", loss="kl", data=DataConfig(train=str(plan.out), max_len=128))
    assert [len(example.teacher) for example in prepare(config).examples] == [
        len(top) for top in logits_of(plan, student)
    ]

    base, other = (AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) for _ in range(2))
    models = (PeftModel.from_pretrained(other, adapter), base)[:num_teachers]
    for row, prompt, top in zip(rows_of(plan), PROMPTS, logits_of(plan, student), strict=True):
        answer = student.example(row).completion
        with_system = {"messages": [{"role": "system", "content": prompt.get("system", "Q.")}, *row["messages"][-2:]]}
        tokens = student.example(with_system).tokens
        best = (sum(likely(model, tokens, len(answer)) for model in models) / num_teachers).topk(3)
        assert torch.equal(torch.tensor(top.ids), best.indices.int())
        torch.testing.assert_close(torch.tensor(top.logprobs).float(), best.values.log(), atol=0.01, rtol=0.01)


def told(student, row, *, num_top=2, end=False, change=None):
    """What an endpoint with the student's tokenizer tells of its answer: OpenAI's `logprobs`."""
    ids = student.example(row).completion
    tokens = [bytes(student.tokenizer.token_bytes(token)) for token in (ids if end else ids[:-1])]
    if change is not None:
        tokens = change(tokens)

    def one(token, logprob):
        return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

    others = [(b"<|im_end|>", -2.0), (b"no such token at all", -3.0)]
    return {
        "content": [
            {**one(token, -0.5), "top_logprobs": [one(token, -0.5), *(one(*other) for other in others)][:num_top]}
            for token in tokens
        ]
    }


@pytest.fixture
async def endpoint(tmp_path):
    async with FakeTeacher().serving() as fake:
        fake.spec = TeacherSpec(model=MODEL, url=fake.url, accept_terms=True, cache_dir=tmp_path)
        yield fake


def answering(student, **fields):
    """An endpoint that answers the same to all, and tells its tokens."""

    def respond(body, number):
        text = f"five dozen é {body['messages'][-1]['content'][:3]}"
        row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]}
        return completion(text, body, logprobs=told(student, row, **fields))

    return respond


@pytest.mark.parametrize("end", [False, True])
async def test_what_an_endpoint_tells_is_mapped_to_the_student_s_tokens(endpoint, student, tmp_path, end):
    endpoint.respond = answering(student, num_top=3, end=end)
    plan = plan_of(tmp_path, [endpoint.spec], student)
    summary = await Distillation(plan).run()
    assert endpoint.bodies[0]["top_logprobs"] == 3
    found, end_token = logits_of(plan, student), student.tokenizer.special_tokens["<|im_end|>"]
    num_tokens = 0
    for row, top in zip(rows_of(plan), found, strict=True):
        ids = student.example(row).completion
        assert top.ids[:, 0].tolist() == ids and top.ids[0, 1:].tolist() == [end_token, -1]
        assert top.logprobs[0].tolist() == [-0.5, -2.0, 0.0]
        assert top.ids[-1].tolist() == [ids[-1], -1, -1] and top.logprobs[-1, 0] == (-0.5 if end else 0.0)
        num_tokens += len(ids)
    assert summary.logits == {
        "rows": 3,
        "tokens": num_tokens,
        "rows_without": 0,
        "likely_tokens_unmapped": num_tokens if end else num_tokens - 3,
    }


async def test_answers_of_other_tokens_are_told_and_most_of_them_refused(endpoint, student, tmp_path):
    joined = answering(student, change=lambda tokens: [tokens[0] + tokens[1], *tokens[2:]])
    usual = answering(student)
    endpoint.respond = lambda body, number: (joined if "box" in body["messages"][-1]["content"] else usual)(
        body, number
    )
    plan = plan_of(tmp_path, [endpoint.spec], student)
    summary = await Distillation(plan).run()
    assert summary.logits["rows_without"] == 1 and [len(top) > 0 for top in logits_of(plan, student)] == [
        True,
        False,
        True,
    ]
    endpoint.respond = joined
    plan = plan_of(tmp_path, [endpoint.spec], student, out=tmp_path / "other.jsonl", seed=1)
    with pytest.raises(UserError, match="wise-1@http.* has another tokenizer than the student .*tiny .*3 of 3 answers"):
        await Distillation(plan).run()
    assert not plan.out.exists()
    plan = plan_of(tmp_path, [endpoint.spec], student, out=tmp_path / "other.jsonl", seed=2)
    endpoint.respond = lambda body, number: "text alone"
    with pytest.raises(UserError, match="the endpoint gives no logprobs"):
        await Distillation(plan).run()


async def test_a_teacher_of_another_tokenizer_is_asked_nothing(student, tmp_path):
    other = make_tiny_model(tmp_path / "other", vocab_size=310)
    spec = TeacherSpec(model=str(other), options=OPTIONS, cache_dir=tmp_path)
    run = Distillation(plan_of(tmp_path, [spec], student))
    with pytest.raises(UserError, match=r"the teacher .*/other has another tokenizer than the student .*/tiny \("):
        await run.run()
    assert run.usages[spec.name].requests == 0


def test_a_mixture_is_of_probabilities():
    half = math.log(0.5)
    tops = [TopTokens(((1, 2),), ((half, math.log(0.25)),)), TopTokens(((2, 3),), ((half, -1e9),))]
    both = mixed(tops)
    assert both.ids == ((2, 1, 3),)
    assert np.exp(both.logprobs[0]).tolist() == pytest.approx([0.375, 0.25, 0.0])
    logits = as_logits(both, 4)
    assert logits.ids.tolist() == [[2, 1, 3, -1]] and np.isfinite(logits.logprobs).all()
    assert as_logits(both, 2, vocab_size=2).ids.tolist() == [[1, -1]]  # the teacher's padding is no token
