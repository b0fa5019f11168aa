"""Who listens to the stats: one event for all, nothing for who has left, and what is told while the engine is away."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from contextlib import aclosing

import msgspec
import pytest
from places import FIXTURES, ROOT

from specserve.adapter_messages import LookaheadInfo
from specserve.config import EngineConfig, ServeConfig
from specserve.errors import OverloadedError, ShuttingDownError
from specserve.messages import EngineInfo
from specserve.server.access.caller import Caller
from specserve.server.access.keys import KeyRing
from specserve.server.engine_client.client import EngineClient
from specserve.server.stats import feed as feed_module
from specserve.server.stats import snapshot as snapshot_module
from specserve.server.stats.feed import StatsFeed
from specserve.server.stats.snapshot import StatsSource
from specserve.server.stats.types import StatsResponse
from specserve.stats_messages import AdapterDrafts, AdapterRequests, EngineStats

INFO = EngineInfo("tiny", "tiny", 320, 128, 8, 16, "cpu", "fp32", 1, [2], "avx2", 64, 4096)
DRAFTS = [
    AdapterDrafts(name, 10, 10 * idx, 40, 20, 0.5, [20, 20], [15, 5])
    for idx, name in enumerate([None, "red-1", "red-2", "blue"])
]


class Engine:
    """What a source asks of an engine's client."""

    state, num_restarts, known_info, serving_s = "ready", 0, INFO, 5.0

    def __init__(self) -> None:
        self.num_asked = 0
        self.stats: EngineStats | None = EngineStats(*range(14), drafts_by_adapter=DRAFTS)

    def replicas(self):
        return {}

    @property
    def snapshot(self):
        self.num_asked += 1
        return self.stats, 1000.0 + self.num_asked


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def feed(engine):
    return StatsFeed(StatsSource(engine, "the-base").newest)


def decoded(event: msgspec.Raw) -> StatsResponse:
    return msgspec.json.decode(event, type=StatsResponse)


def caller_for(*adapters: str) -> Caller:
    return dataclasses.replace(KeyRing(ServeConfig()).anonymous, adapters=adapters or None)


async def test_one_snapshot_serves_all_who_listen_and_nobody_asks_when_they_have_left(feed, engine):
    async with aclosing(feed.listen(None)) as one, aclosing(feed.listen(None)) as other:
        assert decoded(await anext(one)).time_s == decoded(await anext(other)).time_s == 1001.0
        feed.publish()
        events = await asyncio.gather(anext(one), anext(other))
        assert events[0] is events[1] and decoded(events[0]).time_s == 1002.0
        assert feed.num_listeners == 2
    assert feed.num_listeners == 0
    feed.publish()
    assert engine.num_asked == 2
    async with aclosing(feed.listen(None)) as late:
        assert decoded(await anext(late)).time_s == 1003.0  # not of those who listened before


async def test_a_slow_listener_misses_events_and_gets_the_newest(feed, engine):
    async with aclosing(feed.listen(None)) as slow:
        await anext(slow)
        for _ in range(5):
            feed.publish()
        assert decoded(await anext(slow)).time_s == 1006.0
        waiting = asyncio.ensure_future(anext(slow))
        await asyncio.sleep(0)
        assert not waiting.done()
        feed.publish()
        assert decoded(await waiting).time_s == 1007.0


async def test_there_are_places_for_so_many_and_each_that_leaves_makes_room(feed, monkeypatch):
    monkeypatch.setattr(feed_module, "MAX_LISTENERS", 2)
    async with aclosing(feed.listen(None)) as one, aclosing(feed.listen(None)) as other:
        await anext(one), await anext(other)
        with pytest.raises(OverloadedError, match="2 clients"):
            await anext(feed.listen(None))
        await one.aclose()
        async with aclosing(feed.listen(None)) as third:
            await anext(third)


async def test_one_key_may_not_take_all_places(feed, monkeypatch):
    monkeypatch.setattr(feed_module, "MAX_LISTENERS_OF_ONE", 2)
    one, other = (dataclasses.replace(caller_for(), name=name) for name in ("one", "other"))
    async with aclosing(feed.listen(one)) as first, aclosing(feed.listen(one)) as second:
        await anext(first), await anext(second)
        with pytest.raises(OverloadedError, match="2 clients with key 'one'"):
            await anext(feed.listen(one))
        for caller in (other, None):
            async with aclosing(feed.listen(caller)) as third:
                await anext(third)
        await first.aclose()
        async with aclosing(feed.listen(one)) as third:
            await anext(third)
    assert feed.num_listeners == 0


async def test_stats_that_cannot_be_made_are_logged_once_and_come_again(engine, monkeypatch, caplog):
    monkeypatch.setattr(feed_module, "QUIET_S", 0.01)
    source, is_broken = StatsSource(engine, "the-base"), True

    def newest():
        if is_broken:
            raise ZeroDivisionError("a fault in the stats")
        return source.newest()

    feed = StatsFeed(newest)
    async with asyncio.timeout(60), aclosing(feed.listen(None)) as listener:
        waiting = asyncio.ensure_future(anext(listener))
        while not caplog.records:
            await asyncio.sleep(0)
        feed.publish()
        assert not waiting.done()
        is_broken = False
        assert decoded(await waiting).time_s == 1001.0
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


async def test_closing_ends_all_streams_and_begins_none(feed):
    async with aclosing(feed.listen(None)) as listener:
        await anext(listener)
        waiting = asyncio.ensure_future(anext(listener))
        await asyncio.sleep(0)
        feed.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
    with pytest.raises(ShuttingDownError):
        await anext(feed.listen(None))


async def test_something_is_told_while_the_engine_says_nothing(feed, engine, monkeypatch):
    monkeypatch.setattr(feed_module, "QUIET_S", 0.01)
    async with aclosing(feed.listen(None)) as listener:
        await anext(listener)
        engine.stats, engine.state = None, "restarting"
        async with asyncio.timeout(60):
            while (event := decoded(await anext(listener))).engine.status == "running":
                pass
    assert event.engine.status == "restarting"
    assert event.tokens.generated == 0 and event.kv.free_blocks == event.kv.blocks == 8


def test_an_engine_that_has_not_started_has_stats_of_nothing(engine):
    engine.stats, engine.state, engine.known_info = None, "starting", None
    told = StatsSource(engine, "the-base").newest()
    assert told.engine.status == "starting" and told.engine.num_restarts == told.kv.blocks == told.kv.used_ratio == 0


def test_a_base_head_is_told_of_with_what_is_wrong_with_it(engine):
    head = LookaheadInfo(None, 0, "it was trained with another base model")
    engine.known_info = msgspec.structs.replace(engine.known_info, base_head=head)
    told = StatsSource(engine, "the-base").newest().speculation.base_head
    assert (told.draft_len, told.error) == (None, head.error)


async def test_a_caller_sees_the_adapters_that_are_for_it(feed, engine, monkeypatch):
    engine.stats = EngineStats(
        *range(14), drafts_by_adapter=[*DRAFTS, *DRAFTS], requests_by_adapter=[AdapterRequests("red-2", 3, 4)]
    )
    seen = {}
    for adapters in ((), ("red-*",), ("green",)):
        async with aclosing(feed.listen(caller_for(*adapters))) as listener:
            seen[adapters] = decoded(await anext(listener)).speculation
    names = {adapters: [entry.model for entry in told.by_adapter] for adapters, told in seen.items()}
    assert names == {
        (): ["blue", "red-2", "red-1", "the-base"],
        ("red-*",): ["red-2", "red-1", "the-base"],
        ("green",): ["the-base"],
    }
    entry = seen["red-*",].by_adapter[0]  # two versions of one name
    assert (entry.generated, entry.drafted, entry.accepted, entry.row_price) == (40, 80, 40, 0.5)
    assert (entry.running, entry.waiting) == (3, 4)
    assert (entry.drafted_per_pos, entry.accepted_per_pos) == ([40, 40], [30, 10])
    monkeypatch.setattr(snapshot_module, "MAX_MODELS", 2)
    async with aclosing(feed.listen(None)) as listener:
        told = decoded(await anext(listener)).speculation
    assert [entry.model for entry in told.by_adapter] == ["blue", "red-2"] and told.num_others == 2


async def test_equal_files_of_two_tenants_are_shown_to_each_under_a_name_of_its_own(engine):
    alike = {"red-1": {"red-1", "blue", "blue-2"}, "red-2": {"red-2", "blue-3"}}
    feed = StatsFeed(StatsSource(engine, "the-base").newest, lambda name: alike.get(name, ()))
    seen = {}
    for adapters in (("red-*",), ("blue*",), ("blue-3",), ("green",), ()):
        async with aclosing(feed.listen(caller_for(*adapters))) as listener:
            told = decoded(await anext(listener)).speculation.by_adapter
            seen[adapters] = {entry.model: entry.generated for entry in told if entry.model != "the-base"}
    assert seen == {
        ("red-*",): {"red-2": 20, "red-1": 10},
        ("blue*",): {"blue": 30 + 10, "blue-3": 20},
        ("blue-3",): {"blue-3": 20},
        ("green",): {},
        (): {"blue": 30, "red-2": 20, "red-1": 10},
    }


@pytest.fixture
def client(tmp_path, monkeypatch):
    (tmp_path / "plan").write_text("serve")
    monkeypatch.setenv("FAKE_ENGINE_PLAN", str(tmp_path / "plan"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return EngineClient(EngineConfig(model="fake"), command=[sys.executable, str(FIXTURES / "fake_engine.py")])


async def test_a_fault_in_the_stats_leaves_the_engine_alone(client):
    num_tries, is_broken = 0, True

    def newest():
        nonlocal num_tries
        num_tries += 1
        if is_broken:
            raise ZeroDivisionError
        return StatsSource(client, "the-base").newest()

    feed = StatsFeed(newest)
    client.on_snapshot = feed.publish
    async with asyncio.timeout(60), aclosing(feed.listen(None)) as listener:
        waiting = asyncio.ensure_future(anext(listener))
        await asyncio.sleep(0)  # it listens
        await client.start()
        try:
            while client.snapshot[0] is None or num_tries < 3:  # the first, and that of the engine's snapshot
                await asyncio.sleep(0.01)
            is_broken = False
            assert decoded(await waiting).engine.num_restarts == 0 and client.generation == 1
        finally:
            await client.stop()


async def test_a_stream_goes_on_over_a_restart_of_the_engine(client):
    feed = StatsFeed(StatsSource(client, "the-base").newest)
    client.on_snapshot = feed.publish
    await client.start()
    try:
        async with asyncio.timeout(60), aclosing(feed.listen(None)) as listener:
            while (event := decoded(await anext(listener))).requests.waiting != 1:  # the fake's number
                pass
            assert event.engine.num_restarts == 0
            os.kill(client.info.pid, signal.SIGKILL)
            while (event := decoded(await anext(listener))).engine.status != "restarting":
                pass
            assert event.requests.waiting == 0 and event.engine.uptime_s == 0
            while (event := decoded(await anext(listener))).requests.waiting != 1:
                pass
            assert event.engine.status == "running" and event.engine.num_restarts == 1
    finally:
        await client.stop()
