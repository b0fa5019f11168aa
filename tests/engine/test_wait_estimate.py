"""How long a request is told that it would wait: before anything was measured, and after."""

import pytest

from specserve.config import EngineConfig
from specserve.drafting.cost_model import CostModel
from specserve.engine.admission import refuse_overload
from specserve.engine.wait_estimate import WaitEstimate, decode_step_s
from specserve.errors import OverloadedError
from specserve.messages import GenerateRequest, SamplingParams
from specserve.schedule.block_manager import BlockManager
from specserve.schedule.scheduler import Scheduler
from specserve.schedule.sequence import Sequence

STEP_S = 0.1


class Load:
    """A scheduler of two seats whose steps take `STEP_S`, and what was served by it."""

    def __init__(self):
        self.now = 0.0
        self.scheduler = Scheduler(
            BlockManager(1000, 16), max_num_seqs=2, max_batched_tokens=64, max_prefill_rows=32, clock=lambda: self.now
        )
        self.waits = WaitEstimate(self.scheduler, lambda num: STEP_S / 2)  # wrong by half, as a table may be
        self.prompt_tokens = self.generated_tokens = 0
        self._num = 0

    def request(self, adapter=None, max_tokens=20, **fields):
        self._num += 1
        prompt = list(range(100 * self._num, 100 * self._num + 4))
        return GenerateRequest(
            str(self._num), prompt, SamplingParams(max_tokens=max_tokens), adapter_hash=adapter, **fields
        )

    def add(self, *args, **fields):
        request = self.request(*args, **fields)
        self.scheduler.add(seq := Sequence(self._num, request))
        return seq

    def step(self):
        for item in self.scheduler.schedule():
            seq = item.seq
            self.prompt_tokens += item.num_rows if seq.output_len == 0 else 0
            seq.num_computed += item.num_rows
            seq.tokens.append(7)
            self.generated_tokens += 1
            if seq.output_len == seq.sampling.max_tokens:
                self.scheduler.remove(seq)
        self.now += STEP_S
        self.waits.observe(self.prompt_tokens, self.generated_tokens)


def test_one_adapter_cannot_take_all_places_to_wait():
    load, config = Load(), EngineConfig(max_waiting=16)  # and two seats

    def room_for(adapter, priority=0):
        try:
            refuse_overload(load.request(adapter, priority=priority), config, load.scheduler, load.waits)
        except OverloadedError as error:
            assert "--max-waiting 16" in str(error) and error.retry_after_s is not None
            return False
        return True

    while room_for("hot"):
        load.add("hot")
    assert len(load.scheduler.waiting) == 16 and not room_for("hot", priority=-1)
    for adapter in ("a", "b"):
        assert room_for(adapter)
        load.add(adapter)
    assert not room_for("c")


def refusal_of(load, request, config):
    try:
        refuse_overload(request, config, load.scheduler, load.waits)
    except OverloadedError as error:
        return error
    return None


def test_sequences_of_one_answer_are_refused_with_the_first_or_not_at_all():
    """For want of places, and of time."""
    config = EngineConfig(max_waiting=4)  # and two seats
    load = Load()
    for _ in range(3):
        load.add()
    assert refusal_of(load, load.request("a", num_admitted=3), config) is None
    assert "has 4 sequences" in str(refusal_of(load, load.request("a", num_admitted=4), config))
    for _ in range(5):
        load.add()
    assert refusal_of(load, load.request(), config) is not None
    assert refusal_of(load, load.request(num_admitted=0), config) is None, "its answer was admitted"
    few = EngineConfig(max_waiting_tokens=60)
    assert refusal_of(Load(), load.request(num_admitted=2), few) is None
    assert "max-waiting-tokens 60" in str(refusal_of(Load(), load.request(num_admitted=3), few))  # 24 tokens each
    in_time = load.now + load.waits.first_token_s(load.request("a"))
    roomy = EngineConfig(max_waiting=100)
    assert refusal_of(load, load.request("a", deadline=in_time), roomy) is None
    refused = refusal_of(load, load.request("a", deadline=in_time, num_admitted=8), roomy)
    assert refused.code == "deadline_unreachable"
    assert refusal_of(load, load.request("a", deadline=load.now - 1, num_admitted=0), roomy) is None


def test_where_seats_are_free_for_some_of_an_answers_sequences_the_last_one_waits():
    load = Load()
    assert load.waits.wait_s(load.request(num_admitted=2)) == 0 < load.waits.wait_s(load.request(num_admitted=3))


def test_a_sequence_whose_answer_has_begun_is_not_dropped_for_its_deadline():
    load = Load()
    first = load.add(deadline=5.0, num_admitted=3)
    others = [load.add(deadline=5.0, num_admitted=0) for _ in range(2)]
    late = load.add("b", deadline=5.0)
    load.scheduler.max_num_seqs = 1
    load.step()
    assert load.scheduler.running == [first]
    assert load.scheduler.waiting.late(10.0) == [late] and set(others) < set(load.scheduler.waiting)


def test_before_anything_was_measured_the_host_sequences_and_contexts_count():
    load, costs = Load(), CostModel({1: 0.01, 64: 0.02}, sequence_s=1e-3, key_s=1e-5)
    alone = decode_step_s(costs, load.scheduler, 1)
    assert alone > costs.seconds(1)
    apart = decode_step_s(costs, load.scheduler, 2)
    assert apart - alone > costs.seconds(2) - costs.seconds(1) + 0.9e-3
    load.add()
    load.step()
    assert decode_step_s(costs, load.scheduler, 2) - apart == pytest.approx(2 * 4 * 1e-5)  # prompts of four tokens


def test_nobody_waits_while_there_is_a_seat():
    load = Load()
    load.add()
    load.step()
    assert load.waits.wait_s(load.request()) == 0
    assert STEP_S / 2 <= load.waits.first_token_s(load.request()) <= STEP_S


def test_the_estimate_comes_from_the_table_first_and_then_from_what_is_measured():
    load = Load()
    for _ in range(40):
        load.add()
    first = load.waits.wait_s(load.request())
    for _ in range(30):
        load.step()
    assert first == pytest.approx(41 * 21 / (2 / (STEP_S / 2)), rel=0.05)
    new = load.request()
    wait_s, first_token_s = load.waits.wait_s(new), load.waits.first_token_s(new)
    load.scheduler.add(seq := Sequence(10**6, new))
    before = load.now
    while seq not in load.scheduler.running:
        load.step()
    assert wait_s == pytest.approx(load.now - before, rel=0.15)
    assert seq.output_len == 1 and first_token_s == pytest.approx(load.now - before, rel=0.15)


def test_an_adapter_that_nobody_waits_for_and_a_better_priority_wait_less():
    load = Load()
    for _ in range(60):
        load.add("hot")
    load.step()
    hot, other = load.waits.wait_s(load.request("hot")), load.waits.wait_s(load.request("other"))
    urgent = load.waits.wait_s(load.request("hot", priority=-1))
    assert urgent < other < hot / 4
    assert load.waits.typical_wait_s < hot / 4
