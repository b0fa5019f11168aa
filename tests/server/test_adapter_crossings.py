"""Loads, unloads, pins, evictions and restarts that cross on their way: server and engine end up knowing the same.

The store is the real one and so is the engine's registry; between them every message waits until the test lets it go.
As in the engine, what its loop says comes in order, and answers to loads, which other threads send, at any time.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_adapter_store import make

from specserve.adapter_files import content_hash
from specserve.adapter_messages import AdapterInfo, AdapterLoaded
from specserve.adapters.registry import AdapterRegistry
from specserve.errors import OverloadedError, UserError
from specserve.server import adapter_loader, adapter_store
from specserve.server.adapter_store import AdapterStore


class Message(SimpleNamespace):
    """To the engine; `future` is set when its answer is delivered."""


class Engine:
    """An `EngineClient` and the engine behind it, which does one thing at a time when it is told to."""

    def __init__(self, max_adapters=9):
        self.max_adapters, self.now = max_adapters, 100.0
        self.generation, self.num_loads = 0, 0
        self.on_adapters_left = lambda placements: None
        self.inbox: list[Message] = []  # to the loop, oldest first
        self.loads: list[Message] = []  # to readers
        self.said: list[tuple[bool, object]] = []  # (by the loop, how it is delivered), oldest first
        self.start()

    def start(self):
        self.generation += 1
        self.registry = AdapterRegistry(self.max_adapters, lambda: self.now)

    # what the store asks for

    async def load_adapter(self, name, path, before=None, *, is_pinned=False, is_prefetch=False, priority=0, mount=0):
        self.num_loads += 1
        message = Message(path=path, before=before, is_pinned=is_pinned, future=asyncio.Future())
        message.room, message.num_waits = None, 0
        self.loads.append(message)
        return await message.future

    async def unload_adapter(self, adapter_hash, placement):
        await self.to_loop(lambda: self.registry.unload(adapter_hash, placement))

    async def pin_adapter(self, adapter_hash, is_pinned, placement):
        await self.to_loop(lambda: self.registry.pin(adapter_hash, is_pinned, placement))

    def prioritize_loads(self, path, priority):
        pass

    def forsake_loads(self, path):
        pass

    async def to_loop(self, work):
        message = Message(work=work, future=asyncio.Future())
        self.inbox.append(message)
        await message.future

    # what the engine does

    def find(self, load):
        """On a reader: it gets room, or what is there already."""
        key = load.before.content_hash if load.before is not None else None
        if load.room is None:
            try:
                load.room = self.registry.ask(1, key)
            except UserError as error:
                self.loads.remove(load)
                self.say(False, load, error)

    def place(self, load):
        """On a reader, when it has its room and has read."""
        self.registry.grant()
        if load.room is None:
            return
        if not load.room.is_granted:
            load.num_waits += 1
            if load.num_waits > 20:
                self.registry.give_back(load.room)
                self.loads.remove(load)
                self.say(False, load, OverloadedError("no room", status=503))
            return
        info = load.before
        if info is None or not load.room.is_held:
            info = AdapterInfo(content_hash(Path(load.path)), 1, 1, [], 1, None)
        adapter = SimpleNamespace(content_hash=info.content_hash)
        placement = self.registry.place(adapter, load.room, is_pinned=load.is_pinned)
        if placement is not None:
            self.loads.remove(load)
            self.say(False, load, AdapterLoaded(0, info, placement))
        elif load.room.is_held:
            load.room = None

    def turn(self):
        """The loop handles a message, if there is one, and says what has left."""
        if self.inbox:
            message = self.inbox.pop(0)
            try:
                message.work()
            except UserError as error:
                self.say(True, message, error)
            else:
                self.say(True, message, None)
        if left := self.registry.take_left():
            self.said.append((True, left))

    def say(self, is_loop, message, answer):
        self.said.append((is_loop, (message, answer)))

    def deliver(self, at=0):
        """What was said as `at`-th of what is on its way; of the loop's, the first."""
        if self.said[at][0]:
            at = [is_loop for is_loop, _ in self.said].index(True)
        _, what = self.said.pop(at)
        if isinstance(what, dict):
            self.on_adapters_left(what)
        elif isinstance(what[1], Exception):
            what[0].future.set_exception(what[1])
        else:
            what[0].future.set_result(what[1])

    def restart(self):
        """Another process serves, which is asked for all that was not answered."""
        unanswered = [what[0] for _, what in self.said if not isinstance(what, dict)]
        self.said.clear()
        self.start()
        self.loads += [message for message in unanswered if hasattr(message, "path")]
        self.inbox = [message for message in unanswered if hasattr(message, "work")] + self.inbox
        for load in self.loads:
            load.room = None

    async def run_dry(self, *tasks):
        """Do all that there is to do, in order, until nothing comes of it."""
        num_idle, num_rounds = 0, 0
        while num_idle < 20:
            num_rounds += 1
            assert num_rounds < 2000, "it has no end"
            self.now += 3.0  # nobody keeps a place for a request that does not come
            num_idle = 0 if self.loads or self.inbox or self.said else num_idle + 1
            for load in list(self.loads):
                self.find(load)
                if load in self.loads:
                    self.place(load)
            self.turn()
            while self.said:
                self.deliver()
            await asyncio.sleep(0)
        assert all(task.done() for task in tasks)


class Disk:
    """A disk that is looked at in one turn of the event loop."""

    def __init__(self, mount_of):
        pass

    async def look(self, name, function, *args):
        await asyncio.sleep(0)
        return function(*args)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(adapter_loader, "SETTLE_S", 0.0)
    monkeypatch.setattr(adapter_store, "Disk", Disk)


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def store(engine, tmp_path):
    return make_store(engine, tmp_path)


def make_store(engine, root):
    store = AdapterStore(engine, str(root), "base-model")
    engine.on_adapters_left = store.adapters_left
    return store


async def begin(work, condition):
    """The task of `work`, which has come as far as `condition`."""
    task = asyncio.create_task(work)
    for _ in range(100):
        if condition():
            return task
        await asyncio.sleep(0)
    raise AssertionError(f"{task} has not come so far")


async def loading(engine, work):
    """A load of `work` that the engine has heard of."""
    num = len(engine.loads)
    return await begin(work, lambda: len(engine.loads) > num), engine.loads[-1]


async def loaded(engine, work):
    task, _ = await loading(engine, work)
    await engine.run_dry(task)
    return (await task).content_hash


def agree(store, engine, names):
    """What the engine holds and keeps is what names mean and what pinned names mean, and the server knows it."""
    held = {name: store._loaded.held(name) for name in names}
    by_name = {name: one.info.content_hash for name, one in held.items() if one is not None}
    assert set(by_name.values()) == set(engine.registry.held())
    pinned = {key for key, one in engine.registry.held().items() if one.is_pinned}
    assert pinned == {key for name, key in by_name.items() if store.is_pinned(name)}
    assert all(engine.registry.is_staying(key) for key in by_name.values()) and not store._loaded._arriving
    return by_name


@pytest.mark.parametrize("order", ["unload first", "load first", "found, then unloaded", "answered, then unloaded"])
@pytest.mark.parametrize("is_pinned", [False, True])
async def test_an_unload_that_crosses_a_load_of_the_same_content(store, engine, tmp_path, order, is_pinned):
    for name in "ab":
        make(tmp_path / name, "one")
    one = await loaded(engine, store.resolve("a"))
    await loaded(engine, store.resolve("b"))
    store.adapters_left(dict.fromkeys([one], store.placement(one)))  # so that it is known by its content
    engine.registry.unload(one)
    await loaded(engine, store.resolve("a"))
    load, message = await loading(engine, (store.pin if is_pinned else store.resolve)("b"))
    num_loads = engine.num_loads
    assert message.before is not None
    if order == "load first":
        engine.find(message)
        engine.place(message)
    elif order == "found, then unloaded":
        engine.find(message)
    elif order == "answered, then unloaded":
        engine.find(message)
        engine.place(message)
        engine.deliver()  # its name is not given yet
    unload = await begin(store.unregister("a"), lambda: engine.inbox or order == "answered, then unloaded")
    engine.turn()
    await engine.run_dry(load, unload)
    assert agree(store, engine, "ab") == {"b": one}
    await asyncio.wait_for(store.resolve("b"), 5)
    assert engine.num_loads == num_loads


async def test_news_of_a_departure_that_comes_behind_the_next_load(engine, tmp_path):
    engine = Engine(max_adapters=1)
    store = make_store(engine, tmp_path)
    for name in "ab":
        make(tmp_path / name, name)
    first = await loaded(engine, store.resolve("a"))
    other, message = await loading(engine, store.resolve("b"))
    engine.now += 3
    engine.find(message)  # a leaves for it
    engine.registry.take_left()  # beside the loop, which has not told of it
    left = {first: store.placement(first)}
    engine.place(message)
    engine.deliver()
    await other
    store.engine_lost(first, store.placement(first))  # a request has heard of it before
    again, message = await loading(engine, store.resolve("a"))
    engine.now += 3
    engine.find(message)
    engine.turn()
    engine.place(message)
    engine.deliver(-1)
    await again
    store.adapters_left(left)  # of the placement before
    await engine.run_dry()
    assert agree(store, engine, "ab") == {"a": first}


async def test_an_adapter_that_has_left_before_its_load_was_heard_of(store, engine, tmp_path):
    make(tmp_path / "a", "one")
    load, message = await loading(engine, store.resolve("a"))
    engine.find(message)
    engine.place(message)
    engine.registry.unload(content_hash(tmp_path / "a"))  # for another one
    engine.turn()
    engine.deliver(1)  # that it left
    engine.deliver()
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.num_loads == 2 and not load.done()  # it has no name that it has not
    await engine.run_dry(load)
    agree(store, engine, "a")


@pytest.mark.parametrize("order", ["unpin first", "load first"])
async def test_an_unpin_that_crosses_a_load_that_pins(store, engine, tmp_path, order):
    for name in "ab":
        make(tmp_path / name, "one")
    one = await loaded(engine, store.pin("a"))
    pin, message = await loading(engine, store.pin("b"))
    if order == "load first":
        engine.find(message)
        engine.place(message)
    unpin = await begin(store.unpin("a"), lambda: engine.inbox)
    engine.turn()
    num_loads = engine.num_loads
    await engine.run_dry(pin, unpin)
    assert agree(store, engine, "ab") == {"a": one, "b": one} and engine.registry.num_pinned == 1
    assert engine.num_loads == num_loads  # nothing had to be mended


@pytest.mark.parametrize("what", ["unload", "unpin"])
async def test_what_an_ended_engine_was_told_does_nothing_to_the_next(store, engine, tmp_path, what):
    for name in "ab":
        make(tmp_path / name, "one")
    one = await loaded(engine, store.pin("a"))
    told = await begin(store.unregister("a") if what == "unload" else store.unpin("a"), lambda: engine.inbox)
    engine.restart()
    load, message = await loading(engine, store.pin("b"))
    engine.find(message)
    engine.place(message)
    engine.deliver()
    for _ in range(20):
        await asyncio.sleep(0)
    num_loads = engine.num_loads
    engine.turn()  # told once more
    await engine.run_dry(load, told)
    assert agree(store, engine, "ab") == {"b": one} and engine.registry.num_pinned == 1
    assert engine.num_loads == num_loads


@pytest.mark.parametrize("seed", range(16))
async def test_whatever_crosses_both_know_the_same_in_the_end(tmp_path, seed):
    rng = random.Random(seed)
    engine = Engine(max_adapters=rng.choice((2, 9)))
    store = make_store(engine, tmp_path)
    names = "abcde"
    contents = {name: rng.choice("xyz") for name in names}
    for name, text in contents.items():
        make(tmp_path / name, text)
    tasks: list[asyncio.Task] = []

    def change(name):
        contents[name] = rng.choice("xyz")
        make(tmp_path / name, contents[name])

    def restart():
        engine.restart()
        store.engine_started()

    users = (store.resolve, store.resolve, store.pin, store.unpin, store.prefetch, store.unregister, register(store))
    for _ in range(400):
        kind = rng.random()
        if kind < 0.3 and len(tasks) < 12:
            tasks.append(asyncio.create_task(rng.choice(users)(rng.choice(names))))
        elif kind < 0.32:
            change(rng.choice(names))
        elif kind < 0.325:
            restart()
        elif kind < 0.5 and engine.loads:
            engine.find(rng.choice(engine.loads))
        elif kind < 0.65 and engine.loads:
            engine.place(rng.choice(engine.loads))
        elif kind < 0.75:
            engine.turn()
        elif kind < 0.95 and engine.said:
            engine.deliver(rng.randrange(len(engine.said)))
        engine.now += rng.choice((0.0, 0.1, 3.0))
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        tasks = [task for task in tasks if not task.done() or not is_understood(task)]
    await engine.run_dry(*tasks)
    assert all(map(is_understood, tasks))
    agree(store, engine, names)
    before, num_loads = {name: store._loaded.held(name) for name in names}, engine.num_loads
    for name, loaded in before.items():
        if loaded is not None and store._names.look_up(name)[1] == loaded.stamp:
            assert (await asyncio.wait_for(store.resolve(name), 5)).content_hash == loaded.info.content_hash
            assert loaded.info.content_hash == content_hash(tmp_path / name)
    assert engine.num_loads == num_loads


def register(store):
    return lambda name: store.register(name, name)


def is_understood(task):
    """Whether it has ended well, or with an error that its user may see."""
    error = task.exception()
    assert error is None or (isinstance(error, UserError) and error.status in (404, 409, 503)), error
    return True
