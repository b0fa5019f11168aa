"""What keeps an engine process running: every way in which one fails to start, dies, or falls silent."""

import asyncio
import os
import resource
import signal
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from engine_fixture import request
from places import FIXTURES, ROOT
from waiting import until

from specserve.config import EngineConfig
from specserve.errors import EngineDeadError, UserError
from specserve.server.engine_client import client as engine_client
from specserve.server.engine_client import supervisor as engine_supervisor
from specserve.server.engine_client.client import EngineClient
from specserve.server.engine_client.resending import EngineLosses, Resender

FAKE = [sys.executable, str(FIXTURES / "fake_engine.py")]


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Says what the engine processes do, one word each; the last word stays."""
    path = tmp_path / "plan"
    monkeypatch.setenv("FAKE_ENGINE_PLAN", str(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(engine_supervisor, "_FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(engine_supervisor, "MAX_BACKOFF_S", 0.05)
    return path.write_text


@asynccontextmanager
async def started(**settings):
    client = EngineClient(EngineConfig(model="fake"), command=FAKE, **settings)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def num_handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def no_handles_left():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_handles() - 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_restart_survives_every_way_in_which_a_start_fails(plan, caplog):
    words = ["exit", "garbage", "half", "huge", "refuse", "return", "nonsense", "nonsense"]
    plan(" ".join(["serve", *words, "serve"]))

    async def run():
        async with started() as client:
            before = num_handles()
            os.kill(client.info.pid, signal.SIGKILL)
            await until(lambda: client.state != "ready")
            assert client.state == "restarting"
            await until(lambda: "SIGKILL" in caplog.text)
            pid = client.info.pid
            await until(lambda: client.state == "ready" and client.generation == 4 and client.info.pid != pid)
            await client.unload_adapter("a", 1)
            assert num_handles() == before
        assert client.state == "stopped" and not Path(f"/proc/{client.info.pid}").exists()

    asyncio.run(run())
    reasons = [record.getMessage() for record in caplog.records if "starting it again" in record.getMessage()]
    assert len(reasons) == 1 + len(words)
    parts = ["SIGKILL", "status 3", *["while it was starting"] * 3, "no such model", "while it was starting"]
    assert all(part in reason for reason, part in zip(reasons, parts, strict=False))
    assert all("connection to the engine broke: DecodeError" in reason for reason in reasons[-2:])


def test_a_restart_serves_the_model_of_the_start_alone(plan, caplog):
    """A folder that was updated under the server: its tokenizer, its streams and its heads are those of before."""
    plan("serve other other serve")

    async def run():
        async with started() as client:
            before = num_handles()
            os.kill(client.info.pid, signal.SIGKILL)
            await until(lambda: client.generation == 2 and client.state == "ready")
            assert client.info.model_hash == "" and num_handles() == before

    asyncio.run(run())
    assert caplog.text.count("in fake are others than at the start of this server") == 2


def test_a_restart_without_handles_is_tried_until_there_are_some(plan, caplog):
    plan("serve")

    async def run():
        async with started() as client:
            before = num_handles()
            with no_handles_left():
                os.kill(client.info.pid, signal.SIGKILL)
                await until(lambda: caplog.text.count("Too many open files") >= 3)
            await until(lambda: client.state == "ready")
            await client.unload_adapter("a", 1)
            assert num_handles() == before

    asyncio.run(run())


@pytest.mark.parametrize("word", ["exit", "garbage", "refuse"])
def test_a_first_start_that_fails_says_why_and_leaves_nothing(plan, word):
    plan(word)

    async def run():
        client = EngineClient(EngineConfig(model="fake"), command=FAKE)
        before = num_handles()
        with pytest.raises(UserError, match="no such model" if word == "refuse" else "while it was starting"):
            await client.start()
        await client.stop()
        assert num_handles() == before

    asyncio.run(run())


def test_stopping_ends_a_start_that_is_under_way():
    async def run():
        sleeps = [sys.executable, "-c", "import time; time.sleep(100)"]
        client = EngineClient(EngineConfig(model="fake"), command=sleeps)
        start = asyncio.create_task(client.start())
        await asyncio.sleep(0.05)
        await client.stop()
        with pytest.raises(EngineDeadError, match="shutting down"):
            await start

    before = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - before < 60  # the process sleeps for longer


def test_silence_counts_only_while_this_process_was_awake_to_hear(plan, caplog):
    plan("serve silent serve")

    async def run():
        async with started(silence_timeout_s=2.0) as client:  # which a process may be without a core
            time.sleep(2.5)  # as after SIGSTOP, or a handler that holds up the loop
            await asyncio.sleep(0.6)  # the supervisor looks
            assert client.generation == 1 and client.state == "ready"
            os.kill(client.info.pid, signal.SIGKILL)
            await until(lambda: client.generation == 3)

    asyncio.run(run())
    assert caplog.text.count("silent for") == 1


def test_a_step_that_does_not_end_is_told_from_a_long_one(plan, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_supervisor, "_MAX_TICK_S", 0.02)
    monkeypatch.setenv("FAKE_ENGINE_STUCK", str(tmp_path / "stuck"))
    plan("stuck serve")

    async def run():
        async with started(silence_timeout_s=60.0, step_timeout_s=10.0) as client:
            await asyncio.sleep(0.4)  # the supervisor looks at a step that may take so long
            assert client.generation == 1 and client.state == "ready"
            (tmp_path / "stuck").touch()
            await until(lambda: client.generation == 2)

    asyncio.run(run())
    assert (
        "one step of 512 rows for 20 s, where 0.5 s were expected" in caplog.text
        and "--engine-step-timeout-s" in caplog.text
    )


def test_stats_do_not_wait_for_a_step(plan):
    """The fake engine answers no `GetStats`. Endpoint pickers take figures older than 0.2 s for a full server."""
    plan("serve exit serve")

    async def run():
        async with started() as client:
            async with asyncio.timeout(60):
                took = []
                for _ in range(3):
                    start = time.monotonic()
                    assert (await client.stats()).num_kv_blocks == 2
                    took.append(time.monotonic() - start)
                assert min(took) < 0.2
            os.kill(client.info.pid, signal.SIGKILL)
            await until(lambda: client.state != "ready")
            assert await client.stats() is None

    asyncio.run(run())


async def text(resender, request_id, prompt):
    deltas = resender.generate(request(request_id, prompt), EngineLosses(is_once=True))
    return "".join([delta.text async for delta in deltas])


def test_sequences_without_output_outlive_their_engine_and_what_ends_it_twice_is_refused(plan):
    plan("serve")

    async def run():
        async with started() as client:
            resender = Resender(client)
            prompts = [[1], [2], [13], [3], [4]]  # the third ends every engine that reads it
            jobs = [asyncio.create_task(text(resender, str(idx), ids)) for idx, ids in enumerate(prompts)]
            await until(lambda: client.state != "ready")
            late = asyncio.create_task(text(resender, "late", [5]))
            results = await asyncio.gather(*jobs, late, return_exceptions=True)
            error = results.pop(2)
            assert results == ["seven"] * 5
            assert error.status == 500 and error.code == "engine_crashed" and "2 times" in str(error)
            assert client.generation == 3

    asyncio.run(run())


def test_a_sequence_that_ran_alone_beside_a_new_one_that_ends_its_engine_is_served(plan):
    plan("serve")

    async def run():
        async with started() as client:
            resender = Resender(client)
            ask = [asyncio.create_task(text(resender, name, ids)) for name, ids in (("good", [1]), ("bad", [13]))]
            await until(lambda: client.state != "ready")
            ask.append(asyncio.create_task(text(resender, "bad again", [13])))  # runs beside the good one in its turn
            await until(lambda: client.state == "ready")
            await until(lambda: client.state != "ready")
            ask.append(asyncio.create_task(text(resender, "new", [5])))  # waits until the good one is served
            results = await asyncio.gather(*ask, return_exceptions=True)
            assert [results[0], results[3]] == ["seven"] * 2
            assert all(error.code == "engine_crashed" for error in results[1:3])
            assert client.generation <= 6

    asyncio.run(run())


def test_an_engine_that_does_not_come_back_is_waited_for_so_long(plan, monkeypatch, caplog):
    monkeypatch.setattr(engine_client, "RESTART_PATIENCE_S", 0.5)
    plan("serve refuse")

    async def run():
        async with started() as client:
            os.kill(client.info.pid, signal.SIGKILL)
            await until(lambda: "no such model" in caplog.text)  # the next start has failed
            for call in (client.unload_adapter("a", 1), anext(client.generate(request("a", [1])))):
                with pytest.raises(EngineDeadError, match="no such model"):
                    await call

    asyncio.run(run())
