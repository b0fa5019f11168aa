"""Names of a server follow the shared store while requests run: the old version or the new one, never a mixture."""

from __future__ import annotations

import asyncio
import logging
import shutil

import pytest
from test_adapter_store import FakeEngine, make, quick  # noqa: F401, a fixture
from test_shared_store import adapter

from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.server.adapter_store import AdapterStore
from specserve.server.app import adapter_roots
from specserve.server.shared_store import follower
from specserve.server.shared_store.names import SharedNames
from specserve.server.shared_store.store import SharedStore
from specserve.server.shared_store.versions import Versions

REFRESH_S = 0.02


@pytest.fixture
def shared(tmp_path):
    """Where others push."""
    return SharedStore(str(tmp_path / "store"))


@pytest.fixture
def push(shared, tmp_path):
    """Push these weights under a name; their content hash."""

    def push(name, weights, **texts):
        path = tmp_path / "pushed"
        shutil.rmtree(path, ignore_errors=True)
        return shared.version(shared.push(adapter(path, weights, **texts), name)[0]).content_hash

    return push


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def config(tmp_path):
    (tmp_path / "adapters").mkdir()
    return ServeConfig(
        shared_store=str(tmp_path / "store"),
        adapter_cache_dir=str(tmp_path / "cache"),
        adapters_dir=str(tmp_path / "adapters"),
    )


@pytest.fixture
def versions(config):
    return Versions.of(config)


@pytest.fixture
def store(engine, versions, config):
    roots = adapter_roots(config, None)
    return AdapterStore(engine, config.adapters_dir, "base", roots=roots, shared=SharedNames(versions, REFRESH_S))


async def resolved(store, name="a"):
    return (await store.resolve(name)).content_hash


async def until(store, content_hash, name="a"):
    async with asyncio.timeout(20):
        while await resolved(store, name) != content_hash:
            await asyncio.sleep(0.005)


async def test_a_name_means_what_was_pushed_last_and_its_old_version_until_that_is_loaded(store, engine, push):
    old = push("a", "old")
    assert await resolved(store) == old and store.names() == ["a"]
    loading, go_on = asyncio.Event(), asyncio.Event()

    async def wait(*_):
        loading.set()
        await go_on.wait()

    engine.during = wait
    new = push("a", "new")
    async with asyncio.timeout(20):
        while not loading.is_set():
            assert await resolved(store) == old
            await asyncio.sleep(0.005)
    assert await asyncio.gather(*(resolved(store) for _ in range(20))) == [old] * 20
    go_on.set()
    await until(store, new)
    assert await asyncio.gather(*(resolved(store) for _ in range(20))) == [new] * 20
    assert engine.held == {new} and engine.num_loads == 2


async def test_changes_while_requests_come_are_seen_in_order(store, push):
    hashes = [push("a", "0")]
    seen, done = [], asyncio.Event()

    async def ask():
        while not done.is_set():
            seen.append(await resolved(store))
            await asyncio.sleep(0.001)

    asking = asyncio.create_task(ask())
    for idx in range(1, 5):
        hashes.append(await asyncio.to_thread(push, "a", str(idx)))
        await asyncio.sleep(0.03)
    await until(store, hashes[-1])
    done.set()
    await asking
    places = [hashes.index(content_hash) for content_hash in seen]
    assert places == sorted(places)


async def test_an_idle_name_waits_for_the_new_version(store, engine, push):
    old, new = push("a", "old"), None
    assert await resolved(store) == old
    store.adapters_left(engine.let_go(old))
    new = push("a", "new")
    await asyncio.sleep(REFRESH_S)
    assert await resolved(store) == new


async def test_a_version_that_cannot_be_loaded_takes_nothing_from_its_name(store, engine, push, shared, monkeypatch):
    monkeypatch.setattr(follower, "RETRY_S", 60.0)
    good = push("a", "good")
    assert await resolved(store) == good
    push("a", "bad")
    push("b", "bad")
    loads = engine.num_loads
    for _ in range(10):
        assert await resolved(store) == good
        await asyncio.sleep(0.005)
    await asyncio.gather(*store._follower._switches.values(), return_exceptions=True)
    assert engine.num_loads - loads == 1  # and is not tried again with each request
    for _ in range(3):
        with pytest.raises(UserError, match="bad weights"):
            await store.resolve("b")
    mended = push("a", "mended")
    await until(store, mended)
    assert engine.held == {mended}


async def test_a_damaged_version_is_an_error_of_its_name_alone(store, push, shared, tmp_path):
    push("a", "aaaa")
    good = push("b", "bbbb")
    (tmp_path / "store" / "versions" / shared.named("a").version / "adapter_model.safetensors").write_text("aaa")
    with pytest.raises(UserError, match="damaged") as info:
        await store.resolve("a")
    assert info.value.code == "fetch_failed" and await resolved(store, "b") == good


async def test_a_name_that_is_removed_is_unknown_and_comes_back(store, push, shared):
    content = push("a", "one")
    assert await resolved(store) == content
    shared.remove("a")
    await asyncio.sleep(REFRESH_S)
    with pytest.raises(UserError, match="does not exist"):
        await store.resolve("a")
    assert store.names() == []
    assert push("a", "one") == content
    await asyncio.sleep(REFRESH_S)
    assert await resolved(store) == content


async def test_names_that_are_the_servers_own_are_not_the_stores(store, push, tmp_path):
    push("a", "shared")
    push("mine", "shared")
    make(tmp_path / "adapters" / "a", "folder")
    own = await resolved(store)
    given = await store.register("mine", str(make(tmp_path / "adapters" / "other", "given")))
    assert own != push("a", "again") and await resolved(store) == own
    assert await resolved(store, "mine") == given.content_hash
    assert store.names() == ["a", "mine", "other"]


async def test_an_unloaded_name_stays_away_until_it_is_pushed_again(store, engine, push):
    content = push("a", "one")
    push("never-asked-for", "two")
    await resolved(store)
    for name in ("a", "never-asked-for"):
        await store.unregister(name)
        with pytest.raises(UserError, match="does not exist"):
            await store.resolve(name)
        with pytest.raises(UserError, match="does not exist"):
            await store.check_known(name)
    await asyncio.sleep(REFRESH_S)
    assert store.names() == [] and engine.held == set()
    assert push("a", "one") == content
    await asyncio.sleep(REFRESH_S)
    assert await resolved(store) == content and store.names() == ["a"]


async def test_a_store_that_is_away_changes_nothing_for_who_is_known(store, push, versions, monkeypatch, caplog):
    content = push("a", "one")
    push("b", "two")
    await resolved(store)
    monkeypatch.setattr(versions.store.files._fs, "info", _fail)
    monkeypatch.setattr(versions.store.files._fs, "ls", _fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            await asyncio.sleep(REFRESH_S)
            assert await resolved(store) == content
    assert "could not be looked up" in caplog.text
    with pytest.raises(UserError, match="does not answer") as info:
        await store.resolve("b")
    assert info.value.status == 503


def _fail(*_, **__):
    raise ConnectionError


async def test_an_adapter_that_left_the_engine_and_the_disk_is_brought_again(store, engine, push, versions):
    content = push("a", "one", **{"tokenizer_config.json": "{}"})
    await resolved(store)
    shutil.rmtree(versions.folders.root)
    assert await resolved(store) == content and engine.num_loads == 1  # the engine has it
    info, files = await store.resolve_with_texts("a", ())
    assert files == {"tokenizer_config.json": b"{}"} and info.text_hash is not None
    shutil.rmtree(versions.folders.root)
    store.adapters_left(engine.let_go(content))
    assert await resolved(store) == content and engine.num_loads == 2


async def test_a_pinned_name_keeps_what_it_means(store, engine, push):
    push("a", "one")
    first = await store.pin("a")
    assert engine.pinned == {first.content_hash}
    second = push("a", "two")
    await until(store, second)
    assert engine.pinned == {second}
    for wrong in ("nowhere", "../x"):
        with pytest.raises(UserError):
            await store.check_known(wrong)
