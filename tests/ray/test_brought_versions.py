"""Loads of versions at a replica: fetched here, held until the engine has answered, or an error of their own."""

from __future__ import annotations

import asyncio
import threading

import pytest

from specserve.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from specserve.adapter_messages import AdapterInfo, AdapterLoaded, ForsakeLoads, LoadAdapter, PrioritizeLoads
from specserve.config import ServeConfig
from specserve.messages import CallFailed
from specserve.ray.brought_versions import BroughtVersions
from specserve.ray.wire import VERSION_PATH
from specserve.server.shared_store.store import SharedStore
from specserve.server.shared_store.versions import Versions


@pytest.fixture
def pushed(tmp_path):
    directory = tmp_path / "one"
    directory.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (directory / name).write_text(name)
    return SharedStore(str(tmp_path / "store")).push(directory, "a")[0]


@pytest.fixture
def versions(tmp_path):
    return Versions.of(ServeConfig(shared_store=str(tmp_path / "store"), adapter_cache_dir=str(tmp_path / "cache")))


@pytest.fixture
def brought(versions):
    """With what the engine and the front hear."""
    to_engine, to_front = [], []
    brought = BroughtVersions(versions, to_engine.append, to_front.append)
    yield brought, to_engine, to_front
    brought.drop()


async def until(is_so):
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.002)


async def test_a_load_goes_to_the_engine_with_this_machines_folder_which_stays_until_it_is_answered(
    brought, versions, pushed
):
    brought, to_engine, _ = brought
    assert brought.take(LoadAdapter(5, "a", VERSION_PATH + pushed))
    assert not brought.take(LoadAdapter(6, "b", "/elsewhere")) and to_engine == []
    await until(lambda: to_engine)
    folder = versions.folders.path(pushed)
    assert to_engine == [LoadAdapter(5, "a", str(folder))] and (folder / WEIGHTS_FILE).read_text() == WEIGHTS_FILE
    versions.folders.max_bytes = 0
    versions.folders.make_room()
    assert folder.exists()
    brought.heard(AdapterLoaded(5, AdapterInfo("x", 4, 1, [], 1, None), 1))
    await until(lambda: not brought._bringing)
    versions.folders.make_room()
    assert not folder.exists()


async def test_what_cannot_be_fetched_is_answered_in_the_engines_stead(brought, versions, pushed, tmp_path):
    brought, to_engine, to_front = brought
    (tmp_path / "store" / "versions" / pushed / WEIGHTS_FILE).write_text("short")
    brought.take(LoadAdapter(5, "a", VERSION_PATH + pushed))
    brought.take(LoadAdapter(6, "b", VERSION_PATH + "0" * 64))
    await until(lambda: len(to_front) == 2)
    assert {answer.call_id: answer.error.code for answer in to_front} == {5: "fetch_failed", 6: "fetch_failed"}
    assert all(isinstance(answer, CallFailed) for answer in to_front) and to_engine == []
    assert "damaged" in next(answer.error.message for answer in to_front if answer.call_id == 5)


async def test_who_waits_is_the_newest_word_when_the_files_are_there_and_a_front_that_leaves_leaves_nothing(
    brought, versions, pushed, monkeypatch
):
    brought, to_engine, to_front = brought
    go_on, fetch = threading.Event(), versions.store.fetch
    monkeypatch.setattr(versions.store, "fetch", lambda *args: (go_on.wait(60), fetch(*args))[-1])
    path = VERSION_PATH + pushed
    for call_id in (5, 6):
        brought.take(LoadAdapter(call_id, "a", path, priority=3))
    assert brought.take(PrioritizeLoads(path, -2))
    here = str(versions.folders.path(pushed))
    assert to_engine == [PrioritizeLoads(here, -2)]
    go_on.set()
    await until(lambda: len(to_engine) == 3)
    assert {(load.call_id, load.priority, load.is_prefetch) for load in to_engine[1:]} == {
        (5, -2, False),
        (6, -2, False),
    }
    assert brought.take(ForsakeLoads(path)) and to_engine[-1] == ForsakeLoads(here)
    brought.drop()
    await asyncio.sleep(0.01)
    versions.folders.max_bytes = 0
    versions.folders.make_room()
    assert not versions.folders.path(pushed).exists() and to_front == []
