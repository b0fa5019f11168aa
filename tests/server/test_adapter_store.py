"""Names of adapters while directories, loads and names change: against an engine that reads as the real one does."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import time
from pathlib import Path

import pytest

from specserve import adapter_files
from specserve.adapter_files import CONFIG_FILE, WEIGHTS_FILE, ChangingError, content_hash, open_adapter
from specserve.adapter_messages import AdapterInfo, AdapterLoaded
from specserve.errors import NO_IDLE_ROOM, AdapterError, OverloadedError, UserError
from specserve.server import adapter_loader, adapter_names, adapter_store
from specserve.server.adapter_store import AdapterStore


class FakeEngine:
    """Reads what the engine reads; `during` runs in the middle of a load."""

    def __init__(self):
        self.generation = 1
        self.num_loads = 0
        self.befores: list[str | None] = []  # what the store said was there
        self.held: set[str] = set()
        self.infos: dict[str, AdapterInfo] = {}
        self.pinned: set[str] = set()
        self.placements = itertools.count(1)
        self.priorities: list[int] = []  # of loads, and what they were raised to
        self.forsaken: list[str] = []
        self.is_full = False  # of adapters in use
        self.during = None

    async def load_adapter(
        self, name, path, before=None, *, is_pinned=False, is_prefetch=False, priority=0, mount=0
    ) -> AdapterLoaded:
        self.num_loads += 1
        self.priorities.append(priority)
        self.befores.append(before and before.content_hash)
        if is_prefetch and self.is_full:
            raise OverloadedError("no idle adapter makes room", code=NO_IDLE_ROOM)
        if before is not None and before.content_hash in self.held:
            return self.loaded(self.infos[before.content_hash])  # whichever directory it came from
        with open_adapter(Path(path), name) as files:
            if WEIGHTS_FILE not in files.paths:
                raise AdapterError(f"adapter {name!r} has no {WEIGHTS_FILE}")
            text = files.paths[WEIGHTS_FILE].read_bytes()
            info = AdapterInfo(files.content_hash, 1, 1, [], len(text), files.text_hash)
        if self.during is not None:
            await self.during(name, path)
        if text == b"bad":
            raise AdapterError("bad weights")
        self.held.add(info.content_hash)
        self.infos.setdefault(info.content_hash, info)
        if is_pinned:
            self.pinned.add(info.content_hash)
        return self.loaded(info)

    def loaded(self, info) -> AdapterLoaded:
        return AdapterLoaded(0, info, next(self.placements))

    def let_go(self, *hashes: str) -> dict[str, int]:
        """What it says of contents that have left, for others or by name."""
        self.held -= set(hashes)
        self.pinned -= set(hashes)
        return dict.fromkeys(hashes, next(self.placements))

    def prioritize_loads(self, path: str, priority: int) -> None:
        self.priorities.append(priority)

    def forsake_loads(self, path: str) -> None:
        self.forsaken.append(path)

    async def unload_adapter(self, adapter_hash: str, placement: int) -> None:
        self.held.discard(adapter_hash)
        self.pinned.discard(adapter_hash)

    async def pin_adapter(self, adapter_hash: str, is_pinned: bool, placement: int) -> None:
        if is_pinned and adapter_hash not in self.held:
            raise UserError("not loaded", code="adapter_not_resident")
        (self.pinned.add if is_pinned else self.pinned.discard)(adapter_hash)


def make(path: Path, weights: str) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in ((CONFIG_FILE, "{}"), (WEIGHTS_FILE, weights)):
        (path / "new").write_text(text)
        os.replace(path / "new", path / name)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(adapter_loader, "SETTLE_S", 0.05)
    monkeypatch.setattr(adapter_files, "PAUSE_S", 0.01)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "adapters"
    root.mkdir()
    return root


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def store(engine, root):
    return AdapterStore(engine, str(root), "base-model")


async def test_weights_replaced_during_a_load_are_what_the_name_means_afterwards(store, engine, root):
    path = make(root / "a", "old")

    async def replace(name, directory):
        engine.during = None
        make(path, "new")

    engine.during = replace
    info = await store.resolve("a")
    assert info.content_hash == content_hash(path)
    assert engine.num_loads == 2 and engine.held == {info.content_hash}


async def test_a_folder_that_was_unloaded_and_made_anew_says_how_it_is_served_again(store, engine, root):
    make(root / "a", "old")
    await store.resolve("a")
    await store.unregister("a")
    shutil.rmtree(root / "a")
    path = make(root / "a", "new")
    with pytest.raises(UserError, match="'a' was unloaded, .* /v1/load_lora_adapter loads it again") as found:
        await store.resolve("a")
    assert found.value.status == 404 and found.value.code == "model_not_found" and "a" not in store.names()
    await store.register("a", "a")
    assert (await store.resolve("a")).content_hash == content_hash(path)


async def test_a_request_that_comes_after_a_change_does_not_get_what_an_earlier_load_read(store, engine, root):
    path = make(root / "a", "old")
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def wait(name, directory):
        reading.set()
        await go_on.wait()

    engine.during = wait
    first = asyncio.create_task(store.resolve("a"))
    await reading.wait()
    make(path, "new")
    second = asyncio.create_task(store.resolve("a"))
    await asyncio.sleep(0.02)
    engine.during = None
    go_on.set()
    assert (await second).content_hash == content_hash(path) == (await first).content_hash


async def test_a_file_that_is_still_written_is_not_served_before_it_is_complete(store, engine, root, monkeypatch):
    monkeypatch.setattr(adapter_loader, "SETTLE_S", 1.5)  # far more than a writer's pause, also on a busy machine
    path = make(root / "a", "0" * 64)

    async def fill():
        for idx in range(8):
            with open(path / WEIGHTS_FILE, "r+b") as file:
                file.seek(8 * idx)
                file.write(b"1" * 8)
            await asyncio.sleep(0.02)

    filling = asyncio.create_task(fill())
    info = await store.resolve("a")
    assert filling.done() and info.content_hash == content_hash(path)
    assert engine.held == {info.content_hash}


async def test_files_that_go_on_changing_are_refused_until_they_are_complete(store, engine, root, monkeypatch):
    monkeypatch.setattr(adapter_loader, "MAX_CHANGES", 3)
    path = make(root / "a", "0")
    num = iter(range(100))

    async def change(name, directory):
        make(path, str(next(num)))

    engine.during = change
    with pytest.raises(ChangingError, match="changes while it is read"):
        await store.resolve("a")
    assert not engine.held
    engine.during = None
    assert (await store.resolve("a")).content_hash == content_hash(path)


async def test_a_load_that_takes_long_is_no_change(store, engine, root, monkeypatch):
    """However long an engine is away, or the server itself: files that stood still are served."""
    make(root / "a", "one")
    clock = time.time, time.monotonic

    async def away(name, directory):
        engine.generation += 1  # the load was asked for again of the next engine
        for name, real in zip(("time", "monotonic"), clock, strict=True):
            monkeypatch.setattr(time, name, lambda real=real: real() + 3600)

    engine.during = away
    assert (await store.resolve("a")).content_hash in engine.held
    assert engine.num_loads == 1


async def test_other_content_of_the_same_size_times_and_inode_is_noticed(store, root):
    path = make(root / "a", "one")
    before = (await store.resolve("a")).content_hash
    status = os.stat(path / WEIGHTS_FILE)
    await asyncio.sleep(0.02)  # file systems' clocks are coarse
    (path / WEIGHTS_FILE).write_text("two")
    os.utime(path / WEIGHTS_FILE, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (await store.resolve("a")).content_hash == content_hash(path) != before


async def test_an_explicit_load_reads_again_though_nothing_seems_to_have_changed(store, engine, root):
    make(root / "a", "one")
    await store.register("a", "a")
    await store.resolve("a")
    assert engine.num_loads == 1
    await store.register("a", "a")
    assert engine.num_loads == 2


async def test_load_inplace_replaces_when_the_load_has_ended_and_keeps_the_old_one_when_it_fails(store, engine, root):
    one, two, bad = make(root / ".one", "one"), make(root / ".two", "two"), make(root / ".bad", "bad")
    await store.register("n", str(one))
    with pytest.raises(UserError, match="load_inplace=true") as refused:
        await store.register("n", str(two))
    assert refused.value.status == 409
    seen = []

    async def ask(name, directory):
        if directory == str(two):
            seen.append((await store.resolve("n")).content_hash)

    engine.during = ask
    assert (await store.register("n", str(two), replace=True)).content_hash == content_hash(two)
    assert seen == [content_hash(one)]
    assert (await store.resolve("n")).content_hash == content_hash(two) and engine.held == {content_hash(two)}
    with pytest.raises(AdapterError, match="bad weights"):
        await store.register("n", str(bad), replace=True)
    assert (await store.resolve("n")).content_hash == content_hash(two)


def hold_reads_of(path, engine):
    """Reads of that directory set the first event, and go on with the second."""
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def wait(name, directory):
        if directory == str(path):
            reading.set()
            await go_on.wait()

    engine.during = wait
    return reading, go_on


@pytest.mark.parametrize("weights", ["bad", "slow"])
async def test_a_load_that_ends_late_takes_nothing_from_a_newer_one_of_its_name(store, engine, root, weights):
    old, good = make(root / ".old", weights), make(root / ".good", "good")
    reading, go_on = hold_reads_of(old, engine)
    late = asyncio.create_task(store.register("n", str(old)))
    await reading.wait()
    await store.unregister("n")
    await store.register("n", str(good))
    go_on.set()
    with pytest.raises(UserError):
        await late
    assert (await store.resolve("n")).content_hash == content_hash(good) and store.names() == ["n"]
    assert engine.held == {content_hash(good)}


async def test_two_loads_of_one_directory_under_one_name_succeed_in_whatever_order_they_end(store, engine, root):
    path = make(root / ".one", "one")
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def wait(name, directory):
        engine.during = None
        reading.set()
        await go_on.wait()

    engine.during = wait
    first = asyncio.create_task(store.register("n", str(path)))
    await reading.wait()
    second = await store.register("n", str(path))
    go_on.set()
    assert await first == second and store.names() == ["n"] and engine.held == {second.content_hash}


async def test_a_load_has_its_name_again_when_the_one_that_took_it_fails(store, engine, root):
    slow, bad = make(root / ".slow", "slow"), make(root / ".bad", "bad")
    reading, go_on = hold_reads_of(slow, engine)
    first = asyncio.create_task(store.register("n", str(slow)))
    await reading.wait()
    with pytest.raises(AdapterError, match="bad weights"):
        await store.register("n", str(bad), replace=True)
    assert store.given_directories() == {slow}
    go_on.set()
    assert (await first).content_hash == content_hash(slow) == (await store.resolve("n")).content_hash
    assert store.given_directories() == {slow}


async def test_a_folder_that_cannot_be_looked_into_hides_no_other(store, root, monkeypatch):
    for name in ("a", "b"):
        make(root / name, name)
    exists = Path.exists

    def refused(path):
        if path.parent == root / "b":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refused)
    assert "a" in store.names()
    await store.unregister("a")
    with pytest.raises(UserError, match="was unloaded"):
        store.path("a")


async def test_a_client_that_leaves_during_its_load_leaves_no_adapter_without_a_name(store, engine, root):
    path = make(root / ".one", "one")
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def wait(name, directory):
        reading.set()
        await go_on.wait()

    engine.during = wait
    load = asyncio.create_task(store.register("n", str(path)))
    await reading.wait()
    load.cancel()
    go_on.set()
    async with asyncio.timeout(60):
        while store.names() != ["n"]:
            await asyncio.sleep(0.01)
    await store.resolve("n")  # when the load has ended
    assert store.names() == ["n"] and engine.num_loads == 1
    await store.unregister("n")
    assert not engine.held


async def test_the_base_models_name_and_names_that_cannot_be_asked_for(store, engine, root, caplog):
    make(root / "base-model", "one"), make(root / "two words", "two"), make(root / ".hidden", "three")
    make(root / "good", "four")
    with caplog.at_level(logging.WARNING):
        assert store.names() == ["good"] and store.names() == ["good"]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2 and any("base model's name" in text for text in warned)
    assert any("two words" in text for text in warned)
    with pytest.raises(UserError, match="does not exist"):
        store.path("base-model")
    with pytest.raises(UserError, match="base model's name") as refused:
        await store.register("base-model", "good")
    assert refused.value.status == 409 and engine.num_loads == 0


async def test_a_folder_that_goes_away_during_its_load_is_the_users_error(store, engine, root):
    path = make(root / "a", "one")
    real = engine.load_adapter

    async def gone(name, directory, before, **how):
        shutil.rmtree(path, ignore_errors=True)
        return await real(name, directory, before, **how)

    engine.load_adapter = gone
    with pytest.raises(UserError) as failed:
        await store.resolve("a")
    assert failed.value.status in (400, 404)
    with pytest.raises(UserError) as failed:
        await store.resolve("a")
    assert failed.value.status == 404


async def test_a_load_whose_disk_goes_away_at_its_end_leaves_nothing_without_a_name(store, engine, root, monkeypatch):
    make(root / "a", "one")

    def away(*args):
        raise OverloadedError("the disk has not answered", status=503)

    async def go(name, directory):
        monkeypatch.setattr(adapter_names, "stamp_of", away)

    engine.during = go
    with pytest.raises(OverloadedError, match="has not answered"):
        await store.resolve("a")
    assert engine.num_loads == 1 and not engine.held and not store.loading()


async def test_links_that_lead_back_to_themselves_are_the_users_error(store, root):
    make(root / "a", "one")
    (root / "a" / "loop").symlink_to(root / "a" / "loop")
    (root / "b").symlink_to(root / "b")
    for name, statuses in (("a", {400}), ("b", {400, 404})):
        with pytest.raises(UserError) as failed:
            await store.resolve(name)
        assert failed.value.status in statuses
        with pytest.raises(UserError) as failed:
            await store.register("fresh", name + "/loop")
        assert failed.value.status == 400


async def test_an_edited_chat_template_and_equal_weights_with_another_one(store, root):
    texts = {}
    for name in ("a", "b"):
        make(root / name, "one")
        (root / name / "chat_template.jinja").write_text(name)
        info, texts[name] = await store.resolve_with_texts(name, ())
        assert info.content_hash == content_hash(root / "a")
    assert texts == {name: {"chat_template.jinja": name.encode()} for name in ("a", "b")}
    (root / "a" / "chat_template.jinja").write_text("edited")
    info, files = await store.resolve_with_texts("a", ())
    assert files == {"chat_template.jinja": b"edited"}
    assert (await store.resolve_with_texts("a", {info.text_hash}))[1] is None


async def test_texts_that_are_never_those_that_were_loaded_are_refused_in_the_end(store, root, monkeypatch):
    make(root / "a", "one")
    (root / "a" / "chat_template.jinja").write_text("one")
    monkeypatch.setattr(adapter_store, "read_texts", lambda *args: ("another", {}))  # its times do not tell
    with pytest.raises(adapter_files.ChangingError):
        await asyncio.wait_for(store.resolve_with_texts("a", ()), 60)


async def test_an_adapter_that_the_engine_let_go_is_loaded_again_unless_that_is_old_news(store, engine, root):
    make(root / "a", "one")
    info = await store.resolve("a")
    store.engine_lost("of an older content", 1)
    store.engine_lost(info.content_hash, 0)  # that a request heard of, which was sent before the load had ended
    assert await store.resolve("a") == info and engine.num_loads == 1
    store.engine_lost(info.content_hash, store.placement(info.content_hash))
    assert await store.resolve("a") == info and engine.num_loads == 2


async def test_names_that_a_former_engine_knew_hold_nothing_of_the_new_one(store, engine, root):
    one, other = make(root / "a", "one"), make(root / "b", "one")
    await store.resolve("a")
    await store.resolve("b")
    engine.generation, engine.held = 2, set()
    await store.resolve("a")
    make(one, "two")
    two = await store.resolve("a")
    assert engine.held == {two.content_hash}  # nobody asked for b since
    assert (await store.resolve("b")).content_hash == content_hash(other) and len(engine.held) == 2


async def test_a_link_that_is_switched_means_the_new_content_by_whatever_name(store, root):
    def switch(version):
        (root / "link.new").symlink_to(f".store/{version}")
        os.replace(root / "link.new", root / "link")

    (root / ".store").mkdir()
    hashes = {version: content_hash(make(root / ".store" / version, version)) for version in ("one", "two")}
    switch("one")
    await store.register("link", "link")  # its own name: it is what the name means already
    await store.register("other", str(root / "link"))
    for version in ("two", "one"):
        switch(version)
        assert [(await store.resolve(name)).content_hash for name in ("link", "other")] == [hashes[version]] * 2
        await store.register("other", "link")


async def test_files_of_a_registered_adapter_that_are_links_out_of_the_folder(store, root, tmp_path):
    secret = make(tmp_path / "elsewhere", "secret")
    make(root / "a", "one")
    await store.register("fresh", "a")
    (root / "a" / WEIGHTS_FILE).unlink()
    (root / "a" / WEIGHTS_FILE).symlink_to(secret / WEIGHTS_FILE)
    with pytest.raises(UserError, match="leaves the adapters folder"):
        await store.resolve("fresh")
    with pytest.raises(UserError, match="leaves the adapters folder"):
        await store.register("another", "a")
    shutil.rmtree(root / "a")
    await store.unregister("fresh")  # a name whose directory has gone can be taken away


async def test_a_process_that_is_out_of_handles_does_not_blame_the_adapter(store, root, monkeypatch):
    def out_of_handles(*args, **options):
        raise OSError(24, "Too many open files")

    make(root / "a", "one")
    for where, name in ((os, "open"), (Path, "iterdir")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, out_of_handles)
            with pytest.raises(UserError, match="Too many open files") as failed:
                await store.resolve("a")
        assert (failed.value.status, failed.value.code) == (503, "overloaded")


async def test_what_the_engine_let_go_of_is_asked_for_by_its_content_unless_files_changed(store, engine, root):
    path = make(root / "a", "one")
    one = await store.resolve("a")
    store.adapters_left(engine.let_go(one.content_hash, "unknown"))
    assert store.known("a") == one and await store.resolve("a") == one
    assert engine.befores == [None, one.content_hash]
    make(path, "two")
    store.adapters_left(engine.let_go(one.content_hash))
    assert (await store.resolve("a")).content_hash != one.content_hash and engine.befores[2:] == [None]


async def test_a_pin_follows_its_name_and_goes_with_it(store, engine, root):
    path, other = make(root / "a", "one"), make(root / "b", "one")
    one = (await store.pin("a")).content_hash
    assert engine.pinned == {one} and store.is_pinned("a") and not store.is_pinned("b")
    await store.resolve("b")
    make(path, "two")
    two = (await store.resolve("a")).content_hash
    assert engine.pinned == {two} and engine.held == {one, two}  # b means the old content, and is not pinned
    engine.generation, engine.held, engine.pinned = 2, set(), set()
    store.engine_started()
    while engine.pinned != {two}:
        await asyncio.sleep(0.01)
    make(other, "two")
    await store.resolve("b")
    await store.pin("b")
    await store.unpin("b")
    assert engine.pinned == {two}  # by its other name
    await store.unregister("a")
    assert not engine.pinned and not store.is_pinned("a")
    with pytest.raises(UserError) as unknown:
        await store.pin("a")
    assert unknown.value.status == 404 and not store.is_pinned("a")


async def test_a_pin_that_is_taken_back_or_fails_while_it_loads_leaves_none(store, engine, root):
    make(root / "a", "one")
    loading, go_on = asyncio.Event(), asyncio.Event()

    async def wait(name, path):
        loading.set()
        await go_on.wait()

    async def pin_during_load() -> asyncio.Task:
        loading.clear()
        go_on.clear()
        engine.during = wait
        pin = asyncio.create_task(store.pin("a"))
        await loading.wait()
        return pin

    pin = await pin_during_load()
    await store.unpin("a")
    go_on.set()
    await pin
    assert not engine.pinned and not store.is_pinned("a") and engine.held
    make(root / "a", "two")
    pin = await pin_during_load()
    pin.cancel()  # a client that leaves
    go_on.set()
    await store.resolve("a")
    assert not engine.pinned and not store.is_pinned("a")
    engine.during = None
    two = (await store.pin("a")).content_hash
    make(root / "a", "bad")
    with pytest.raises(UserError, match="bad weights"):
        await store.pin("a")
    make(root / "a", "two")
    await store.resolve("a")
    assert store.is_pinned("a") and engine.pinned == {two}  # as it was before


async def test_a_pin_that_fails_takes_none_from_another_of_its_name(store, engine, root):
    make(root / "a", "one")
    loading, go_on = asyncio.Event(), asyncio.Event()

    async def wait(name, path):
        loading.set()
        await go_on.wait()

    async def pins_during_load() -> list[asyncio.Task]:
        engine.during = wait
        pins = [asyncio.create_task(store.pin("a")) for _ in range(3)]
        await loading.wait()
        while len(store._pins._attempts["a"]) < 3:
            await asyncio.sleep(0.01)
        pins[0].cancel()  # a client that leaves
        await asyncio.wait(pins[:1])
        assert store.is_pinned("a")
        return pins[1:]

    second, third = await pins_during_load()
    third.cancel()
    go_on.set()
    assert engine.pinned == {(await second).content_hash} and store.is_pinned("a")
    await store.unpin("a")
    loading.clear()
    go_on.clear()
    make(root / "a", "bad")
    pins = await pins_during_load()
    go_on.set()
    for pin in pins:
        with pytest.raises(UserError, match="bad weights"):
            await pin
    assert not store.is_pinned("a") and not engine.pinned


async def test_a_pin_of_what_leaves_at_once_loads_it_again(store, engine, root):
    make(root / "a", "one")
    one = await store.resolve("a")
    engine.held.clear()
    assert await store.pin("a") == one and engine.pinned == {one.content_hash} and engine.num_loads == 2


async def test_a_prefetch_begins_a_load_that_requests_join_and_a_full_engine_keeps_none_waiting(store, engine, root):
    make(root / "a", "one")
    assert await store.prefetch("a") is False and store.loading() == {"a": 0}
    await store.resolve("a")
    assert engine.num_loads == 1 and await store.prefetch("a") is True
    make(root / "b", "two")
    engine.is_full = True
    assert await store.prefetch("b") is False
    await store.resolve("b")  # joins it, which is no prefetch any more
    assert engine.num_loads == 2 and not store.loading()
    with pytest.raises(UserError) as unknown:
        await store.prefetch("c")
    assert unknown.value.status == 404


async def test_equal_weights_with_another_template_keep_their_own_when_the_engine_has_them_already(store, engine, root):
    for name in "ab":
        make(root / name, "one")
        (root / name / "chat_template.jinja").write_text(f"I am {name}")
    first = {name: await store.resolve(name) for name in "ab"}
    assert first["a"].content_hash == first["b"].content_hash and first["a"].text_hash != first["b"].text_hash
    store.adapters_left(engine.let_go(first["a"].content_hash))
    assert {name: await store.resolve(name) for name in "ba"} == first
    assert engine.befores[2:] == [first["a"].content_hash] * 2
