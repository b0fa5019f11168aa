"""Who stays in an adapter memory, who leaves and who waits, by an injected clock: single cases and random traces."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import deque
from types import SimpleNamespace

import pytest
from stopped_clock import Clock

from specserve.adapters import held, residency
from specserve.adapters.registry import AdapterRegistry
from specserve.errors import OverloadedError, UserError


@pytest.fixture
def make(clock):
    return lambda max_adapters=2, max_bytes=residency.NO_LIMIT: AdapterRegistry(max_adapters, clock, max_bytes)


def bring(registry, key, num_bytes=1, load_s=0.0):
    """Whether there was room for it at once, in which it now is."""
    reservation = registry.ask(num_bytes, key, is_patient=False)
    if not reservation.is_granted:
        return False
    if not reservation.is_held:
        registry.take_left()
        registry.put(SimpleNamespace(content_hash=key), reservation, load_s)
    return True


def use(registry, clock, key, times=1):
    for _ in range(times):
        registry.acquire(key)
        registry.release(key)
    clock.now += held.ARRIVAL_S


def fill(registry, clock, keys="ab"):
    for key in keys:
        assert bring(registry, key)
        registry.acquire(key)
        clock.now += 0.1
    clock.now += residency.STAY_S


def asked(registry):
    return [key for key, one in registry.held().items() if one.asked_at is not None]


def test_the_registry_needs_no_torch():
    code = "import sys, specserve.adapters.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_used_less_leaves_first_and_is_known_when_it_comes_back(make, clock):
    registry = make()
    bring(registry, "a")
    use(registry, clock, "a", 5)
    bring(registry, "b")
    use(registry, clock, "b", 3)
    assert bring(registry, "c") and list(registry.adapters) == ["a", "c"]
    use(registry, clock, "c")  # the last used, and the least used
    assert bring(registry, "b") and list(registry.adapters) == ["a", "b"]
    use(registry, clock, "b", 3)  # six uses in all now
    assert bring(registry, "c") and list(registry.adapters) == ["b", "c"]


def test_what_was_used_long_ago_counts_less(make, clock):
    registry = make()
    bring(registry, "a")
    use(registry, clock, "a", 40)
    bring(registry, "b")
    for _ in range(10):
        use(registry, clock, "b", 300)
    bring(registry, "c")
    assert set(registry.adapters) == {"b", "c"}  # a's 40 uses are 3,000 uses old
    use(registry, clock, "c", 30)
    assert bring(registry, "a") and set(registry.adapters) == {"a", "b"}


def test_of_equally_used_ones_the_large_leave_first_and_those_that_load_slowly_last(make, clock):
    registry = make(8, max_bytes=100)
    for key, num_bytes, load_s in (("large", 50, 0.1), ("small", 20, 0.1), ("slow", 30, 2.0)):
        assert bring(registry, key, num_bytes, load_s)
        use(registry, clock, key)
    assert bring(registry, "x", 10) and set(registry.adapters) == {"small", "slow", "x"}
    clock.now += held.ARRIVAL_S
    assert bring(registry, "y", 60) and set(registry.adapters) == {"slow", "y"}


def test_nobody_leaves_for_an_adapter_that_would_not_fit_all_the_same(make, clock):
    registry = make(8, max_bytes=100)
    for key, num_bytes in (("idle", 30), ("busy", 60)):
        bring(registry, key, num_bytes)
        use(registry, clock, key)
    registry.acquire("busy")
    assert not bring(registry, "x", 50) and set(registry.adapters) == {"idle", "busy"}
    assert bring(registry, "x", 40) and set(registry.adapters) == {"busy", "x"}


def test_more_than_the_limit_is_refused_with_both_numbers(make, clock):
    registry = make(8, max_bytes=100)
    with pytest.raises(UserError, match=r"takes 101 bytes .* 100; raise --adapter-memory-gib") as refused:
        registry.ask(101)
    assert refused.value.code == "adapter_too_large"
    bring(registry, "a", 30)
    registry.pin("a")
    with pytest.raises(UserError, match=r"takes 71 bytes .* pinned ones hold 30 of the 100 .* unpin some") as refused:
        registry.ask(71)
    assert (refused.value.code, refused.value.status) == ("adapter_places_pinned", 503)  # it fits when one is unpinned
    assert registry.ask(70).is_granted and registry.size_bytes == 100


def test_the_least_valuable_in_use_makes_room_and_comes_back_behind_who_waits(make, clock):
    registry = make()
    fill(registry, clock)
    for _ in range(2):
        registry.acquire("b")
    reservation = registry.ask(1, "c")
    registry.grant()
    assert not reservation.is_granted and asked(registry) == ["a"]  # one makes room, not both
    with pytest.raises(UserError) as refused:
        registry.acquire("a")
    assert refused.value.code == "adapter_not_resident"
    again = registry.ask(1, "a")
    registry.release("a")
    registry.grant()
    assert reservation.is_granted and not again.is_granted and [*registry.take_left()] == ["a"]
    registry.put(SimpleNamespace(content_hash="c"), reservation)
    registry.acquire("c")
    clock.now += residency.ASK_EVERY_S
    registry.grant()
    assert asked(registry) == ["b"]  # c has only just come


def test_one_that_was_asked_stays_when_nobody_waits_any_more(make, clock):
    registry = make()
    fill(registry, clock)
    reservation = registry.ask(1, "c")
    registry.grant()
    assert asked(registry) == ["a"]
    registry.give_back(reservation)
    registry.grant()
    registry.acquire("a")
    assert not asked(registry) and registry.num_waiting == 0


def test_one_that_was_asked_and_is_wanted_again_stays_when_its_turn_comes(make, clock):
    registry = make()
    fill(registry, clock)
    first, again = registry.ask(1, "c"), registry.ask(1, "a")
    registry.grant()
    registry.release("b")  # another one became idle before
    registry.grant()
    assert first.is_granted and again.is_held and registry.is_staying("a") and [*registry.take_left()] == ["b"]


def test_where_one_request_goes_on_for_long_another_adapter_is_asked(make, clock):
    registry = make()
    fill(registry, clock)
    registry.ask(1, "c")
    registry.grant()
    clock.now += residency.PATIENCE_S
    registry.grant()
    assert asked(registry) == ["a", "b"]


def test_an_adapter_is_kept_for_the_request_that_it_was_loaded_for(make, clock):
    registry = make()
    bring(registry, "a")
    bring(registry, "b")
    registry.acquire("b")
    registry.release("b")
    assert bring(registry, "c") and set(registry.adapters) == {"a", "c"}  # a was not used yet
    registry.acquire("c")
    assert not bring(registry, "d")
    clock.now += held.ARRIVAL_S
    assert bring(registry, "d") and set(registry.adapters) == {"c", "d"}


def test_pinned_ones_stay_until_they_are_unpinned_or_unloaded(make, clock):
    registry = make()
    fill(registry, clock)
    registry.pin("a")
    registry.release("a")
    reservation = registry.ask(1, "c")
    registry.grant()
    assert asked(registry) == ["b"]
    registry.release("b")
    registry.grant()
    registry.put(SimpleNamespace(content_hash="c"), reservation)
    use(registry, clock, "c", 9)
    assert bring(registry, "d") and "a" in registry.adapters
    registry.pin("d")
    with pytest.raises(UserError, match="all 2 places are pinned"):
        registry.ask(1)
    registry.unload("a")
    assert [*registry.take_left()] == ["a"] and bring(registry, "e")
    with pytest.raises(UserError, match="not loaded"):
        registry.pin("a")
    registry.pin("a", False)


def test_one_that_is_unloaded_in_use_and_loaded_again_stays_and_counts_once(make, clock):
    registry = make()
    fill(registry, clock, "a")
    registry.unload("a")
    assert not registry.is_staying("a")
    again = registry.ask(1)  # what it is was not known before it was read
    assert registry.put(SimpleNamespace(content_hash="a"), again)
    registry.release("a")
    registry.acquire("a")
    assert not registry.take_left() and registry.size_bytes == 1 and registry.counts.num_loads == 1


def test_whoever_cannot_wait_is_refused_at_once(make, clock):
    registry = make()
    fill(registry, clock)
    with pytest.raises(OverloadedError, match="--max-adapters"):
        registry.add(SimpleNamespace(content_hash="c"))
    registry.release("b")
    registry.add(SimpleNamespace(content_hash="c"))
    assert [*registry.take_left()] == ["b"] and registry.num_waiting == 0
    registry.add(SimpleNamespace(content_hash="d"))  # nobody waits for what was added so
    assert [*registry.take_left()] == ["c"]


def test_a_load_that_needs_more_than_it_asked_for_takes_it_or_ends(make, clock):
    registry = make(8, max_bytes=100)
    bring(registry, "a", 50)
    use(registry, clock, "a")
    reservation = registry.ask(40)
    registry.resize(reservation, 30)
    assert registry.size_bytes == 80
    registry.resize(reservation, 60)
    assert [*registry.take_left()] == ["a"] and registry.size_bytes == 60
    with pytest.raises(OverloadedError):
        other = registry.ask(40)
        registry.resize(other, 50)
    registry.give_back(other)
    registry.give_back(reservation)
    assert registry.size_bytes == 0


class Traffic:
    """Requests for adapters of random sizes on a registry, as engine and server make them; checks it all the time."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.clock = Clock()
        self.places, self.max_bytes = self.random.randint(1, 8), self.random.choice([40, 100, residency.NO_LIMIT])
        self.registry = AdapterRegistry(self.places, self.clock, self.max_bytes)
        self.sizes = [self.random.randint(1, 40) for _ in range(self.random.randint(1, 30))]
        self.request_s = self.random.choice([0.1, 1.0, 4.0])
        self.running = []  # (end, key)
        self.loads = deque()  # (room, key, requests that wait for it)
        self.reading = []  # (end, room, key, requests)
        self.longest_s = 0.0
        self.num_fails = 0

    def request(self):
        num = len(self.sizes)
        key = min(int(self.random.paretovariate(0.7)) - 1, num - 1) if self.random.random() < 0.7 else (
            self.random.randrange(num))  # fmt: skip
        self.start(str(key))

    def start(self, key):
        try:
            self.registry.acquire(key)
        except UserError:
            for load in (*self.loads, *self.reading):
                if load[-2] == key:
                    load[-1].append(self.clock.now)
                    return
            reservation = self.registry.ask(self.sizes[int(key)], key)
            (self.reading if reservation.is_granted else self.loads).append(
                (self.clock.now + self.random.random() * 0.2, reservation, key, [self.clock.now])
            )
        else:
            self.running.append((self.clock.now + self.random.random() * self.request_s, key))

    def turn(self):
        self.clock.now += 0.02
        for end, key in [one for one in self.running if one[0] <= self.clock.now]:
            self.running.remove((end, key))
            self.registry.release(key)
        self.registry.take_left()
        for load in [one for one in self.reading if one[0] <= self.clock.now]:
            self.reading.remove(load)
            self.end(*load[1:])
        self.registry.grant()
        granted = [one[1].is_granted for one in self.loads]
        assert granted == sorted(granted, reverse=True)  # in the order of asking
        while self.loads and self.loads[0][1].is_granted:
            _, reservation, key, requests = self.loads.popleft()
            self.reading.append((self.clock.now + self.random.random() * 0.2, reservation, key, requests))
        self.check()

    def end(self, reservation, key, requests):
        if not reservation.is_held and self.random.random() < 0.1:
            self.num_fails += 1
            self.registry.give_back(reservation)
            return
        if not reservation.is_held:
            assert not self.registry.is_staying(key)  # nothing is loaded twice
            self.registry.take_left()
            self.registry.put(SimpleNamespace(content_hash=key), reservation, self.random.random())
        self.longest_s = max([self.longest_s, *(self.clock.now - asked_at for asked_at in requests)])
        for _ in requests:
            self.start(key)

    def check(self):
        registry, there = self.registry, self.registry.held()
        reserved = [load[1] for load in self.reading if not load[1].is_held]
        assert registry.size_bytes == sum(one.num_bytes for one in there.values()) + sum(
            reservation.num_bytes for reservation in reserved
        )
        assert registry.size_bytes <= self.max_bytes and len(there) + len(reserved) <= self.places
        assert all(self.sizes[int(key)] == one.num_bytes for key, one in there.items())
        counts = {key: sum(other == key for _, other in self.running) for key in there}
        assert counts == {key: one.num_refs for key, one in there.items()}
        assert sum(counts.values()) == len(self.running)  # what runs is there
        assert len(self.loads) == registry.num_waiting


@pytest.mark.parametrize("seed", range(12))
def test_under_random_traffic_limits_hold_and_nobody_starves(seed):
    traffic = Traffic(seed)
    for _ in range(1500):
        for _ in range(traffic.random.choice([0, 0, 0, 1, 3])):
            traffic.request()
        traffic.turn()
    for _ in range(3000):
        traffic.turn()
    assert not traffic.running and not traffic.loads and not traffic.reading and not traffic.registry.num_refs
    # Each of those before it in the line waits for an adapter to stay, be asked and end its requests, and is read.
    a_turn_s = residency.STAY_S + held.ARRIVAL_S + traffic.request_s + 0.3
    assert traffic.longest_s < a_turn_s * len(traffic.sizes)
    assert traffic.registry.counts.num_waits > 0 or traffic.places >= len(traffic.sizes)
