"""Jobs between the routes and the engine: adapters that leave while a request waits, and long texts."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from contextlib import aclosing

import msgspec
import pytest
from sentencepiece_tokenizer import SCHEMES, make_sentencepiece
from waiting import until

from specserve.adapter_messages import AdapterInfo
from specserve.chat.types import Message
from specserve.config import ServeConfig
from specserve.errors import DeadlineError, UserError
from specserve.messages import Delta, EngineInfo
from specserve.server.access.keys import KeyRing
from specserve.server.access.limits import Allowance, Limits
from specserve.server.generation import job as job_module
from specserve.server.generation.generator import Generator
from specserve.server.loaded_names import UseCounts
from specserve.server.lorax.api import LoraxRoutes
from specserve.server.lorax.types import LoraxParameters, LoraxRequest
from specserve.server.metrics.metrics import Metrics
from specserve.server.openai.request_types import ChatRequest, CompletionRequest, Prediction
from specserve.text.tokenizer import LONG_TEXT, TextTokenizer

INFO = EngineInfo("tiny", "tiny", 320, 128, 8, 16, "cpu", "fp32", 1, [2])


class Store:
    """One adapter that brings a chat template."""

    def __init__(self):
        self.info = AdapterInfo("weights", 1, 1, [], 1, "one template")
        self.uses = UseCounts()

    async def resolve(self, name, priority=0):
        return self.info

    async def resolve_with_texts(self, name, known, priority=0):
        return self.info, None if self.info.text_hash in known else {"chat_template.jinja": b"Hi"}

    def placement(self, content_hash):
        return 1

    def engine_lost(self, content_hash, placement):
        pass


class Engine:
    """Has let go of the adapter the first `num_refusals` times that it is asked for; `meanwhile` happens then."""

    info = INFO
    generation, state = 1, "ready"

    def __init__(self):
        self.asked = []
        self.num_refusals = 1
        self.meanwhile = lambda: None

    async def first_info(self):
        return self.info

    async def generate(self, request):
        self.asked.append(request.adapter_hash)
        if len(self.asked) <= self.num_refusals:
            self.meanwhile()
            raise UserError("not loaded", code="adapter_not_resident", status=409)
        yield Delta(request.request_id, [7], finish_reason="stop")


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return TextTokenizer(model_dir)


@pytest.fixture
def generator(tokenizer):
    return Generator(ServeConfig(), Engine(), Store(), tokenizer, "base", Metrics())


async def prepare(generator, caller=None, **fields):
    request = ChatRequest(model="a", messages=[Message(role="user", content="Hi")], **fields)
    return await generator.prepare(request, caller or KeyRing(ServeConfig()).anonymous)


async def test_the_engine_hears_who_sends_a_request_whether_or_not_caches_are_apart(generator):
    anonymous = KeyRing(ServeConfig()).anonymous
    for name, tenant in (("red", "red"), ("red", None)):
        job = await prepare(generator, dataclasses.replace(anonymous, name=name, tenant=tenant), n=2)
        assert [request.caller for request in job.requests] == ["red", "red"]
    assert (await prepare(generator)).requests[0].caller == ""


async def test_the_engine_hears_of_all_that_are_admitted_together(generator):
    body = CompletionRequest(prompt=[[5], [6] * 80], max_tokens=1, n=3)
    first, *others = (await generator.prepare(body, KeyRing(ServeConfig()).anonymous)).requests
    assert (first.num_together, first.together.prompt_tokens) == (6, 3 * 81)
    assert first.is_first and not any(request.is_first for request in others)
    assert {request.together for request in others} == {first.together}
    again = (await generator.prepare(body, KeyRing(ServeConfig()).anonymous)).requests[0]
    assert again.together.answer_id != first.together.answer_id
    assert (await prepare(generator)).requests[0].num_together == 1


async def answer(generator):
    job = await prepare(generator)
    return [delta.text async for _, delta in generator.deltas(job)]


async def test_a_request_goes_on_with_its_adapter_though_the_tokenizer_was_given_up_meanwhile(generator):
    generator.engine.meanwhile = generator.prompts._adapter_tokenizers.clear
    assert await answer(generator) == [generator.prompts.tokenizer.decode([7])]
    assert generator.engine.asked == ["weights", "weights"]
    await generator.close()


async def test_a_prompt_of_another_chat_template_is_not_run(generator):
    def edit():
        generator.store.info = msgspec.structs.replace(generator.store.info, text_hash="another template")

    generator.engine.meanwhile = edit
    with pytest.raises(UserError, match="another chat template") as refused:
        await answer(generator)
    assert refused.value.code == "adapter_changed" and generator.engine.asked == ["weights"]
    await generator.close()


async def test_long_texts_are_read_one_at_a_time_also_when_clients_leave(generator):
    num_reading, go_on, most = 0, threading.Event(), []

    def read():
        nonlocal num_reading
        num_reading += 1
        most.append(num_reading)
        go_on.wait(60)
        num_reading -= 1

    prompts = generator.prompts
    readers = [asyncio.create_task(prompts.read(prompts.tokenizer, LONG_TEXT + 1, read)) for _ in range(3)]
    await until(lambda: most)
    for reader in readers[:2]:
        reader.cancel()
    await asyncio.sleep(0.05)
    go_on.set()
    await readers[2]
    assert most == [1, 1]  # the second had not begun
    await generator.close()


async def test_the_line_of_a_request_that_we_failed_does_not_blame_the_client(generator, caplog):
    def fail():
        raise RuntimeError("a bug")

    generator.engine.meanwhile = fail
    with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="a bug"):
        await answer(generator)
    assert any("internal_error" in record.getMessage() for record in caplog.records)
    await generator.close()


async def test_an_adapter_that_never_stays_for_its_request_is_an_overload(generator):
    generator.engine.num_refusals = 1000
    with pytest.raises(UserError, match="--max-adapters") as refused:
        await answer(generator)
    assert refused.value.status == 503 and refused.value.code == "overloaded"
    await generator.close()


@pytest.mark.parametrize(("num_taken", "is_complete"), [(1, False), (2, True)])
async def test_a_deadline_that_passes_during_a_write_cuts_no_write(generator, monkeypatch, num_taken, is_complete):
    async def generate(request):
        for finish_reason in (None, None, "stop"):
            yield Delta(request.request_id, [7], finish_reason=finish_reason)

    monkeypatch.setattr(generator.engine, "generate", generate)
    job = await prepare(generator)
    job.deadline = time.monotonic() + 2
    async with aclosing(generator.deltas(job)) as deltas:
        for _ in range(num_taken):
            await anext(deltas)
        await asyncio.sleep(2.1)  # a reader that takes nothing; cancelled, this would not be a DeadlineError
        if is_complete:
            assert [delta.finish_reason async for _, delta in deltas] == ["stop"]
        else:
            with pytest.raises(DeadlineError):
                await anext(deltas)
    await generator.close()


# -- tokens of a key


@pytest.fixture
def caller():
    allowance = Allowance("team", Limits(tokens_per_minute=1000), lambda: 0.0)
    return dataclasses.replace(KeyRing(ServeConfig()).anonymous, allowance=allowance)


def left(caller) -> int:
    return int(caller.allowance.headers()["x-ratelimit-remaining-tokens"])


async def test_a_job_reserves_what_it_may_use_and_is_charged_what_it_used(generator, caller, monkeypatch):
    generator.engine.num_refusals = 0
    monkeypatch.setattr(job_module, "GUESSED_TOKENS", 50)  # less than the room of 126
    for fields, num_reserved in (
        ({}, 50),
        ({"n": 2}, 100),
        ({"max_tokens": 60}, 60),
        ({"max_completion_tokens": 5, "n": 3}, 15),
    ):
        job = await prepare(generator, caller, **fields)
        before = left(caller)
        async with aclosing(generator.deltas(job)) as deltas:
            await anext(deltas)
            assert before - left(caller) == job.num_prompt_tokens + num_reserved, fields
            async for _ in deltas:
                pass
        assert before - left(caller) == job.num_prompt_tokens + job.n


@pytest.mark.parametrize("end", ["client", "deadline"])
async def test_a_job_that_ends_before_the_first_token_costs_its_prompt(generator, caller, monkeypatch, end):
    asked = asyncio.Event()

    async def silent(request):
        asked.set()
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(generator.engine, "generate", silent)
    job = await prepare(generator, caller)
    if end == "deadline":
        job.deadline = time.monotonic() + 0.05
    client = asyncio.create_task(anext(generator.deltas(job)))
    if end == "client":
        await asked.wait()
        client.cancel()
    await asyncio.wait([client])
    assert client.cancelled() or isinstance(client.exception(), DeadlineError)
    assert left(caller) == 1000 - job.num_prompt_tokens


async def test_a_job_that_fails_before_the_first_token_costs_nothing(generator, caller):
    generator.engine.num_refusals = 100
    job = await prepare(generator, caller)
    with pytest.raises(UserError, match="make room"):
        await anext(generator.deltas(job))
    assert left(caller) == 1000


async def test_a_job_whose_span_cannot_begin_costs_nothing_and_is_counted_as_failed(generator, caller):
    class Spans:
        def begin(self, job):
            raise RuntimeError("no span")

    generator.engine.num_refusals = 0
    generator.accounts._spans = Spans()
    job = await prepare(generator, caller)
    with pytest.raises(RuntimeError, match="no span"):
        await anext(generator.deltas(job))
    assert left(caller) == 1000
    metrics = generator.accounts._metrics.render(None).decode()
    assert 'finished_reason="error"' in metrics


async def test_a_key_without_tokens_is_refused_before_its_adapter_is_loaded(generator, caller, monkeypatch):
    caller.allowance.reserve(1).settle(1001)
    monkeypatch.setattr(generator.store, "resolve_with_texts", None)
    with pytest.raises(UserError, match="0 are left of tokens_per_minute 1000"):
        await prepare(generator, caller)


# -- LoRAX's inputs, which are tokenised before they are a request


def lorax_job(generator, caller, **parameters):
    body = LoraxRequest("Hi", LoraxParameters(adapter_id="a", **parameters))
    return LoraxRoutes(generator)._prepare(body, caller, stream=False)


async def test_inputs_of_a_key_without_tokens_load_no_adapter(generator, caller, monkeypatch):
    caller.allowance.reserve(1).settle(1001)
    monkeypatch.setattr(generator.store, "resolve_with_texts", None)
    with pytest.raises(UserError, match="0 are left of tokens_per_minute 1000"):
        await lorax_job(generator, caller)


async def test_an_adapter_is_loaded_for_inputs_with_their_priority_where_they_may_have_one(
    generator, caller, monkeypatch
):
    resolve, priorities = generator.store.resolve_with_texts, []

    async def load(name, known, priority):
        priorities.append(priority)
        return await resolve(name, known, priority)

    monkeypatch.setattr(generator.store, "resolve_with_texts", load)
    await lorax_job(generator, caller, priority=7)
    assert set(priorities) == {7}
    priorities.clear()
    with pytest.raises(UserError, match="priority is -1; 0 to"):
        await lorax_job(generator, caller, priority=-1)
    with pytest.raises(UserError, match="may not set one"):
        await lorax_job(generator, dataclasses.replace(caller, may_prioritize=False), priority=7)
    assert not priorities


async def test_the_deadline_of_inputs_is_from_before_their_adapter_is_loaded(generator, caller, monkeypatch):
    begun = time.monotonic()
    job, _ = await lorax_job(generator, caller, deadline_ms=60_000)
    assert begun + 60 <= job.deadline == job.requests[0].deadline <= time.monotonic() + 60

    async def load(name, known, priority=0):
        await asyncio.Event().wait()

    monkeypatch.setattr(generator.store, "resolve_with_texts", load)
    with pytest.raises(DeadlineError):
        await lorax_job(generator, caller, deadline_ms=20)


async def test_inputs_are_not_run_with_another_tokenizer_than_made_their_tokens(generator, caller, monkeypatch):
    resolve = generator.store.resolve_with_texts

    async def edit(name, known, priority=0):
        resolved = await resolve(name, known)
        generator.store.info = msgspec.structs.replace(generator.store.info, text_hash="another template")
        return resolved

    monkeypatch.setattr(generator.store, "resolve_with_texts", edit)
    with pytest.raises(UserError, match="another chat template") as refused:
        await lorax_job(generator, caller)
    assert refused.value.code == "adapter_changed"
    assert (await lorax_job(generator, caller))[0].adapter_info.text_hash == "another template"
    await generator.close()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_prediction_is_the_tokens_of_an_answer_that_says_it(tmp_path, scheme):
    """SentencePiece would begin it with a space of its own, which no answer at the beginning of a line has."""
    template = "<s>{{ messages[0].content }}"
    tokenizer = TextTokenizer(make_sentencepiece(tmp_path, scheme, template))
    engine = Engine()
    engine.info = msgspec.structs.replace(INFO, vocab_size=tokenizer.vocab_size)
    generator = Generator(ServeConfig(), engine, Store(), tokenizer, "base", Metrics())

    async def said(request):
        (made,) = (await generator.prepare(request, KeyRing(ServeConfig()).anonymous)).requests
        return tokenizer.detokenizer(made.prompt_token_ids).write(made.prediction_token_ids, 0, True)

    for asked, expected, answer in (
        ("jumps over\n", "the fox", "the fox"),
        ("jumps over\n", " the fox", " the fox"),
        ("jumps over [/INST]", "the fox", " the fox"),
        ("jumps over [/INST]", " the fox", " the fox"),
        ("jumps over [/INST]", "\nthe fox", "\nthe fox"),
    ):
        messages = [Message(role="user", content=asked)]
        request = ChatRequest(messages=messages, prediction=Prediction("content", expected))
        assert await said(request) == answer, asked
    assert await said(CompletionRequest(prompt="the f", prediction=Prediction("content", "ox"))) == "ox"
    await generator.close()
