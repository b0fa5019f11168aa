"""The simulator: its costs, that whatever is submitted is answered and given back, and where its two orders differ."""

import random
from dataclasses import replace

import pytest

from bench.simulator.costs import FittedCosts, Step
from bench.simulator.replica import FirstComeQueue, Replica
from bench.simulator.replicas import Affinity, AtRandom
from bench.simulator.run import figures, jain, simulate
from bench.simulator.trace import Lengths, burst, merged, poisson
from specserve.config import EngineConfig
from specserve.drafting.cost_model import NODES
from specserve.schedule.waiting import WaitingQueue

COSTS = FittedCosts(0.01, (0.001,) * len(NODES), 0.0002, 0.0005, 1e-7)


def make_replica(order=WaitingQueue, num_blocks=2000, **settings):
    config = {"max_num_seqs": 8, "max_batched_tokens": 128, "max_prefill_rows": 64, "max_adapters": 4} | settings
    return Replica(COSTS, EngineConfig(**config), num_blocks, 0.05, order)


def check_given_back(replica):
    assert replica.blocks.num_free == replica.blocks.num_blocks
    assert replica.blocks.check_integrity([]) is None
    assert replica.registry.num_refs == 0 and not replica.scheduler.has_work() and replica.registry.num_waiting == 0


def test_costs_are_found_again_in_steps_that_have_them():
    rng = random.Random(0)
    costs = FittedCosts(0.02, tuple(0.001 / (1 + idx) for idx in range(len(NODES))), 0.0003, 0.002, 1e-6)
    steps = [
        Step(rows := rng.choice((1, 2, 3, 7, 12, 30, 100, 400, 900, 2000)), rng.randint(1, rows), rng.randint(1, 8),
             rng.randrange(5000)) for _ in range(400)
    ]  # fmt: skip
    seconds = [costs.seconds(step) * (9.0 if idx == 7 else 1.0) for idx, step in enumerate(steps)]  # one interrupted
    found = FittedCosts.fit(steps, seconds)
    for step in steps:
        assert found.seconds(step) == pytest.approx(costs.seconds(step), rel=1e-3)


def test_everything_is_answered_and_given_back_whatever_it_asked_for():
    lengths = Lengths(40, 30)
    usual = poisson(300, 6.0, range(30), "usual", lengths=lengths)
    urgent = poisson(60, 2.0, range(30), "urgent", lengths=lengths, kind="urgent", priority=-1, deadline_s=3.0)
    trace = [replace(request, shared_len=16) for request in merged(usual, urgent, burst(80, 5.0, 0, "b", lengths))]
    replica = make_replica(num_blocks=20, max_waiting=60)
    result = simulate(trace, [replica])
    found = figures(result, ttft_s=1.0, token_s=0.1)
    errors = {name for kind in found["kinds"].values() for name in kind["errors"]}
    assert errors <= {"deadline_exceeded", "deadline_unreachable", "overloaded"} and "overloaded" in errors
    assert found["num_preemptions"] > 0 and found["loads"] > 30 and found["evictions"] > 0
    assert sum(kind["num"] for kind in found["kinds"].values()) == len(trace) == len(result.outcomes)
    assert all(outcome.error or outcome.end_s for outcome in result.outcomes)
    check_given_back(replica)


def test_replicas_share_a_trace_and_keep_their_own_time():
    trace = [*poisson(200, 20.0, range(8), "many", lengths=Lengths(40, 8))]
    replicas = [make_replica(), make_replica()]
    one = figures(simulate(trace, [make_replica()]), 1.0, 0.1)
    two = figures(simulate(trace, replicas, lambda request, all: all[request.adapter % 2]), 1.0, 0.1)
    assert two["kinds"]["all"]["ttft_s"]["p90"] < one["kinds"]["all"]["ttft_s"]["p90"]
    for replica in replicas:
        assert replica.num_steps > 20
        check_given_back(replica)


def test_a_burst_is_felt_by_others_where_the_first_that_comes_is_served_first():
    lengths = Lengths(40, 16)
    worst, served = {}, {}
    for order in (FirstComeQueue, WaitingQueue):
        others = poisson(60, 1.0, range(1, 4), "others", lengths=lengths, kind="others")
        replica = make_replica(order)
        result = simulate(merged(others, burst(300, 10.0, 0, "burst", lengths)), [replica])
        found = figures(result, ttft_s=1.0, token_s=0.1)
        worst[order], served[order] = found["kinds"]["others"]["ttft_s"]["max"], result.end_s
        check_given_back(replica)
    assert worst[WaitingQueue] < worst[FirstComeQueue] / 4
    assert served[WaitingQueue] == pytest.approx(served[FirstComeQueue], rel=0.1)  # no time is lost


def test_a_caller_that_floods_an_adapter_is_not_felt_by_another_that_asks_for_it():
    lengths, worst = Lengths(40, 16), {}
    for caller in ("", "flood"):
        others = poisson(60, 1.0, [0], "others", lengths=lengths, kind="others")
        replica = make_replica()
        result = simulate(merged(others, burst(300, 10.0, 0, "burst", lengths, caller)), [replica])
        worst[caller] = figures(result, ttft_s=1.0, token_s=0.1)["kinds"]["others"]["ttft_s"]["max"]
        check_given_back(replica)
    assert worst["flood"] < worst[""] / 4


def test_jain_is_one_where_all_are_equal_and_a_share_where_one_has_everything():
    assert jain([3, 3, 3]) == 1 and jain([5, 0, 0, 0]) == 0.25 and jain([0, 0]) == 1


def test_affinity_reads_fewer_adapters_than_chance_and_gives_everything_back():
    lengths, loads = Lengths(40, 8), {}
    trace = [*poisson(400, 30.0, range(40), "many", lengths=lengths)]
    for kind in (AtRandom, Affinity):
        replicas = [make_replica(max_adapters=12) for _ in range(4)]
        router = kind(replicas, lengths, 0.05)
        result = simulate(trace, replicas, router)
        assert all(outcome.error is None for outcome in result.outcomes)
        loads[kind] = sum(replica.registry.counts.num_loads for replica in replicas)
        assert set(router.policy.loads.values()) == {0}
        for replica in replicas:
            check_given_back(replica)
    assert loads[Affinity] < loads[AtRandom] / 1.5, loads
