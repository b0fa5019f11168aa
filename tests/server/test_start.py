"""A server whose model is still being read: it says so at once, and what is to be generated waits for it."""

import asyncio
import sys
from contextlib import asynccontextmanager

import aiohttp
import pytest
from places import FIXTURES

from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.server.app import Server
from specserve.server.engine_client import client as engine_client
from specserve.server.served_engine import engine_of

BODY = {"prompt": "The quick", "max_tokens": 4}
LIMIT_S = 60.0


class Start:
    """A server that starts, with an engine that takes until `go`."""

    def __init__(self, model_dir, plan, **settings):
        plan.write_text("late")
        self._go = plan.with_suffix(".go")
        config = ServeConfig(port=0, **settings)
        self.server = Server(config, model_dir, [sys.executable, str(FIXTURES / "fake_engine.py")])
        self.stop, self.ready = asyncio.Event(), []
        self.task = asyncio.create_task(self.server.serve_until(self.stop, self.ready.append))
        self.url = ""

    def go(self, word="serve"):
        written = self._go.with_suffix(".new")
        written.write_text(word)
        written.rename(self._go)

    async def get(self, path):
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as answer:
            return answer.status, await answer.json(), answer.headers.get("Retry-After")

    async def post(self, path, body):
        async with aiohttp.ClientSession() as session, session.post(self.url + path, json=body) as answer:
            return answer.status, await answer.json()


@pytest.fixture
def start(model_dir, tmp_path, monkeypatch, caplog):
    """Makes a `Start` that listens."""
    monkeypatch.setenv("FAKE_ENGINE_PLAN", str(tmp_path / "plan"))
    caplog.set_level("INFO", "specserve.server.app")

    @asynccontextmanager
    async def make(**settings):
        start = Start(model_dir, tmp_path / "plan", **settings)
        try:
            async with asyncio.timeout(LIMIT_S):
                while not start.url:
                    assert not start.task.done(), start.task
                    said = [record.getMessage() for record in caplog.records if "listening at" in record.getMessage()]
                    start.url = said[0].partition("listening at ")[2] if said else ""
                    await asyncio.sleep(0.01)
                yield start
        finally:
            start.stop.set()
            await asyncio.gather(start.task, return_exceptions=True)

    return make


async def until_asked(start, num):
    while start.server.middlewares.num_in_flight < num:
        await asyncio.sleep(0.01)


async def test_while_the_model_is_read_health_says_so_and_requests_wait(start):
    async with start(drain_timeout_s=0) as it:
        for path in ("/health", "/ready"):
            status, body, _ = await it.get(path)
            assert (status, body["status"]) == (503, "starting")
        assert (await it.get("/version"))[0] == 200
        status, body, retry_after = await it.get("/v1/models")
        assert (status, body["error"]["code"], retry_after) == (503, "engine_unavailable", "1")
        openai = asyncio.create_task(it.post("/v1/completions", BODY))
        lorax = asyncio.create_task(it.post("/generate", {"inputs": "The quick"}))
        await until_asked(it, 2)
        late = await it.post("/v1/completions", {**BODY, "deadline_ms": 50})
        assert late[0] == 504 and "deadline_ms" in late[1]["error"]["message"]
        assert not it.ready and not openai.done() and not lorax.done()
        it.go()
        status, body = await openai
        assert status == 200 and body["usage"]["completion_tokens"] == 1
        assert (await lorax)[0] == 200
        assert it.ready == [it.url] and (await it.get("/health"))[0] == 200


async def test_requests_wait_for_a_start_as_long_as_for_a_restart(start, monkeypatch):
    monkeypatch.setattr(engine_client, "RESTART_PATIENCE_S", 0.05)
    async with start(drain_timeout_s=0) as it:
        status, body = await it.post("/v1/completions", BODY)
        assert (status, body["error"]["code"]) == (503, "engine_unavailable")


async def test_a_start_that_fails_answers_those_who_wait(start):
    async with start() as it:
        waiting = asyncio.create_task(it.post("/v1/completions", BODY))
        await until_asked(it, 1)
        it.go("refuse")
        assert (await waiting)[0] == 503
        with pytest.raises(UserError, match="no such model"):
            await it.task


async def test_a_stop_during_the_start_drains_those_who_wait(start):
    async with start(drain_timeout_s=LIMIT_S) as it:
        waiting = asyncio.create_task(it.post("/v1/completions", BODY))
        await until_asked(it, 1)
        it.stop.set()
        while (await it.get("/ready"))[1]["status"] != "draining":
            await asyncio.sleep(0.01)
        it.go()
        assert (await waiting)[0] == 200
        await it.task
        assert not it.ready


def test_a_base_head_that_is_not_there_is_refused_before_an_engine_starts(tmp_path):
    with pytest.raises(UserError, match=r"base_head is .*nowhere, which has no lookahead_config.json"):
        engine_of(ServeConfig(base_head=str(tmp_path / "nowhere")), tmp_path, ())


@pytest.mark.parametrize("name", ["history_dir", "serving_log"])
def test_a_folder_that_what_is_served_cannot_be_kept_in_is_said_before_the_model_is_read(model_dir, tmp_path, name):
    (tmp_path / "file").touch()
    kept = str(tmp_path / "file" / "kept")
    with pytest.raises(UserError, match=f"{name} '{kept}' cannot be used: Not a directory; name another"):
        engine_of(ServeConfig(learn_history=True, **{name: kept}), model_dir, ())
    engine_of(ServeConfig(learn_history=True, **{name: str(tmp_path / "new" / "kept")}), model_dir, ())
    assert (tmp_path / "new" / "kept").is_dir()


def test_a_history_that_nobody_learns_is_said(model_dir, tmp_path, caplog):
    engine_of(ServeConfig(history_dir=str(tmp_path)), model_dir, ())
    assert "learn_history is not" in caplog.text
