"""More adapters than places: they wait in order, those in use make room, and nobody is refused for it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess
from tiny_models import make_tiny_model

from specserve.adapters import registry as adapter_registry
from specserve.adapters.registry import AdapterRegistry
from specserve.engine import adapter_loads
from specserve.engine.adapter_loads import AdapterLoads
from specserve.errors import OverloadedError, UserError
from specserve.messages import AdapterLoaded, CallFailed, LoadAdapter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry(clock):
    return AdapterRegistry(2, clock)


def adapter(name):
    return SimpleNamespace(content_hash=name)


def fill(registry, clock):
    for name in "ab":
        assert registry.place(adapter(name)) == []
        registry.acquire(name)
        clock.now += 0.1
    clock.now += adapter_registry.STAY_S


def test_the_longest_resident_makes_room_and_comes_back_behind_who_waits(registry, clock):
    fill(registry, clock)
    registry.acquire("a")
    assert registry.place(adapter("c")) is None
    with pytest.raises(UserError) as refused:
        registry.acquire("a")
    assert refused.value.code == "adapter_not_resident"
    registry.acquire("b")  # one makes room, not both
    assert not registry.release("a")  # one request of a is left
    assert registry.place(adapter("c")) is None and not registry.is_staying("a") and registry.is_staying("b")
    assert registry.release("a") and registry.place(adapter("c")) == []
    registry.acquire("c")
    assert registry.place(adapter("a")) is None  # c has only just come: b is asked
    assert registry.is_staying("c") and not registry.is_staying("b")


def test_an_adapter_waits_for_the_request_that_it_was_loaded_for(registry, clock):
    registry.place(adapter("a"))
    registry.place(adapter("b"))
    registry.acquire("b")
    registry.release("b")
    assert registry.place(adapter("c")) == ["b"]  # idle; a was not used yet
    registry.acquire("c")
    assert registry.place(adapter("d")) is None
    clock.now += adapter_registry.ARRIVAL_S
    assert registry.place(adapter("d")) == ["a"]


def test_where_one_request_goes_on_for_long_another_adapter_is_asked(registry, clock):
    fill(registry, clock)
    assert registry.place(adapter("c")) is None and not registry.is_staying("a")
    clock.now += adapter_registry.PATIENCE_S
    assert registry.place(adapter("c")) is None and not registry.is_staying("b")
    assert registry.release("b") and registry.place(adapter("c")) == []
    registry.place(adapter("a"))  # nobody waits: it stays after all
    registry.acquire("a")


def test_loads_are_placed_in_order_few_are_read_and_late_ones_are_refused(registry, clock, monkeypatch):
    fill(registry, clock)
    reads = []

    def place_adapter(loaded):
        evicted = registry.place(loaded)
        return None if evicted is None else loaded.content_hash

    engine = SimpleNamespace(
        registry=registry,
        place_adapter=place_adapter,
        read_adapter=lambda name, path: reads.append(name) or adapter(name),
    )
    loads = AdapterLoads(engine, lambda: None, clock)
    loads._readers = SimpleNamespace(submit=_now)
    trimmed = []
    monkeypatch.setattr(adapter_loads, "give_memory_back", lambda: trimmed.append(len(reads)))
    for idx, name in enumerate("cdefgh"):
        assert loads.submit(LoadAdapter(idx, name, "/x")) == []
    assert reads == list("cdef") and loads.place() == [] and loads.is_waiting
    assert trimmed == [1, 2, 3, 4]  # behind every read
    registry.release("a")
    assert [answer.call_id for answer in loads.place()] == [0] and reads == list("cdefg")
    registry.acquire("c")
    assert loads.place() == []
    registry.release("b")
    assert [answer.call_id for answer in loads.place()] == [1]
    clock.now += adapter_loads.WAIT_S + 1
    answers = loads.place()
    assert [answer.call_id for answer in answers if isinstance(answer, AdapterLoaded)] == [2]  # d's request never came
    late = [answer for answer in answers if isinstance(answer, CallFailed)]
    assert [answer.call_id for answer in late] == [3, 4, 5] and not loads.is_waiting
    assert late[0].error.status == 503 and "--max-adapters" in late[0].error.message
    for idx in range(adapter_loads.MAX_LOADS):
        assert loads.submit(LoadAdapter(idx, "z", "/x")) == []
    assert loads.submit(LoadAdapter(-7, "z", "/x"))[0].call_id == -7


def test_the_wait_for_a_place_begins_when_the_adapter_is_read_and_a_read_without_end_is_refused(registry, clock):
    reads = []
    engine = SimpleNamespace(
        registry=registry,
        place_adapter=lambda loaded: registry.place(loaded) and None,
        read_adapter=lambda name, path: adapter(name),
    )
    loads = AdapterLoads(engine, lambda: None, clock)
    loads._readers = SimpleNamespace(submit=lambda read, *args: reads.append((Future(), read, args)) or reads[-1][0])
    fill(registry, clock)
    for idx, name in enumerate("cd"):
        assert loads.submit(LoadAdapter(idx, name, "/x")) == []
    clock.now += adapter_loads.WAIT_S + 1
    assert loads.place() == []  # a large adapter on a slow disk
    future, read, args = reads[0]
    future.set_result(read(*args))
    assert loads.place() == [] and loads.is_waiting
    clock.now += adapter_loads.WAIT_S + 1
    (late,) = loads.place()
    assert late.call_id == 0 and "found no place in 60 s" in late.error.message
    clock.now += adapter_loads.READ_S
    (late,) = loads.place()
    assert late.call_id == 1 and late.error.status == 503 and "not read in 600 s" in late.error.message


def _now(read, *args):
    future = Future()
    future.set_result(read(*args))
    return future


def test_an_engine_used_directly_refuses_at_once(registry, clock):
    fill(registry, clock)
    with pytest.raises(OverloadedError, match="--max-adapters"):
        registry.add(adapter("c"))
    registry.release("b")
    assert registry.add(adapter("c")) == ["b"]


def test_a_third_adapter_is_served_beside_steady_traffic_on_two(tmp_path_factory):
    model_dir = make_tiny_model(tmp_path_factory.mktemp("model"))
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abc"):
        make_peft_adapter(model_dir, root / name, r=4 + seed, seed=seed, std=0.3)
    server = ServerProcess(model_dir, "--adapters-dir", str(root), "--max-adapters", "2").wait_ready()
    try:
        golden = {name: server.complete(model=name, max_tokens=120)["text"] for name in "abc"}
        stop, texts = threading.Event(), []

        def ask(name):
            while not stop.is_set():
                texts.append((name, server.complete(model=name, max_tokens=120)["text"]))

        # Several clients each, so that neither adapter is ever idle.
        threads = [threading.Thread(target=ask, args=(name,)) for name in "aaaabbbb"]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        for _ in range(3):
            start = time.monotonic()
            assert server.complete(model="c", max_tokens=120)["text"] == golden["c"]
            assert time.monotonic() - start < 30
        stop.set()
        for thread in threads:
            thread.join()
        assert {name for name, _ in texts} == {"a", "b"} and all(text == golden[name] for name, text in texts)
        server.wait_baseline()
    finally:
        server.stop()
