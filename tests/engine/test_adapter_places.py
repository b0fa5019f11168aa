"""Adapters on their way into the engine: in order, bounded, and nothing stays reserved for what did not come."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from stopped_clock import Clock
from waiting import wait_until

from specserve.adapter_messages import AdapterLoaded, LoadAdapter
from specserve.adapters import residency
from specserve.adapters.registry import AdapterRegistry
from specserve.engine import adapter_loads
from specserve.engine.adapter_loads import AdapterLoads
from specserve.engine.adapter_memory import AdapterMemory
from specserve.errors import NO_IDLE_ROOM, AdapterError
from specserve.messages import CallFailed

SIZE = 10


class Threads:
    """A pool whose work is done when the test says so."""

    def __init__(self):
        self.work = []

    def submit(self, work, mount):
        self.work.append((Future(), work))
        return self.work[-1][0]

    def look(self):
        pass

    def num_stuck(self, mount=None):
        return 0

    def is_held_back(self, mount):
        return False

    def run(self, num=1):
        for future, work in [self.work.pop(0) for _ in range(min(num, len(self.work)))]:
            assert future.set_running_or_notify_cancel()
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)


class Engine:
    """An engine for two adapters whose files are their names; `host` bytes beside its device."""

    def __init__(self, host_bytes=None):
        self.clock, self.reads, self.uploads, self.pinned = Clock(), [], [], []
        self.most_copies = 0  # in main memory beside the device while one is read
        self.registry = AdapterRegistry(2, self.clock, max_bytes=3 * SIZE)
        host = AdapterRegistry(99, self.clock, max_bytes=host_bytes) if host_bytes else None
        self.memory = AdapterMemory(self.registry, self.read, lambda path: SIZE, host, self.upload)
        self.answers = []
        self.adapters = SimpleNamespace(memory=self.memory, place=self.into_room, forget_left=self.registry.take_left)
        self.loads = AdapterLoads(self.adapters, lambda: None, self.answers.append, self.clock)
        self.readers = self.loads._readers
        self.threads = self.loads._readers = Threads()
        self.size = {}

    def read(self, name, path):
        self.reads.append(name)
        if self.memory.host is not None:
            self.most_copies = max(self.most_copies, len(self.memory.host.adapters))
        if name.startswith("bad"):
            raise AdapterError("bad weights")
        if name.startswith("bug"):
            raise ZeroDivisionError
        content_hash = name[0]
        return SimpleNamespace(
            content_hash=content_hash, num_bytes=self.size.get(name, SIZE), info=lambda: content_hash
        )

    def upload(self, adapter):
        self.uploads.append(adapter.content_hash)
        return adapter

    def into_room(self, brought, is_pinned):
        return self.registry.place(brought.adapter, brought.reservation, brought.load_s, is_pinned=is_pinned)

    def load(self, name, **fields):
        assert self.loads.submit(LoadAdapter(name, name, **{"path": "/x", **fields})) == []

    def place(self):
        """Call ids of loads that have ended well, and the errors of others."""
        placed = self.loads.place()
        answers = [self.answers.pop(0) for _ in self.answers[:]] + placed  # threads may go on saying something
        self.registry.take_left()
        failed = {answer.call_id: answer.error for answer in answers if isinstance(answer, CallFailed)}
        return [answer.call_id for answer in answers if isinstance(answer, AdapterLoaded)], failed

    def bring(self, name, **fields):
        self.load(name, **fields)
        for _ in range(3):
            self.threads.run()
            if done := self.place()[0]:
                assert done == [name]
                return
        raise AssertionError(name)

    def fill(self):
        for name in "ab":
            self.bring(name)
            self.registry.acquire(name)
        self.clock.now += residency.STAY_S


@pytest.fixture
def engine():
    return Engine()


def test_loads_get_room_in_order_and_what_waits_is_not_read_yet(engine):
    engine.fill()
    for name in "cde":
        engine.load(name)
    engine.threads.run(3)
    assert engine.place() == ([], {}) and engine.loads.is_waiting and engine.reads == ["a", "b"]
    engine.registry.release("a")
    assert engine.place() == ([], {}) and len(engine.threads.work) == 1
    engine.threads.run()
    assert engine.place() == (["c"], {}) and engine.reads == ["a", "b", "c"]
    engine.registry.acquire("c")
    engine.registry.release("b")
    engine.place()
    engine.threads.run()
    assert engine.place() == (["d"], {}) and set(engine.registry.adapters) == {"c", "d"}


def test_while_others_get_room_no_wait_is_too_long_and_then_it_is(engine):
    engine.fill()
    for name in "cd":
        engine.load(name)
    engine.threads.run(2)
    engine.place()
    engine.clock.now += adapter_loads.WAIT_S - 1
    engine.registry.release("a")
    engine.place()
    engine.threads.run()
    assert engine.place() == (["c"], {})
    engine.registry.acquire("c")
    engine.clock.now += adapter_loads.WAIT_S - 1
    assert engine.place() == ([], {})
    engine.clock.now += 2
    done, failed = engine.place()
    assert not done and failed["d"].status == 503 and not engine.loads.is_waiting
    assert "2 of 2 places" in failed["d"].message and "--max-adapters" in failed["d"].message
    assert engine.registry.num_waiting == 0 and engine.registry.size_bytes == 2 * SIZE
    engine.registry.acquire("b")  # nobody waits for its place any more


def test_a_load_that_fails_gives_back_what_it_reserved(engine):
    engine.load("bad")
    engine.load("bug")
    assert engine.registry.size_bytes == 0
    engine.threads.run(2)
    _, failed = engine.place()
    assert failed["bad"].message == "bad weights" and failed["bug"].code == "adapter_load_failed"
    assert engine.registry.size_bytes == 0
    engine.bring("a")
    engine.size["big"] = 4 * SIZE  # more than its header said, and than there may be
    engine.load("big")
    engine.threads.run()
    assert "takes 40 bytes" in engine.place()[1]["big"].message and engine.registry.size_bytes == SIZE


def test_a_read_without_end_is_refused_and_its_room_is_for_others_though_it_may_end(engine):
    read = engine.read

    def hangs(name, path):
        engine.memory._read = read
        engine.bring("b")  # it is not held up
        engine.clock.now += adapter_loads.READ_S + 1
        assert engine.registry.size_bytes == 2 * SIZE
        assert "not read in 600 s" in engine.place()[1]["a"].message
        assert engine.registry.size_bytes == SIZE
        return read(name, path)

    engine.memory._read = hangs
    engine.load("a")
    engine.threads.run()
    assert engine.place() == ([], {}) and engine.reads == ["b", "a"]
    assert engine.registry.size_bytes == SIZE and not engine.loads._given_up and not engine.memory._reading


def test_reads_of_a_disk_that_is_away_stop_no_loads_from_others(engine):
    """Twice as many as there are threads, on threads that are real."""
    away, read, (dead, alive) = threading.Event(), engine.read, (1, 2)
    engine.registry.max_adapters, engine.registry.max_bytes = 99, 99 * SIZE
    pool = engine.loads._readers = engine.readers

    def hangs(name, path):
        if name.startswith("dead"):
            away.wait()
        return read(name, path)

    def answers(name):
        """What came of that load, and of others."""
        while not any(answers := engine.place()):
            time.sleep(0.01)
        done, failed = answers
        assert name in [*done, *failed]
        return failed.get(name)

    engine.memory._read = hangs
    try:
        for num in range(2 * adapter_loads.NUM_READERS):
            engine.load(f"dead {num}", mount=dead)
        engine.load("x", mount=alive)
        wait_until(lambda: len(pool._running) == adapter_loads.NUM_READERS)
        engine.clock.now += adapter_loads.STUCK_S + 1
        assert answers("x") is None
        assert pool.num_stuck(dead) == engine.memory.num_stuck_reads == adapter_loads.NUM_READERS
        assert pool.is_held_back(dead) and not pool.is_held_back(alive)
        engine.clock.now += adapter_loads.WAIT_S
        _, failed = engine.place()
        assert len(failed) == adapter_loads.NUM_READERS and all(
            "8 reads from its disk" in e.message for e in failed.values()
        )
        engine.load("y", mount=alive)
        assert answers("y") is None
        engine.clock.now += adapter_loads.READ_S
        _, failed = engine.place()
        assert len(failed) == adapter_loads.NUM_READERS and engine.registry.size_bytes == 2 * SIZE
    finally:
        away.set()
    wait_until(lambda: engine.place() == ([], {}) and not engine.loads._given_up)
    assert engine.memory.num_stuck_reads == 0 and engine.registry.size_bytes == 2 * SIZE
    engine.load("dead again", mount=dead)
    assert answers("dead again") is None


def test_waiting_for_a_thread_is_no_reading_and_has_an_end_as_well(engine):
    for name in "ab":
        engine.load(name)
    engine.clock.now += adapter_loads.READ_S - 1
    read = engine.read

    def slow(name, path):
        engine.clock.now += 2
        assert engine.loads.place()[0].error.message.startswith("adapter 'b' waited 600 s for others")
        return read(name, path)

    engine.memory._read = slow
    engine.threads.run()
    (waiting, *_), *rest = engine.threads.work
    assert waiting.cancelled() and not rest and engine.place() == (["a"], {})
    assert engine.registry.size_bytes == SIZE and not engine.loads._loads and not engine.loads._given_up


def test_a_read_that_ends_while_it_is_given_up_has_one_answer(engine):
    engine.load("a")
    engine.clock.now += adapter_loads.READ_S + 1
    placed = []
    giving_up = threading.Thread(target=lambda: placed.extend(engine.loads.place()))

    def beside(brought, is_pinned):
        giving_up.start()
        giving_up.join(0.1)
        return engine.into_room(brought, is_pinned)

    engine.adapters.place = beside
    engine.threads.run()
    giving_up.join()
    assert engine.place() == (["a"], {}) and not placed
    assert engine.registry.size_bytes == SIZE and not engine.loads._loads and not engine.loads._given_up


def test_two_loads_of_known_content_read_it_once(engine):
    engine.load("a1", content_hash="a", size_bytes=SIZE)
    engine.load("a2", content_hash="a", size_bytes=SIZE)
    engine.threads.run(2)
    engine.load("a3", content_hash="a", size_bytes=SIZE)
    for _ in range(2):
        engine.threads.run()  # without a turn of the engine between
    assert engine.place() == (["a1", "a2", "a3"], {}) and engine.reads == ["a1"]
    assert engine.registry.size_bytes == SIZE
    engine.bring("a4")  # unknown content, which turns out to be there
    assert engine.registry.size_bytes == SIZE and engine.registry.counts.num_loads == 1


def test_an_adapter_comes_back_when_its_old_copy_is_forgotten_and_else_without_a_turn_of_the_engine(engine):
    for name in "ab":
        engine.bring(name)
        engine.registry.acquire(name)
        engine.registry.release(name)
    for name in "ca":
        engine.load(name)
        engine.threads.run()
    assert [answer.call_id for answer in engine.answers] == ["c"]
    assert set(engine.registry.adapters) == {"a", "b", "c"}  # a step may use what has left
    assert engine.place() == (["c", "a"], {}) and set(engine.registry.adapters) == {"a", "c"}
    assert not engine.loads._loads and engine.registry.size_bytes == 2 * SIZE


def test_a_prefetch_takes_no_room_of_adapters_in_use_and_does_not_wait(engine):
    engine.fill()
    engine.load("c", is_prefetch=True)
    engine.threads.run()
    assert engine.place()[1]["c"].code == NO_IDLE_ROOM and not engine.loads.is_waiting
    engine.registry.release("a")
    engine.bring("c", is_prefetch=True)
    assert set(engine.registry.adapters) == {"b", "c"}


def test_a_load_that_nobody_waits_for_any_more_leaves_the_queue_but_keeps_room_that_it_has(engine):
    engine.fill()
    for name in "cd":
        engine.load(name, path=f"/{name}")
        engine.threads.run()
    assert engine.place() == ([], {}) and engine.registry.num_waiting == 2
    engine.loads.forsake("/c")
    assert engine.place()[1]["c"].code == NO_IDLE_ROOM and engine.registry.num_waiting == 1
    engine.registry.release("a")
    engine.place()  # which gives the room
    engine.loads.forsake("/d")
    engine.threads.run()
    engine.place()
    assert set(engine.registry.adapters) == {"b", "d"} and not engine.loads.is_waiting


def test_too_many_loads_are_refused(engine, monkeypatch):
    monkeypatch.setattr(adapter_loads, "MAX_LOADS", 2)
    engine.load("a")
    engine.load("b")
    (refused,) = engine.loads.submit(LoadAdapter(7, "c", "/x"))
    assert refused.call_id == 7 and refused.error.status == 503


def test_beside_a_device_copies_stay_in_main_memory_and_are_not_read_again():
    engine = Engine(host_bytes=3 * SIZE)
    host = engine.memory.host
    for name in "abc":
        engine.bring(name)
        engine.registry.acquire(name)
        engine.registry.release(name)
    assert set(engine.registry.adapters) == {"b", "c"} and set(host.adapters) == {"a", "b", "c"}
    engine.bring("a", content_hash="a", size_bytes=SIZE)
    assert engine.reads == ["a", "b", "c"] and engine.uploads == ["a", "b", "c", "a"]
    engine.bring("d")  # a copy leaves main memory for it, whether or not the device has that adapter
    assert len(host.adapters) == 3 and host.size_bytes == 3 * SIZE and not host.num_refs
    assert engine.most_copies == 2  # it had left before the new one was read
    engine.memory.unload("d")
    engine.registry.take_left()
    assert "d" not in engine.registry.adapters and host.size_bytes == 2 * SIZE and len(host.adapters) == 2


def test_what_the_device_has_is_not_brought_again_whether_or_not_a_copy_is_left():
    engine = Engine(host_bytes=2 * SIZE)
    engine.bring("a")
    engine.registry.acquire("a")
    for name in "bc":
        engine.bring(name)
        engine.clock.now += 3
    assert set(engine.registry.adapters) == {"a", "c"} and "a" not in engine.memory.host.held()
    engine.bring("a", content_hash="a", size_bytes=SIZE)
    assert engine.reads == ["a", "b", "c"] == engine.uploads
    engine.registry.release("a")


def test_an_adapter_that_is_unloaded_while_a_load_finds_it_is_read_again():
    engine = Engine(host_bytes=9 * SIZE)
    engine.bring("a")
    ask = engine.registry.ask

    def unloaded(num_bytes, key=None, *, is_patient=True):
        reservation = ask(num_bytes, key, is_patient=is_patient)
        engine.registry.ask = ask
        engine.memory.unload("a")
        engine.registry.take_left()
        return reservation

    engine.registry.ask = unloaded
    engine.bring("a", content_hash="a", size_bytes=SIZE)
    assert engine.reads == ["a", "a"] and engine.registry.size_bytes == engine.memory.host.size_bytes == SIZE


def test_a_load_that_waits_for_main_memory_is_told_of_that():
    engine = Engine(host_bytes=SIZE)
    engine.bring("a")
    engine.memory.host.acquire("a")  # as one on its way to the device does
    engine.load("b")
    engine.threads.run()
    engine.place()
    engine.clock.now += adapter_loads.WAIT_S + 1
    assert "10 of 10 bytes" in (message := engine.place()[1]["b"].message) and "main memory" in message
    assert not engine.memory.host.num_waiting and engine.memory.host.size_bytes == SIZE


def test_a_load_that_ends_between_main_memory_and_device_gives_back_both():
    engine = Engine(host_bytes=9 * SIZE)
    engine.fill()
    engine.load("c")
    engine.threads.run()
    engine.place()
    assert engine.loads.is_waiting and engine.memory.host.num_refs == 1  # it is in main memory, and waits
    engine.clock.now += adapter_loads.WAIT_S + 1
    assert engine.place()[1]["c"].status == 503
    assert engine.memory.host.num_refs == 0 and engine.registry.size_bytes == 2 * SIZE


def test_a_load_that_is_hastened_while_it_waits_or_is_on_its_way_gets_room_first(engine):
    engine.fill()
    for name in "cde":
        engine.load(name, priority=5)
    engine.loads.prioritize("/x", 0)
    engine.loads.prioritize("/x", 6)  # who waited for it urgently has left
    engine.load("far", path="/far", priority=5)
    engine.loads.prioritize("/far", 1)  # no thread has begun it
    engine.threads.run(4)
    engine.place()
    engine.load("other", path="/other", priority=5)
    engine.threads.run()  # it has asked for room, which the engine's loop has not heard
    engine.loads.prioritize("/other", 0)
    engine.place()
    for name, held in (("o", "a"), ("f", "b"), ("c", "o")):
        engine.registry.release(held)
        engine.place()
        engine.threads.run()
        (done,) = engine.place()[0]
        assert done[0] == name
        engine.registry.acquire(name)


def test_a_better_load_of_the_same_content_hastens_the_one_that_it_waits_for(engine):
    engine.fill()
    for name in "cd":
        engine.load(name, content_hash=name, size_bytes=SIZE, priority=5)
    engine.threads.run(2)
    engine.place()
    engine.load("d again", content_hash="d", size_bytes=SIZE, priority=0)
    engine.registry.release("a")
    engine.place()
    engine.threads.run()
    assert engine.place()[0][0] == "d"


def test_a_load_gives_way_when_the_better_one_of_its_content_is_wanted_by_worse_requests_alone(engine):
    engine.fill()
    for name, priority in (("c", 5), ("d", 6)):
        engine.load(name, content_hash=name, size_bytes=SIZE, priority=priority)
    engine.threads.run(2)
    engine.place()
    engine.load("d again", content_hash="d", size_bytes=SIZE, priority=0, path="/again")
    engine.loads.prioritize("/again", 9)
    engine.registry.release("a")
    engine.place()
    engine.threads.run()
    assert engine.place()[0][0] == "c"
