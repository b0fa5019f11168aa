"""Room for adapters of rows of batches: what requests leave, and given back as soon as a request wants it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from stopped_clock import Clock

from specserve.adapters import held, residency, room_queue
from specserve.adapters.registry import AdapterRegistry
from specserve.errors import UserError
from specserve.messages import AWAY_S, BACKGROUND_PRIORITY


class Places:
    """A registry of some places, and who uses what in it."""

    def __init__(self, num):
        self.clock = Clock()
        self.registry = AdapterRegistry(num, self.clock)

    def ask(self, key, is_background=False, **kwargs):
        return self.registry.ask(1, key, priority=BACKGROUND_PRIORITY if is_background else 0, **kwargs)

    def put(self, room, key):
        self.registry.take_left()
        self.registry.put(SimpleNamespace(content_hash=key), room)

    def bring(self, key, is_background=False):
        """Whether it found room at once, in which it then is."""
        room = self.ask(key, is_background, is_patient=False)
        if room.is_granted and not room.is_held:
            self.put(room, key)
            return True
        return room.is_granted

    def use(self, key, is_background=False):
        assert self.bring(key, is_background)
        self.registry.acquire(key, is_background)

    def wait(self, seconds, until=lambda: False):
        for _ in range(round(seconds / 0.1)):
            if until():
                return
            self.clock.now += 0.1
            self.registry.grant()


@pytest.fixture
def places():
    return Places(2)


def test_rows_take_no_place_that_a_request_has_or_had_lately(places):
    places.use("in use")
    places.use("idle")
    places.registry.release("idle")
    room = places.ask("of a batch", True)
    places.wait(AWAY_S - 1)
    assert not room.is_granted and places.registry.counts.num_asked == 0
    places.wait(2.0)
    assert room.is_granted and [*places.registry.take_left()] == ["idle"]


def test_rows_wait_as_long_as_requests_use_all_and_get_no_turn_for_having_waited_longest(places):
    for key in "ab":
        places.use(key)
    row = places.ask("of a batch", True)
    places.wait(3 * room_queue.PATIENCE_S)
    assert places.registry.counts.num_asked == 0 and all(one.is_staying for one in places.registry.held().values())
    rooms = [places.ask(f"{idx}") for idx in range(2 * room_queue.OLDEST_EVERY)]
    for idx, room in enumerate(rooms):
        before = f"{idx - 2}" if idx > 1 else "ab"[idx]
        places.registry.release(before)
        if before in places.registry.held():
            places.registry.unload(before)
        places.registry.grant()
        assert room.is_granted and not row.is_granted
        places.put(room, f"{idx}")
        places.registry.acquire(f"{idx}")


def test_a_request_gets_the_place_of_what_rows_use_at_once_and_requests_keep_theirs(places):
    places.use("ours")
    places.use("of a batch", True)
    room = places.ask("new")
    places.registry.grant()
    assert places.registry.displaced() == {"of a batch"} and places.registry.held()["ours"].is_staying
    with pytest.raises(UserError):
        places.registry.acquire("of a batch", True)
    places.registry.release("of a batch", True)  # as the engine does
    places.registry.grant()
    assert room.is_granted and places.registry.displaced() == set()


def test_rows_stay_where_their_adapter_is_pinned_while_it_is_asked_for_its_place(places):
    places.use("ours")
    places.use("of a batch", True)
    room = places.ask("new")
    places.registry.grant()
    places.registry.pin("of a batch")
    assert places.registry.displaced() == set() and places.registry.is_staying("of a batch")
    places.wait(1.0)
    assert places.registry.displaced() == set() and not room.is_granted


def test_what_rows_loaded_and_have_not_begun_with_makes_room_for_a_request_and_not_for_rows(places):
    places.use("ours")
    assert places.bring("of a batch", True)
    assert not places.bring("of another", True)
    assert places.bring("new")


def test_what_rows_and_requests_use_together_is_kept_like_a_request_s_own(places):
    for key in "ab":
        places.use(key)
    places.registry.acquire("a", True)
    places.clock.now += 0.5
    places.ask("new")
    places.registry.grant()
    assert places.registry.displaced() == set() and places.registry.counts.num_asked == 0
    places.registry.release("a")  # the row alone is left
    places.wait(0.1)
    assert places.registry.displaced() == {"a"}


def test_whoever_gives_up_leaves_the_rows_where_they_are(places):
    for key in "ab":
        places.use(key, True)
    room = places.ask("new")
    places.registry.grant()
    assert len(places.registry.displaced()) == 1
    places.registry.give_back(room)
    places.registry.grant()
    assert places.registry.displaced() == set() and places.registry.is_staying("a")


def test_rows_ask_each_other_to_make_room_and_let_them_end(places):
    for key in "ab":
        places.use(key, True)
    room = places.ask("c", True)
    places.wait(residency.STAY_S + 0.5)
    (asked,) = (key for key, one in places.registry.held().items() if not one.is_staying)
    assert places.registry.displaced() == set() and not room.is_granted
    places.registry.release(asked, True)
    places.registry.grant()
    assert room.is_granted


def test_a_batch_over_many_adapters_teaches_nothing_about_those_of_requests():
    places = Places(3)
    for key in ("often", "once"):
        for _ in range(5 if key == "often" else 1):
            places.use(key)
            places.registry.release(key)
    places.clock.now += AWAY_S + held.ARRIVAL_S
    for _ in range(2000):
        places.use("of a batch", True)
        places.registry.release("of a batch", True)
    places.clock.now += held.ARRIVAL_S
    for key in ("1", "2"):
        places.use(key)
    assert "often" in places.registry.held()


@pytest.mark.parametrize("seed", range(6))
def test_under_random_traffic_no_row_costs_a_request_its_place(seed):
    rng, places = random.Random(seed), Places(4)
    registry, running, waiting = places.registry, [], []
    for _ in range(3000):
        places.clock.now += 0.05
        registry.grant()
        registry.take_left()
        wanted = {
            key
            for key, one in registry.held().items()
            if one.num_refs > one.num_background or places.clock.now - one.wanted_at < AWAY_S
        }
        for entry in [one for one in waiting if one[0].is_granted]:
            waiting.remove(entry)
            room, key, is_background = entry
            if not room.is_held:
                places.put(room, key)
            if registry.is_staying(key):
                registry.acquire(key, is_background)
                running.append((places.clock.now + rng.random() * 3, key, is_background))
        gone = registry.displaced()
        for entry in [one for one in running if one[0] < places.clock.now or one[1] in gone]:
            running.remove(entry)
            registry.release(*entry[1:])
        registry.take_left()
        if rng.random() < 0.1:
            is_background = rng.random() < 0.6
            key = f"{rng.randrange(12)}"
            before = set(registry.held())
            if registry.is_staying(key):
                registry.acquire(key, is_background)
                running.append((places.clock.now + rng.random() * 3, key, is_background))
            elif all(other[1] != key for other in waiting):
                waiting.append((places.ask(key, is_background), key, is_background))
                assert not (is_background and wanted & (before - set(registry.held())))
    assert registry.counts.num_loads > 50
