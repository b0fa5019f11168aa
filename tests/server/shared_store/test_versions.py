"""Versions on a machine's disk: brought once, kept while anybody reads them, and shared with its other processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest
from places import ROOT
from test_shared_store import adapter

from specserve.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.server.shared_store import folders as folders_module
from specserve.server.shared_store.store import SharedStore
from specserve.server.shared_store.versions import Versions


@pytest.fixture
def config(tmp_path):
    return ServeConfig(
        shared_store=str(tmp_path / "store"), adapter_cache_dir=str(tmp_path / "cache"), adapter_cache_gib=2500 / 2**30
    )


@pytest.fixture
def pushed(config, tmp_path):
    """Three versions, of which the cache holds two."""
    store = SharedStore(config.shared_store)
    return [store.push(adapter(tmp_path / name, name * 800), name)[0] for name in "abc"]


@pytest.fixture
def versions(config):
    """As two processes have them."""
    return Versions.of(config), Versions.of(config)


async def test_a_version_comes_once_for_all_who_ask_and_is_there_for_other_processes(versions, pushed, monkeypatch):
    num, (mine, other) = [], versions
    fetch = mine.store.fetch
    monkeypatch.setattr(mine.store, "fetch", lambda *args: (num.append(1), time.sleep(0.05), fetch(*args))[-1])

    assert await asyncio.gather(*(read(mine, pushed[0]) for _ in range(8))) == ["a" * 800] * 8 and len(num) == 1
    monkeypatch.setattr(other.store, "fetch", None)  # nobody asks
    assert await read(other, pushed[0]) == "a" * 800


async def read(versions, version):
    async with versions.local(version) as folder:
        return (folder / WEIGHTS_FILE).read_text()


async def test_two_processes_that_want_a_version_at_once_bring_it_once(versions, pushed, monkeypatch):
    """From a slow store, which sends for longer than anybody waits for one that sends nothing."""
    monkeypatch.setattr(folders_module, "STILL_S", 1.0)  # far more than its pauses, also on a busy machine
    began = []

    def slowly(fetch):
        def slow(version, target, max_bytes):
            began.append(version)
            for num in range(12):
                (target / "part").write_bytes(b"x" * num)
                time.sleep(0.1)
            (target / "part").unlink()
            return fetch(version, target, max_bytes)

        return slow

    for one in versions:
        monkeypatch.setattr(one.store, "fetch", slowly(one.store.fetch))
    assert await asyncio.gather(*(read(one, pushed[0]) for one in versions)) == ["a" * 800] * 2
    assert began == [pushed[0]] and not list((versions[0].folders.root / "partial").iterdir())


async def test_who_brings_a_version_and_is_killed_holds_nobody_up(versions, pushed, config):
    mine, _ = versions
    code = (
        "import sys, time; from pathlib import Path; from specserve.server.shared_store.folders import VersionFolders\n"
        "fill = lambda place: ((place / 'half').write_text('x'), print('began', flush=True), time.sleep(60))\n"
        "VersionFolders(Path(sys.argv[1]), 0).make(sys.argv[2], fill)"
    )
    command = [sys.executable, "-c", code, str(mine.folders.root), pushed[0]]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout.readline() == b"began\n"
        waiting = asyncio.create_task(read(mine, pushed[0]))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        process.kill()
    assert await waiting == "a" * 800
    assert "half" not in os.listdir(mine.folders.path(pushed[0]))
    assert not list((mine.folders.root / "partial").iterdir())


async def test_who_brings_a_version_and_hangs_is_not_waited_for(versions, pushed, monkeypatch):
    monkeypatch.setattr(folders_module, "STILL_S", 0.2)
    (mine, other), began, released = versions, threading.Event(), threading.Event()
    fetch = mine.store.fetch
    monkeypatch.setattr(mine.store, "fetch", lambda *args: (began.set(), released.wait(20), fetch(*args))[-1])
    hanging = asyncio.create_task(read(mine, pushed[0]))
    await asyncio.to_thread(began.wait, 20)
    assert await read(other, pushed[0]) == "a" * 800
    released.set()
    assert await hanging == "a" * 800 and not list((mine.folders.root / "partial").iterdir())


async def test_what_somebody_reads_makes_no_room_and_the_rest_does_the_oldest_first(versions, pushed):
    mine, other = versions
    async with other.local(pushed[0]) as held:
        for version in pushed[1:]:
            async with mine.local(version):
                pass
        assert held.is_dir() and mine.folders.path(pushed[2]).is_dir() and not mine.folders.path(pushed[1]).exists()
    async with mine.local(pushed[1]):
        assert not held.exists()


async def test_what_was_left_or_damaged_on_the_disk_is_made_again(versions, pushed, monkeypatch):
    mine, _ = versions
    left = mine.folders.root / "partial" / "left"
    left.mkdir(parents=True)
    async with mine.local(pushed[0]) as folder:
        pass
    assert left.exists()  # somebody may have begun it now
    (folder / WEIGHTS_FILE).write_text("short")
    monkeypatch.setattr(folders_module, "MIN_LEFT_S", 0.0)
    async with mine.local(pushed[0]) as folder:
        assert (folder / WEIGHTS_FILE).read_text() == "a" * 800
    assert list(left.parent.iterdir()) == []


async def test_a_damaged_version_leaves_nothing_and_is_there_when_it_is_mended(versions, pushed, config, tmp_path):
    mine, _ = versions
    path = tmp_path / "store" / "versions" / pushed[0] / WEIGHTS_FILE
    path.write_text("x" * 800)
    with pytest.raises(UserError, match="damaged"):
        async with mine.local(pushed[0]):
            pass
    assert not mine.folders.path(pushed[0]).exists() and not list((mine.folders.root / "partial").iterdir())
    SharedStore(config.shared_store).push(tmp_path / "a", "a")
    async with mine.local(pushed[0]) as folder:
        assert {path.name for path in folder.iterdir()} >= {CONFIG_FILE, WEIGHTS_FILE}


async def test_a_store_that_hangs_is_given_up_and_others_go_on(config, pushed, monkeypatch):
    versions = Versions(SharedStore(config.shared_store), Versions.of(config).folders, 0.1)
    released, fetch = threading.Event(), versions.store.fetch
    monkeypatch.setattr(
        versions.store,
        "fetch",
        lambda version, *args: (version == pushed[0] and released.wait(20), fetch(version, *args))[-1],
    )
    with pytest.raises(UserError, match="has not answered") as info:
        async with versions.local(pushed[0]):
            pass
    assert info.value.status == 504
    versions._timeout_s = 60.0
    async with versions.local(pushed[1]):
        pass
    released.set()
    await versions.stop()


async def test_leaving_while_it_comes_holds_nothing(versions, pushed):
    mine, _ = versions

    async def read():
        async with mine.local(pushed[0]):
            await asyncio.sleep(60)

    before = len(os.listdir("/proc/self/fd"))
    task = asyncio.create_task(read())
    await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with mine.local(pushed[0]):
        pass
    assert len(os.listdir("/proc/self/fd")) <= before + 1
