"""The order of waiting sequences: fairness between adapters, priorities, deadlines, and that nobody waits for ever."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from specserve.messages import GenerateRequest, SamplingParams
from specserve.schedule.block_manager import BlockManager
from specserve.schedule.caller_queue import CallerQueue
from specserve.schedule.counters import QUANTUM
from specserve.schedule.fair_queue import PROMPT_COST, FairQueue
from specserve.schedule.scheduler import Scheduler
from specserve.schedule.sequence import Sequence, Status
from specserve.schedule.waiting import PATIENCE_S, UNSERVED_EVERY


class Simulation:
    """A scheduler whose sequences end after their `max_tokens`; a step takes `step_s` of its clock."""

    def __init__(self, num_blocks=1000, max_num_seqs=4, step_s=0.01):
        self.now = 0.0
        self.step_s = step_s
        self.blocks = BlockManager(num_blocks, 4)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=64,
            max_prefill_rows=32,
            clock=lambda: self.now,
        )
        self.admitted: list[Sequence] = []
        self.served: dict[str | None, float] = {}
        self.served_callers: dict[str, float] = {}
        self._num = 0

    def add(self, adapter, prompt_len=8, output_len=8, priority=0, deadline=None, base=None, caller=""):
        self._num += 1
        base = 1000 * self._num if base is None else base
        sampling = SamplingParams(max_tokens=output_len)
        prompt = [base + i for i in range(prompt_len)]
        who = {"adapter_hash": adapter, "caller": caller}
        request = GenerateRequest(str(self._num), prompt, sampling, **who, priority=priority, deadline=deadline)
        seq = Sequence(self._num, request)
        self.scheduler.add(seq)
        return seq

    def step(self):
        before = set(self.scheduler.running)
        items = self.scheduler.schedule()
        self.admitted += [seq for seq in self.scheduler.running if seq not in before and seq not in self.admitted]
        for item in items:
            seq, is_prompt = item.seq, item.seq.output_len == 0
            seq.num_computed += item.num_rows
            self.blocks.commit(seq.block_table, seq.block_keys, seq.root_key, seq.tokens, seq.num_computed)
            cost = PROMPT_COST * item.num_rows if is_prompt else 0.0
            if item.reaches_end:
                seq.tokens.append(7)
                cost += 1.0
                if seq.output_len == seq.sampling.max_tokens:
                    self.scheduler.remove(seq)
            self.served[seq.adapter_hash] = self.served.get(seq.adapter_hash, 0.0) + cost
            self.served_callers[seq.caller] = self.served_callers.get(seq.caller, 0.0) + cost
        self.now += self.step_s
        waiting = self.scheduler.waiting
        assert waiting.num_by_adapter == Counter(seq.adapter_hash for seq in waiting)

    def run(self):
        while self.scheduler.has_work():
            self.step()
        assert self.blocks.num_free == self.blocks.num_blocks

    def order(self):
        return [seq.adapter_hash for seq in self.admitted]


def test_one_request_does_not_wait_for_five_hundred_of_another_adapter():
    simulation = Simulation()
    for _ in range(500):
        simulation.add("hot", output_len=32)
    for _ in range(200):
        simulation.step()
    single = simulation.add("quiet", output_len=32)
    before = len(simulation.admitted)
    simulation.run()
    num_before = simulation.admitted.index(single) - before
    assert num_before <= QUANTUM / 32  # behind what was left of the present quantum
    assert len(simulation.admitted) == 501


@pytest.mark.parametrize("seed", range(3))
def test_backlogged_adapters_are_served_within_a_bound_of_each_other(seed):
    rng = random.Random(seed)
    simulation = Simulation()
    shapes = {"a": (40, 8), "b": (4, 24), "c": (16, 12)}
    start: dict[str, float] = {}
    worst = 0.0
    for step in range(4000):
        names = [seq.adapter_hash for seq in simulation.scheduler.waiting]
        for name, shape in shapes.items():
            for _ in range(3 + rng.randrange(3) - names.count(name)):
                simulation.add(name, *shape)
        simulation.step()
        if step == 500:  # by then outputs are as long as expected
            start = dict(simulation.served)
        elif step > 500:
            since = [simulation.served[name] - start[name] for name in shapes]
            worst = max(worst, max(since) - min(since))
    most = max(PROMPT_COST * prompt_len + output_len for prompt_len, output_len in shapes.values())
    assert worst <= 2 * (QUANTUM + most * simulation.scheduler.max_num_seqs)
    assert min(since) > 10 * QUANTUM


def test_a_caller_that_floods_an_adapter_does_not_slow_another_callers_requests_for_it():
    simulation = Simulation()
    for _ in range(500):
        simulation.add("shared", output_len=32, caller="flood")
    for _ in range(200):
        simulation.step()
    single = simulation.add("shared", output_len=32, caller="quiet")
    before = len(simulation.admitted)
    simulation.run()
    assert simulation.admitted.index(single) - before <= QUANTUM / 32
    assert len(simulation.admitted) == 501


def test_callers_share_alike_however_many_adapters_they_ask_for_and_each_shares_out_its_own():
    simulation = Simulation()
    wanted = {"one": ["a"], "many": ["a", *"bcdefgh"]}
    start = {}
    for step in range(4000):
        waiting = [(seq.caller, seq.adapter_hash) for seq in simulation.scheduler.waiting]
        for caller, adapters in wanted.items():
            for adapter in adapters:
                for _ in range(24 // len(adapters) - waiting.count((caller, adapter))):
                    simulation.add(adapter, output_len=16, caller=caller)
        simulation.step()
        if step == 500:
            start = simulation.served_callers | {"b": simulation.served["b"], "h": simulation.served["h"]}
    one, many = (simulation.served_callers[caller] - start[caller] for caller in wanted)
    assert abs(one - many) <= 2 * (QUANTUM + 20 * 4) and one > 10 * QUANTUM
    assert abs(simulation.served["b"] - start["b"] - simulation.served["h"] + start["h"]) <= 2 * (QUANTUM + 20 * 4)


def test_a_caller_that_was_idle_has_saved_nothing_up():
    simulation = Simulation(max_num_seqs=1)
    for _ in range(100):
        simulation.add("a", output_len=16, caller="busy")
        simulation.add("a", output_len=16, caller="idle") if not simulation.now else None
    for _ in range(800):
        simulation.step()
    for _ in range(100):
        simulation.add("a", output_len=16, caller="idle")
    before = dict(simulation.served_callers)
    for _ in range(600):
        simulation.step()
    grown = [simulation.served_callers[caller] - before[caller] for caller in ("busy", "idle")]
    assert min(grown) > QUANTUM / 2 and abs(grown[0] - grown[1]) <= 2 * QUANTUM + 36


@pytest.mark.parametrize("seed", range(3))
def test_one_caller_has_the_order_of_its_adapters_alone(seed):
    """Whatever the name, and whatever callers were there before."""

    def order(caller, is_first):
        rng, simulation = random.Random(seed), Simulation(num_blocks=60)
        for _ in range(0 if is_first else 5):
            simulation.add("z", caller="before")
        simulation.run()
        num_before = len(simulation.admitted)
        for _ in range(400):
            if rng.random() < 0.6:
                adapter, priority = rng.choice("abbbc"), rng.randrange(2)
                simulation.add(adapter, rng.randrange(1, 20), rng.randrange(1, 20), priority, caller=caller)
            simulation.step()
        simulation.run()
        return [(seq.seq_id - num_before, seq.adapter_hash) for seq in simulation.admitted[num_before:]]

    def queue_order(queue):
        """Of one priority's queue, without the rest of the scheduler."""
        rng, made, admitted = random.Random(seed), [], []
        for seq_id in range(1, 300):
            sampling = SamplingParams(max_tokens=rng.randrange(1, 200))
            request = GenerateRequest(
                str(seq_id), [1] * rng.randrange(1, 90), sampling, adapter_hash=rng.choice("abbc")
            )
            queue.add(Sequence(seq_id, request), float(seq_id))
            if rng.random() < 0.7:
                admitted.append(queue.first())
                queue.admit(admitted[-1], float(seq_id))
                made.append(admitted[-1].seq_id)
            if admitted and rng.random() < 0.6:
                queue.end(admitted.pop(rng.randrange(len(admitted))))
        return made

    assert order("", True) == order("alice", True)
    assert queue_order(CallerQueue()) == queue_order(FairQueue())


def test_an_admission_out_of_turn_does_not_set_back_who_comes_next():
    queue = FairQueue()

    def add(seq_id, adapter):
        sampling = SamplingParams(max_tokens=int(QUANTUM))
        seq = Sequence(seq_id, GenerateRequest(str(seq_id), [1], sampling, adapter_hash=adapter))
        queue.add(seq, 0.0)
        return seq

    ahead = [add(seq_id, "ahead") for seq_id in range(1, 4)]
    queue.admit(ahead[0], 0.0)
    behind = [add(seq_id, "behind") for seq_id in (11, 12)]
    queue.admit(ahead[1], 0.0)
    new = add(21, "new")
    order = []
    while queue.num_waiting:
        order.append(queue.first())
        queue.admit(order[-1], 0.0)
    assert order == [behind[0], new, behind[1], ahead[2]]


def test_cached_prompt_tokens_are_not_charged():
    simulation = Simulation(max_num_seqs=1)
    for _ in range(60):
        simulation.add("shared", 400, 8, base=0)
        simulation.add("own", 400, 8)
    for _ in range(400):
        simulation.step()
    order = simulation.order()
    assert order.count("shared") > 5 * order.count("own")


def test_within_an_adapter_it_is_first_come_first_served():
    simulation = Simulation()
    rng = random.Random(1)
    for _ in range(100):
        simulation.add(rng.choice("abc"), rng.randrange(1, 20), rng.randrange(1, 20))
        simulation.step()
    simulation.run()
    for name in "abc":
        ids = [seq.seq_id for seq in simulation.admitted if seq.adapter_hash == name]
        assert ids == sorted(ids)


def test_priority_goes_first_and_the_oldest_gets_its_turn_after_its_patience():
    simulation = Simulation(max_num_seqs=1, step_s=0.1)
    low = simulation.add("low", output_len=4, priority=5)
    while low not in simulation.admitted:
        while sum(seq.priority == 0 for seq in simulation.scheduler.waiting) < 2:
            simulation.add("high", output_len=4)
        simulation.step()
    assert PATIENCE_S < simulation.now < PATIENCE_S + (UNSERVED_EVERY + 1) * 4 * simulation.step_s


def test_no_stream_of_new_adapters_starves_one_that_was_served():
    simulation = Simulation(max_num_seqs=1, step_s=1.0)
    for _ in range(40):
        simulation.add("hot", output_len=32)
    for num in range(8000):
        if len(simulation.scheduler.waiting) < 50:  # more would be refused
            simulation.add(f"new{num}", output_len=4)  # whoever has not been here yet goes first
        simulation.step()
    assert simulation.order().count("hot") == 40


def test_a_long_backlog_is_no_starvation_and_gets_no_more_than_its_share():
    simulation = Simulation(step_s=0.1)
    for _ in range(300):
        simulation.add("hot", output_len=16)
    newest = {name: simulation.add(name, output_len=16) for name in "abcdefghijklmnopqrst"}
    for _ in range(3500):
        for name, seq in newest.items():
            if seq.status is not Status.WAITING:
                newest[name] = simulation.add(name, output_len=16)
        simulation.step()
    assert simulation.now > 10 * PATIENCE_S
    others = [simulation.served[name] for name in newest]
    assert min(others) > 2 * QUANTUM and simulation.served["hot"] - min(others) < 1.5 * QUANTUM


def test_earliest_deadline_first_and_what_is_late_is_not_run():
    simulation = Simulation(max_num_seqs=1)
    simulation.add("a", output_len=4)
    simulation.step()
    last = simulation.add("a", deadline=20.0)
    first = simulation.add("a", deadline=10.0)
    none = simulation.add("a", deadline=None)
    gone = simulation.add("a", deadline=simulation.now)
    assert simulation.scheduler.waiting.late(simulation.now) == [gone]
    simulation.scheduler.remove(gone)
    assert simulation.scheduler.waiting.late(simulation.now) == []
    simulation.run()
    assert simulation.admitted[1:] == [first, last, none] and gone.status is Status.FINISHED
    assert simulation.scheduler.waiting.late(100.0) == []


def test_one_that_was_preempted_keeps_its_place_and_the_worst_priority_makes_room():
    simulation = Simulation(num_blocks=8, max_num_seqs=3)
    batch = simulation.add("a", 8, 12, priority=9)
    simulation.step()
    urgent = simulation.add("a", 8, 12)
    simulation.step()
    while not simulation.scheduler.num_preemptions:
        simulation.step()
    assert batch.status is Status.WAITING and urgent.status is Status.RUNNING
    fresh = simulation.add("b", 8, 4, priority=9)
    sooner = simulation.add("b", 8, 4, priority=8)
    waiting = simulation.scheduler.waiting
    assert waiting.first(simulation.now) is sooner
    simulation.scheduler.remove(sooner)
    assert waiting.first(simulation.now) is batch
    simulation.run()
    assert batch.output_len == 12 and fresh.output_len == 4


def test_whatever_is_aborted_leaves_nothing_behind():
    rng = random.Random(2)
    simulation = Simulation(num_blocks=14)
    live = []
    for _ in range(3000):
        if rng.random() < 0.5:
            deadline = simulation.now + rng.random() if rng.random() < 0.3 else None
            adapter = rng.choice([None, *"abcdefgh"])
            lengths, priority = (rng.randrange(1, 30), rng.randrange(1, 20)), rng.randrange(3)
            live.append(simulation.add(adapter, *lengths, priority, deadline, caller=rng.choice(["", "x", "y"])))
        if live and rng.random() < 0.4:
            seq = live.pop(rng.randrange(len(live)))
            if seq.status is not Status.FINISHED:
                simulation.scheduler.remove(seq)
        for seq in simulation.scheduler.waiting.late(simulation.now):
            simulation.scheduler.remove(seq)
        simulation.step()
        waiting = simulation.scheduler.waiting
        assert len(waiting) == len(list(waiting)) == sum(seq.status is Status.WAITING for seq in waiting)
    simulation.run()
    assert simulation.scheduler.num_preemptions > 0
    assert len(waiting) == 0 and waiting.num_tokens == 0 and waiting.cost_ahead("x", "a", 9) == 0
    for queue in waiting._by_priority.values():
        for known, counters in [
            (queue._shares, queue._counters),
            *((share.adapters._flows, share.adapters._counters) for share in queue._shares.values()),
        ]:
            assert set(known.values()) == set(counters._idle)  # ahead of others, and known until they caught up
            assert all(counters.lead(member) > 0 for member in counters._idle) and counters.num_backlogged == 0


def test_what_is_ahead_of_a_request_bounds_what_is_served_before_it():
    rng = random.Random(3)
    simulation = Simulation(max_num_seqs=1)
    for _ in range(30):
        simulation.add("warm", output_len=10)
    simulation.run()
    for _ in range(120):
        simulation.add(rng.choice("abbbbb"), 8, 10)
    ahead = [simulation.scheduler.waiting.cost_ahead("", name, 0) for name in ("b", "a", "new")]
    assert all(more > less for more, less in pairwise(ahead))
    others = [simulation.scheduler.waiting.cost_ahead("other", name, 0) for name in ("b", "new")]
    assert others[0] == others[1] == QUANTUM / 2  # behind what is left of the present quantum of the one caller
    simulation.add("b", 8, 10, caller="other")
    assert QUANTUM / 2 < simulation.scheduler.waiting.cost_ahead("other", "b", 0) < ahead[0]
    simulation.scheduler.remove([*simulation.scheduler.waiting][-1])
    assert simulation.scheduler.waiting.cost_ahead("", "new", -1) == 0
    assert simulation.scheduler.waiting.cost_ahead("", "new", 1) == pytest.approx(120 * 12)
