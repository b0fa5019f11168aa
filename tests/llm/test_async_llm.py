"""`AsyncLLM` beside an `LLM`, each with its own engine: awaited side by side, cancelled, and an engine that dies."""

import asyncio
import os
import re
import shutil
import signal
from contextlib import nullcontext

import pytest
from places import ROOT

from specserve import AsyncLLM, SamplingParams, UserError
from specserve.errors import EngineDeadError
from specserve.llm import front

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def other(model_dir, adapters_dir, options):
    """Started and closed on loops of their own: each test has another one."""
    other = AsyncLLM(model_dir, adapters_dir=adapters_dir, served_model_name="other", **options)
    with pytest.raises(EngineDeadError, match="not been started"):
        other.generate_stream("x")
    asyncio.run(other.start())
    yield other
    asyncio.run(other.close())
    with pytest.raises(EngineDeadError, match="is closed"):
        asyncio.run(other.generate("x"))


async def wait_idle(llm):
    async with asyncio.timeout(60):
        while (requests := (await llm.stats()).requests).running + requests.waiting:
            await asyncio.sleep(0.02)


async def test_texts_are_pooled_as_without_a_loop(llm, other):
    prompts = ["The quick", "Pack my box"]
    assert await other.embed(prompts, pooling="mean") == await asyncio.to_thread(llm.embed, prompts, pooling="mean")
    with pytest.raises(UserError, match="classifies"):
        await other.classify(prompts)


async def test_two_engines_give_the_same_side_by_side(llm, other):
    assert (llm.model_name, other.model_name) == ("tiny", "other")
    assert llm.engine_info.pid != other.engine_info.pid
    theirs = asyncio.to_thread(llm.generate, ["The", "A"], GREEDY, adapter="alpha")
    ours, theirs, alone = await asyncio.gather(
        other.generate(["The", "A"], GREEDY, adapter="alpha"), theirs, other.generate("A", GREEDY, adapter="alpha")
    )
    assert [item.outputs[0].token_ids for item in ours] == [item.outputs[0].token_ids for item in theirs]
    assert alone[0].outputs[0].token_ids == ours[1].outputs[0].token_ids


async def test_streams_side_by_side_and_a_chat(other):
    async def read(prompt):
        return [item.outputs[0].delta async for item in other.generate_stream(prompt, GREEDY)]

    both = await asyncio.gather(read("The"), read("A"))
    whole = await other.generate(["The", "A"], GREEDY)
    assert ["".join(parts) for parts in both] == [item.outputs[0].text for item in whole]
    ask = [{"role": "user", "content": "hello"}]
    (answer,) = await other.chat(ask, GREEDY)
    assert [item async for item in other.chat_stream(ask, GREEDY)][-1].outputs[0].message == answer.outputs[0].message


async def test_cancelling_ends_the_requests(other):
    task = asyncio.create_task(other.generate(["The", "A"], LONG))
    stream = other.generate_stream("The", LONG)
    await anext(stream)
    task.cancel()
    await stream.aclose()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_idle(other)


async def test_errors_have_names(other):
    with pytest.raises(UserError, match="top_p is 2"):
        await other.generate("x", SamplingParams(top_p=2.0))
    with pytest.raises(UserError, match="top_p is 2"):
        async for _ in other.generate_stream("x", SamplingParams(top_p=2.0)):
            pass


async def test_adapters_come_and_go(other, beta_dir):
    await other.load_adapter("beta", beta_dir)
    assert await other.adapter_names() == ["alpha", "beta"]
    await other.generate("x", GREEDY, adapter="beta")
    await other.unload_adapter("beta")
    assert await other.adapter_names() == ["alpha"]


async def test_an_engine_that_dies_is_replaced_and_what_waited_is_asked_again(other, beta_dir):
    before = await other.generate("The", GREEDY, adapter=beta_dir)
    task = asyncio.create_task(other.generate("A", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)))
    pid = other.engine_info.pid
    os.kill(pid, signal.SIGKILL)
    after = await other.generate("The", GREEDY, adapter=beta_dir)
    assert other.engine_info.pid != pid
    assert after[0].outputs[0].token_ids == before[0].outputs[0].token_ids
    (answer,) = await task
    assert len(answer.outputs[0].token_ids) == 60
    await other.unload_adapter("beta")


def test_the_programs_in_the_docs_run(llm, other, beta_dir, adapters_dir, monkeypatch, capsys):
    """As one program, on the tiny model, with adapters that are called as the demo adapters."""
    text = (ROOT / "docs/python.md").read_text()
    program = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    monkeypatch.setattr("specserve.llm.llm.LLM", lambda **options: llm)
    monkeypatch.setattr("specserve.llm.async_llm.AsyncLLM", lambda **options: nullcontext(other))
    demos = [demo.name for demo in (ROOT / "examples/adapters").iterdir()]
    for name in demos:
        shutil.copytree(beta_dir, adapters_dir / name)
    program = program.replace("examples/adapters/debtags", str(adapters_dir / "debtags"))
    try:
        exec(compile(program, "docs/python.md", "exec"), {})
    finally:
        for name in ("mine", "debtags"):
            llm.unload_adapter(name)
        for name in demos:
            shutil.rmtree(adapters_dir / name)
    assert "tokens a forward" in capsys.readouterr().out


class FakeService:
    is_closed = False

    async def close(self):
        self.is_closed = True


async def test_started_twice_at_once_it_has_one_engine_and_closed_meanwhile_none(monkeypatch, tmp_path):
    services = []

    async def started(config, model_dir):
        services.append(service := FakeService())
        await asyncio.sleep(0.2)
        return service

    monkeypatch.setattr(front, "_started", started)
    monkeypatch.setattr(front, "resolve_model", lambda *args, **options: tmp_path)
    twice, meanwhile = AsyncLLM("x"), AsyncLLM("x")
    await asyncio.gather(twice.start(), twice.start())
    assert len(services) == 1
    await twice.close()
    starting = asyncio.create_task(meanwhile.start())
    while len(services) < 2:
        await asyncio.sleep(0.01)
    await meanwhile.close()
    await starting
    assert [service.is_closed for service in services] == [True, True]
    with pytest.raises(EngineDeadError, match="is closed"):
        await meanwhile.generate("x")
