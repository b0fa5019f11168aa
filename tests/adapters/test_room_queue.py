"""Who gets room next: by priority, then in the order of asking, and nobody waits for ever."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from specserve.adapters import residency, room_queue
from specserve.adapters.registry import AdapterRegistry
from specserve.errors import UserError


@pytest.fixture
def full(clock):
    """A registry of one place, which a request has."""
    registry = AdapterRegistry(1, clock)
    registry.put(SimpleNamespace(content_hash="x"), registry.ask(1, "x"))
    registry.acquire("x")
    clock.now += residency.STAY_S
    return registry


def next_room(registry, rooms, key="x"):
    """Who gets the place when the one in it has ended, and takes it in turn."""
    registry.release(key)
    registry.grant()
    (name,) = (name for name, room in rooms.items() if room.is_granted)
    registry.take_left()
    registry.put(SimpleNamespace(content_hash=name), rooms.pop(name))
    registry.acquire(name)
    return name


def test_room_goes_to_the_best_priority_and_then_in_the_order_of_asking(full):
    rooms = {name: full.ask(1, name, priority=priority) for name, priority in (("a", 5), ("b", 0), ("c", 5), ("d", 0))}
    assert not any(room.is_granted for room in rooms.values())
    order = ["x"]
    while rooms:
        order.append(next_room(full, rooms, order[-1]))
    assert order[1:] == ["b", "d", "a", "c"] and full.num_waiting == 0


def test_a_better_request_that_comes_later_hastens_what_waits_as_long_as_it_waits(full):
    rooms = {name: full.ask(1, name, priority=5) for name in "abc"}
    full.prioritize(rooms["c"], 0)
    full.prioritize(rooms["b"], 0)
    full.prioritize(rooms["b"], 9)  # the better one has left again
    order = ["x"]
    while rooms:
        order.append(next_room(full, rooms, order[-1]))
    assert order[1:] == ["c", "a", "b"]


def test_whoever_has_waited_longest_gets_every_eighth_room_and_no_more(full, clock):
    rooms = {"old": full.ask(1, "old", priority=9), "old too": full.ask(1, "old too", priority=9)}
    clock.now += room_queue.PATIENCE_S + 1
    order = ["x"]
    for idx in range(2 * room_queue.OLDEST_EVERY):
        rooms |= {f"{idx}": full.ask(1, f"{idx}")}
        order.append(next_room(full, rooms, order[-1]))
    assert [order.index(name) + 1 for name in ("old", "old too")] == [
        room_queue.OLDEST_EVERY,
        2 * room_queue.OLDEST_EVERY,
    ]


def test_a_short_wait_is_no_reason_to_go_first(full, clock):
    rooms = {"new": full.ask(1, "new", priority=9)}
    clock.now += room_queue.PATIENCE_S - 1
    order = ["x"]
    for idx in range(room_queue.OLDEST_EVERY + 1):
        rooms |= {f"{idx}": full.ask(1, f"{idx}")}
        order.append(next_room(full, rooms, order[-1]))
    assert "new" not in order


def test_room_is_made_for_whoever_has_waited_longest_when_it_is_its_turn(clock):
    """It needs more than those before it by priority, for whom there would be enough."""
    registry = AdapterRegistry(9, clock, max_bytes=100)
    sizes = {"in use": 40, "in use too": 40, "idle": 20}
    for name, num_bytes in sizes.items():
        registry.put(SimpleNamespace(content_hash=name), registry.ask(num_bytes, name))
        if name != "idle":
            registry.acquire(name)
    for idx in range(room_queue.OLDEST_EVERY - 1 - len(sizes)):  # rooms that come before its turn
        registry.give_back(registry.ask(0, f"{idx}"))
    large = registry.ask(60, "large", priority=5)
    clock.now += room_queue.PATIENCE_S + 1
    assert not registry.ask(20, "urgent").is_granted
    while not large.is_granted and clock.now < 200:
        clock.now += residency.ASK_EVERY_S
        registry.grant()
        for name in ("in use", "in use too"):
            if name in registry.held() and not registry.held()[name].is_staying:
                registry.release(name)  # what it runs has ended
    assert large.is_granted


def test_what_is_refused_or_does_not_wait_leaves_nothing_in_the_queue(full):
    assert not full.ask(1, "a", is_patient=False).is_granted and full.num_waiting == 0
    full.pin("x")
    with pytest.raises(UserError, match="pinned"):
        full.ask(1, "b")
    assert full.num_waiting == 0


def test_a_better_priority_takes_idle_room_at_once_though_others_wait_for_more(clock):
    registry = AdapterRegistry(9, clock, max_bytes=10)
    registry.put(SimpleNamespace(content_hash="x"), registry.ask(8, "x"))
    registry.acquire("x")
    assert not registry.ask(5, "large", priority=5).is_granted
    assert not registry.ask(1, "small", priority=5).is_granted  # behind it
    assert registry.ask(1, "urgent").is_granted
