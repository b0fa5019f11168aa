"""Who gets a request, by adapter, prefix and load; and what moves when replicas come and go."""

from __future__ import annotations

from collections import Counter

import pytest

from specserve.adapter_messages import AdapterInfo
from specserve.ray.holders import Holders
from specserve.ray.policy import AffinityPolicy, Route
from specserve.ray.prefixes import CHUNK, MAX_KEYS, PrefixMap, prefix_keys

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def policy():
    policy = AffinityPolicy()
    policy.set_replicas(NAMES)
    return policy


def fill(policy, replica, tokens):
    policy.began(replica, tokens, 0.0)


def test_who_has_the_adapter_gets_the_request_while_a_copy_costs_more(policy):
    for idx in range(1000):
        policy.route(f"other-{idx}", 10)
    reading = 4 * 0.25 * 500  # a cold adapter's: four times what is generated in the time of reading it
    fill(policy, "b", int(reading) - 1)
    for _ in range(20):
        assert policy.route("cold", 10, holders=["b"]) == Route("b", has_adapter=True)
    fill(policy, "b", 2)
    route = policy.route("cold", 10, holders=["b"])
    assert route.replica != "b" and not route.has_adapter
    assert policy.route("cold", 10, holders=["b"], refusing=NAMES) is None


def test_a_hot_adapter_has_as_many_copies_as_its_share_asks_for_at_half_the_price(policy):
    for idx in range(4000):
        policy.route("hot" if idx % 2 else f"cold-{idx % 1000}", 100, holders=["a"])
    assert policy.copies("hot") == 4 and policy.copies("cold-2") == 1
    fill(policy, "a", 126)
    assert not policy.route("hot", 100, holders=["a"]).has_adapter
    assert policy.route("cold-2", 100, holders=["a"]).has_adapter


def test_what_reading_takes_is_learned(policy):
    fill(policy, "b", 600)
    for _ in range(50):
        policy.was_read(4.0)
    assert policy.route("cold", 10, holders=["b"]).replica == "b"


def test_load_decides_between_those_that_have_it(policy):
    fill(policy, "a", 50)
    assert policy.route("x", 10, holders=["a", "b"]).replica == "b"
    assert policy.route(None, 10).replica in {"b", "c", "d"}
    policy.ended("a", 50, 1.0)
    assert set(policy.loads.values()) == {0}


def test_a_slow_replica_gets_less(policy):
    policy.set_replicas(["a", "b"])
    given = Counter()
    running = {"a": [], "b": []}
    for tick in range(4000):
        now = tick / 100
        for name, ends in running.items():
            while ends and ends[0] <= now:
                ends.pop(0)
                policy.ended(name, 100, now)
        name = policy.route(None, 100).replica
        given[name] += tick > 2000
        policy.began(name, 100, now)
        running[name].append(max(now, running[name][-1] if running[name] else 0) + (0.015 if name == "a" else 0.06))
    assert 2.5 < given["a"] / given["b"] < 6, given


def test_the_start_of_a_prompt_draws_until_load_outweighs_it(policy):
    prompt = list(range(20 * CHUNK))
    keys = prefix_keys(prompt, None, "")
    first = policy.route(None, 10, keys).replica
    fill(policy, first, 200)
    assert policy.route(None, 10, keys).replica == first  # 19 chunks at a quarter are more than 200
    fill(policy, first, 200)
    other = policy.route(None, 10, keys).replica
    assert other != first
    policy.set_replicas([name for name in NAMES if name != other])
    assert policy._prefixes.matched_tokens(keys).keys() == {first}


def test_prefixes_are_of_one_adapter_and_salt_and_never_of_the_last_token():
    prompt = list(range(3 * CHUNK))
    keys = prefix_keys(prompt, "x", "s")
    assert len(keys) == 2 and keys == prefix_keys([*prompt[: 2 * CHUNK], 7], "x", "s")
    others = prefix_keys(prompt, "y", "s") + prefix_keys(prompt, "x", "") + prefix_keys([9, *prompt[1:]], "x", "s")
    assert not set(keys) & set(others) and prefix_keys(prompt[:CHUNK], None, "") == []


def test_what_is_known_of_prefixes_stays_within_its_limit():
    known = PrefixMap()
    for idx in range(MAX_KEYS + 10):
        known.note([idx.to_bytes(4, "little")], "a")
    assert len(known._having) == MAX_KEYS
    assert not known.matched_tokens([(0).to_bytes(4, "little")])


def test_homes_are_even_and_few_move_when_a_replica_goes(policy):
    adapters = [f"adapter-{idx}" for idx in range(2000)]
    before = {adapter: policy.home(adapter) for adapter in adapters}
    assert min(Counter(before.values()).values()) > 400
    policy.set_replicas(["a", "b", "c"])
    after = {adapter: policy.home(adapter) for adapter in adapters}
    assert all(after[adapter] == before[adapter] for adapter in adapters if before[adapter] != "d")


def test_an_overloaded_replica_is_no_home_and_one_that_had_it_is_preferred(policy):
    home = policy.home("x")
    fill(policy, home, 10**4)
    other = policy.home("x")
    assert other != home
    last = next(name for name in NAMES if name not in (home, other))
    policy.left(last, "x")
    assert policy.home("x") == last
    assert policy.home("x", refusing=NAMES) is None


def held(content_hash):
    return AdapterInfo(content_hash, 4, 1, ["q_proj"], 100, None)


def test_the_server_hears_of_a_content_when_its_last_copy_has_left():
    holders = Holders()
    first = holders.loaded("n", "/p", 1, held("x"), "a", 7)
    second = holders.loaded("m", "/q", 1, held("x"), "a", 8)
    assert second > first and holders.copied("x", "b", 3) and not holders.copied("y", "b", 4)
    assert holders.left("x", "a", 7) is None and set(holders.of("x")) == {"a", "b"}  # a later load holds it
    assert holders.left("x", "a", 8) is None and set(holders.of("x")) == {"b"}
    assert holders.left("x", "b", 3) == second and not holders.of("x")
    assert holders.left("x", "b", 3) is None


def test_a_lost_replica_takes_what_only_it_held():
    holders = Holders()
    only = holders.loaded("n", "/p", 1, held("x"), "a", 1)
    holders.loaded("m", "/q", 1, held("y"), "a", 2)
    holders.copied("y", "b", 1)
    assert holders.replica_lost("a") == {"x": only} and holders.replica_lost("a") == {}
    assert set(holders.of("y")) == {"b"} and not holders.of("x")
