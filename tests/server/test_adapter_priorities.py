"""Loads carry the best priority of those who wait for them, and pinned adapters come back behind all requests."""

from __future__ import annotations

import asyncio

import pytest
from test_adapter_store import FakeEngine, make

from specserve.errors import NO_IDLE_ROOM, OverloadedError
from specserve.server import adapter_loader, adapter_store
from specserve.server.adapter_store import AFTER_ALL, AdapterStore


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(adapter_loader, "SETTLE_S", 0.02)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def store(engine, tmp_path):
    return AdapterStore(engine, str(tmp_path), "base-model")


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


async def test_a_load_has_the_priority_of_its_request_and_is_hastened_by_better_ones_alone(store, engine, tmp_path):
    make(tmp_path / "a", "one")
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def wait(name, directory):
        reading.set()
        await go_on.wait()

    engine.during = wait
    requests = [asyncio.create_task(store.resolve("a", 7))]
    await reading.wait()
    for priority in (9, 3, 5, 0):
        num = len(store._disk._looks)
        requests.append(asyncio.create_task(store.resolve("a", priority)))
        await asyncio.sleep(0)
        await until(lambda num=num: len(store._disk._looks) == num)  # it has joined the load
        await asyncio.sleep(0)
    await until(lambda: engine.priorities[-1] == 0)
    go_on.set()
    assert len({info.content_hash for info in await asyncio.gather(*requests)}) == 1
    assert engine.priorities == [7, 3, 0] and engine.num_loads == 1


async def test_a_load_has_the_priority_of_those_who_still_wait_for_it(store, engine, tmp_path):
    folder = make(tmp_path / "a", "one")
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def wait(name, directory):
        reading.set()
        await go_on.wait()

    engine.during = wait
    requests = {}
    for priority in (7, 2, 0, 2):
        requests[len(requests)] = asyncio.create_task(store.resolve("a", priority))
        await until(lambda: sum(len(load.waiting) for load in store._loads._loading.values()) == len(requests))
    await reading.wait()
    assert store.loading() == {"a": 4}
    begun = len(engine.priorities)
    for idx, want in ((1, []), (2, [2]), (3, [2, 7])):
        requests[idx].cancel()
        await asyncio.wait([requests[idx]])
        assert engine.priorities[begun:] == want and not engine.forsaken
        assert store.loading() == {"a": 4 - idx}
    requests[0].cancel()
    await asyncio.wait([requests[0]])
    assert engine.forsaken == [str(folder)]
    go_on.set()
    await until(lambda: not store._loads._loading)
    assert not store._loads._told


async def test_a_load_is_forsaken_when_the_last_request_that_waits_for_it_leaves_and_one_that_comes_then_waits(
    store, engine, tmp_path
):
    folder = make(tmp_path / "a", "one")
    answers = [asyncio.Event() for _ in range(2)]

    async def wait(name, directory):
        await answers[engine.num_loads - 1].wait()
        if engine.num_loads == 1:
            raise OverloadedError("no idle adapter makes room", code=NO_IDLE_ROOM)

    engine.during = wait
    requests = [asyncio.create_task(store.resolve("a")) for _ in range(2)]
    await until(lambda: engine.num_loads == 1 and len(store._loads._loading["a", folder].waiting) == 2)
    for request in requests:
        assert not engine.forsaken
        request.cancel()
        await asyncio.wait([request])
    assert engine.forsaken == [str(folder)]
    late = asyncio.create_task(store.resolve("a"))
    await until(lambda: len(store._loads._loading["a", folder].waiting) == 1)
    answers[0].set()
    await until(lambda: engine.num_loads == 2)
    answers[1].set()
    assert (await late).content_hash in engine.held and engine.forsaken == [str(folder)]


async def test_pinned_adapters_are_back_before_anybody_asks_a_new_engine_and_behind_all_who_do(
    store, engine, tmp_path, monkeypatch
):
    names = [f"{idx}" for idx in range(adapter_store.PINS_AT_ONCE + 3)]
    for name in names:
        make(tmp_path / name, name)
        await store.pin(name)
    await store.unpin("0")
    before, engine.priorities = set(engine.pinned), []
    running, most = 0, 0

    async def count(name, directory):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.01)
        running -= 1

    engine.during = count
    engine.generation, engine.held, engine.pinned = 2, set(), set()
    store.engine_started()
    await until(lambda: engine.pinned == before)
    assert set(engine.priorities) == {AFTER_ALL} and len(engine.priorities) == len(names) - 1
    assert 1 <= most <= adapter_store.PINS_AT_ONCE


async def test_a_pinned_name_whose_content_was_let_go_for_another_name_is_loaded_again_at_once(store, engine, tmp_path):
    for name in "ab":
        make(tmp_path / name, "one")
    content_hash = (await store.pin("a")).content_hash
    await store.resolve("b")
    store.adapters_left(engine.let_go(content_hash))
    await until(lambda: engine.pinned == {content_hash} and store._pin_places._value == adapter_store.PINS_AT_ONCE)
    await store.unpin("a")
    num_loads = engine.num_loads
    store.adapters_left(engine.let_go(content_hash))
    await store.resolve("b")
    assert engine.num_loads == num_loads + 1 and not engine.pinned
