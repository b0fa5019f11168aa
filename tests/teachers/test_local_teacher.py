"""A teacher that runs here: its answers, its probabilities of texts, and what tells one from another."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil

import msgspec
import pytest
import torch
from fake_teacher import OPTIONS
from safetensors.torch import load_file, save_file
from tiny_models import CHAT_TEMPLATE
from transformers import AutoModelForCausalLM

from specserve.adapter_files import CONFIG_FILE, POOLING_FILE, WEIGHTS_FILE
from specserve.adapters.pooling_config import SCORE, PoolingConfig
from specserve.errors import UserError
from specserve.teachers import Ask, Reading, TeacherError, TeacherSpec, open_teacher, parse_spec
from specserve.teachers.local import LocalBackend
from specserve.text.tokenizer import TextTokenizer

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


def ask(text, **fields):
    return Ask(({"role": "user", "content": text},), **{"max_tokens": 12, **fields})


async def in_order(results):
    async with contextlib.aclosing(results):
        found = {index: result async for index, result in results}
    return [found[index] for index in sorted(found)]


async def test_one_engine_answers_reads_and_is_not_asked_twice(model_dir, adapter_dir, tmp_path):
    spec = TeacherSpec(model=str(model_dir), adapter=adapter_dir, options=OPTIONS, cache_dir=tmp_path)
    asks = [
        *(ask(f"The quick brown fox {idx}") for idx in range(6)),
        ask("Pack my box", n=3, temperature=1.0, seed=4),
        ask("Pack my box", schema=SCHEMA, max_tokens=40),
        ask("A server", top_logprobs=2),
        ask("much too long " * 400),
    ]
    text = tuple(range(40, 60))
    async with open_teacher(spec) as teacher:
        results = await in_order(teacher.answers(asks))
        (top,) = await in_order(teacher.readings([Reading(text, 5, 3)]))
        usage = teacher.usage
    assert usage.requests == 9 and usage.failed == 1 and usage.completion_tokens >= 12
    assert isinstance(results[9], TeacherError) and "tokens" in str(results[9]) and not results[9].ends_run
    assert all(len(result) == 1 and result[0].finish_reason in ("stop", "length") for result in results[:6])
    assert len(results[6]) == 3 and len({answer.text for answer in results[6]}) > 1
    assert set(json.loads(results[7][0].text)) == {"a"}
    (scored,) = results[8]
    assert len(scored.logprobs) == scored.completion_tokens and len(scored.logprobs[0].top) == 2
    assert scored.logprobs[0].logprob == max(logprob for _, logprob in scored.logprobs[0].top)
    check_reading(model_dir, adapter_dir, text, top)

    async with open_teacher(dataclasses.replace(spec, options={"dtype": "fp32"})) as teacher:
        again = await in_order(teacher.answers(asks[:9]))
        assert [top] == await in_order(teacher.readings([Reading(text, 5, 3)]))
        assert teacher.usage.cached == 9 and again == results[:9]
        assert teacher.backend._llm is None, "nothing was to be asked, so nothing need be loaded"


def check_reading(model_dir, adapter_dir, text, top):
    """Against transformers and peft."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter_dir)
    with torch.no_grad():
        logprobs = model(torch.tensor([text])).logits[0].log_softmax(-1)[4:-1]
    best = logprobs.topk(3)
    assert torch.equal(torch.tensor(top.ids), best.indices)
    torch.testing.assert_close(torch.tensor(top.logprobs), best.values, atol=1e-4, rtol=1e-4)


async def test_what_is_not_cached_may_be_left_unasked(model_dir, tmp_path):
    spec = TeacherSpec(model=str(model_dir), options=OPTIONS, cache_dir=tmp_path, cached_only=True)
    async with open_teacher(spec) as teacher:
        (result,) = await in_order(teacher.answers([ask("hello")]))
    assert "was not asked this before" in str(result) and teacher.backend._llm is None


@pytest.mark.parametrize(
    ("config", "kind"),
    [(PoolingConfig("embed"), "embed"), (PoolingConfig("classify"), None), (None, "classify")],
    ids=["embeds", "contradicts itself", "classifies by its task type"],
)
def test_an_adapter_that_does_not_generate_is_refused_before_anything_is_loaded(
    model_dir, adapter_dir, tmp_path, config, kind, monkeypatch
):
    monkeypatch.setattr("specserve.teachers.local.resolve_model", lambda *args, **options: pytest.fail("was looked up"))
    folder = shutil.copytree(adapter_dir, tmp_path / "other")
    if config is not None:
        (folder / POOLING_FILE).write_bytes(msgspec.json.encode(config))
    else:
        told = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(told | {"task_type": "SEQ_CLS"}))
        weights = load_file(folder / WEIGHTS_FILE)
        save_file(weights | {SCORE: torch.zeros(2, 64)}, folder / WEIGHTS_FILE)
    told = "there is no score head|must agree" if kind is None else f"adapter 'other' is for '{kind}' .*generates text"
    with pytest.raises(UserError, match=told):
        LocalBackend(TeacherSpec(model=str(model_dir), adapter=folder))


def test_identity_is_what_answers_depend_on(model_dir, adapter_dir, tmp_path):
    copied_model = shutil.copytree(model_dir, tmp_path / "another-name")
    copied = shutil.copytree(adapter_dir, tmp_path / "beta")

    def identity(model=model_dir, adapter=None, **options):
        return LocalBackend(TeacherSpec(model=str(model), adapter=adapter, options=options)).identity

    plain, adapted = identity(), identity(adapter=adapter_dir)
    assert identity(copied_model) == plain and identity(adapter=copied) == adapted != plain
    assert identity(num_threads=1) == plain != identity(quantization="int8")
    silent = TeacherSpec(model=str(model_dir), fields={"chat_template_kwargs": {"enable_thinking": False}})
    assert LocalBackend(silent).identity != plain
    (copied / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with_template = identity(adapter=copied)
    (copied_model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert with_template != adapted and identity(copied_model) != plain


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
LEAVING_OUT = CHAT_TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")


@pytest.mark.parametrize("template", [REFUSING + CHAT_TEMPLATE, LEAVING_OUT])
async def test_a_template_without_a_place_for_a_system_message_is_told_it_by_the_user(model_dir, tmp_path, template):
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template + "Say{% if quiet %}<|im_end|>{% endif %}")
    fields = {"chat_template_kwargs": {"quiet": True}}
    backend = LocalBackend(TeacherSpec(model=str(model), options=OPTIONS, fields=fields))
    user = {"role": "user", "content": "Pack my box"}
    joined = ask("The quick fox\n\nPack my box", max_tokens=8)
    told = Ask(({"role": "system", "content": "The quick fox"}, user), max_tokens=8)
    assert backend.as_taken(told.messages) == list(joined.messages)  # as for texts that it reads
    await backend.start()
    try:
        found, wanted = [await backend.ask(one) for one in (told, joined)]
    finally:
        await backend.close()
    assert found == wanted and found.answers[0].text
    read, without = (one.encode_chat(joined.messages) for one in (backend.tokenizer(), TextTokenizer(model)))
    assert found.prompt_tokens == len(read) == len(without) + 1  # by the template's variable


async def test_an_engine_that_does_not_start_is_one_line(model_dir, tmp_path):
    options = {**OPTIONS, "adapters_dir": str(tmp_path / "nowhere")}
    async with open_teacher(TeacherSpec(model=str(model_dir), options=options, cache_dir=tmp_path)) as teacher:
        with pytest.raises(TeacherError, match="is not a directory") as raised:
            await in_order(teacher.answers([ask("hello")] * 3))
    assert raised.value.ends_run


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("gpt-5@https://api.example.com/v1/", {"model": "gpt-5", "url": "https://api.example.com/v1"}),
        ("@cf/m@http://h:1/v1/chat/completions", {"model": "@cf/m", "url": "http://h:1/v1"}),
        ("default", {"model": "", "url": None, "adapter": None}),
        ("org/model", {"model": "org/model", "adapter": None}),
    ],
)
def test_specs(text, fields):
    spec = parse_spec(text)
    assert {name: getattr(spec, name) for name in fields} == fields


def test_a_spec_of_an_adapter(model_dir, adapter_dir):
    spec = parse_spec(f"{model_dir}+{adapter_dir}")
    assert (spec.model, spec.adapter) == (str(model_dir), adapter_dir) and parse_spec(spec.name) == spec


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("https://api.example.com/v1", "names no model; give MODEL@https"),
        ("m@https://user:secret@host/v1", "belongs into an environment variable"),
        ("m@https://", "names no host"),
        ("m@https://host/v1?key=1", "has a query"),
        ("default+nowhere", "'nowhere' is not the directory of an adapter"),
    ],
)
def test_specs_that_mean_nothing(text, told):
    with pytest.raises(UserError, match=told) as raised:
        parse_spec(text)
    assert "secret" not in str(raised.value)


async def test_a_disk_that_hangs_for_a_while_costs_no_answer(model_dir, tmp_path, monkeypatch):
    """As an engine says it when it has no process, or an adapter's disk does not answer."""
    from specserve.errors import OverloadedError
    from specserve.llm.outputs import CompletionOutput, RequestOutput

    class Slow:
        num_asked = 0

        def __init__(self, *args, **options):
            pass

        async def start(self):
            pass

        async def close(self):
            pass

        async def chat(self, messages, params, adapter):
            Slow.num_asked += 1
            if Slow.num_asked < 3:
                raise OverloadedError("its disk has not answered for 15 s", status=503)
            output = CompletionOutput(0, "x", (5,), finish_reason="stop", message={"content": "here"})
            return [RequestOutput("id", None, [1, 2], [output], True)]

    monkeypatch.setattr("specserve.teachers.local.AsyncLLM", Slow)
    spec = TeacherSpec(model=str(model_dir), cache_dir=tmp_path, retry_wait_s=0.001)
    async with open_teacher(spec) as teacher:
        ((answer,),) = await in_order(teacher.answers([ask("hello")]))
        assert (answer.text, teacher.usage.retries) == ("here", 2)
