"""Kept responses: whose they are, how much of them there is, and for how long."""

from __future__ import annotations

from stopped_clock import Clock

from specserve.server.responses.store import ENTRY_BYTES, ResponseStore, StoredResponse


def entry(name: str, num_bytes: int = 100) -> StoredResponse:
    return StoredResponse(name, b"b" * (num_bytes // 2), b"i" * (num_bytes - num_bytes // 2))


def test_a_response_is_its_owners_alone():
    store = ResponseStore(10_000, 60, Clock())
    assert store.put("red", entry("r1"))
    assert store.get("red", "r1").body and store.get("blue", "r1") is None
    assert not store.delete("blue", "r1") and store.delete("red", "r1") and not store.delete("red", "r1")
    assert store.get("red", "r1") is None and store.num_bytes == 0


def test_the_oldest_of_who_holds_most_makes_room():
    size = 1000 + ENTRY_BYTES
    store = ResponseStore(4 * size, 60, Clock())
    store.put("blue", entry("b1", 1000))
    for idx in range(20):
        assert store.put("red", entry(f"r{idx}", 1000))
    assert store.get("blue", "b1") is not None and store.num_bytes == 4 * size
    assert [idx for idx in range(20) if store.get("red", f"r{idx}")] == [17, 18, 19]
    store.put("blue", entry("b2", 1000))
    assert store.get("red", "r17") is None and store.get("blue", "b1") and store.get("blue", "b2")


def test_what_is_larger_than_all_the_room_is_not_kept_and_takes_nobodys():
    store = ResponseStore(5000, 60, Clock())
    store.put("red", entry("r1"))
    assert not store.put("red", entry("r2", 5000))
    assert store.get("red", "r1") is not None and store.get("red", "r2") is None
    assert not ResponseStore(0, 60, Clock()).put("red", entry("r1"))


def test_old_ones_are_forgotten_and_it_is_known_when_the_next_will_be():
    clock = Clock()
    store = ResponseStore(10_000, 60, clock)
    assert store.forget_old() is None
    store.put("red", entry("r1"))
    clock.now += 20
    store.put("blue", entry("b1"))
    assert store.forget_old() == 40
    clock.now += 40
    assert store.get("red", "r1") is None and store.get("blue", "b1") is not None
    assert store.num_bytes == 100 + ENTRY_BYTES and store.forget_old() == 20
    clock.now += 20
    assert store.forget_old() is None and store.num_bytes == 0
