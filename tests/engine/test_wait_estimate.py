"""How long a request is told that it would wait: before anything was measured, and after."""

import pytest

from specserve.config import EngineConfig
from specserve.drafting.cost_model import CostModel
from specserve.engine.admission import Admission, refuse_overload
from specserve.engine.wait_estimate import WaitEstimate, decode_step_s
from specserve.errors import OverloadedError
from specserve.messages import BACKGROUND_PRIORITY, GenerateRequest, SamplingParams, Together
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

    def answer(self, adapter=None, *, num, prompt_tokens=None, **fields):
        """All sequences of one, the first first."""
        self._num += 1
        together = Together(f"answer {self._num}", num, 4 * num if prompt_tokens is None else prompt_tokens)
        return [self.request(adapter, together=together, is_first=idx == 0, **fields) for idx in range(num)]

    def add(self, *args, **fields):
        return self.add_request(self.request(*args, **fields))

    def add_request(self, request):
        self.scheduler.add(seq := Sequence(int(request.request_id), request))
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
    for _ in range(4):
        load.add()
    assert refusal_of(load, load.answer("a", num=2)[0], config) is None
    load.add()
    assert "has 3 sequences" in str(refusal_of(load, load.answer("a", num=3)[0], config))
    for _ in range(3):
        load.add()
    assert refusal_of(load, load.request(), config) is not None
    assert refusal_of(load, load.request(is_first=False), config) is None, "its answer has begun"
    in_time = load.now + load.waits.first_token_s(load.request("a"))
    roomy = EngineConfig(max_waiting=100)
    assert refusal_of(load, load.request("a", deadline=in_time), roomy) is None
    refused = refusal_of(load, load.answer("a", num=8, deadline=in_time)[0], roomy)
    assert refused.code == "deadline_unreachable"
    assert refusal_of(load, load.request("a", deadline=load.now - 1, is_first=False), roomy) is None


def test_an_answer_counts_the_tokens_of_all_its_prompts():
    load, few = Load(), EngineConfig(max_waiting_tokens=84)
    load.add()  # 24 tokens
    load.add()
    assert refusal_of(load, load.request(), few) is None
    for large in (load.answer(num=2)[0], load.answer(num=2, prompt_tokens=21)[0]):
        assert "max-waiting-tokens 84" in str(refusal_of(load, large, few))


@pytest.mark.parametrize(
    ("limits", "words"),
    [({"max_waiting": 10}, "--max-waiting 10"), ({"max_waiting_tokens": 240}, "--max-waiting-tokens 240")],
    ids=str,
)
def test_an_answer_larger_than_a_limit_is_admitted_while_half_of_it_is_free(limits, words):
    load, config = Load(), EngineConfig(**limits)
    for _ in range(5 + 2 * ("max_waiting" in limits)):  # 24 tokens each; two seats count as places
        assert refusal_of(load, load.answer(num=100)[0], config) is None
        load.add()
    load.add()
    refused = str(refusal_of(load, load.answer(num=100)[0], config))
    assert words in refused and "and this one has 100 sequences" in refused


@pytest.mark.parametrize("limits", [{"max_waiting": 0}, {"max_waiting_tokens": 60}], ids=str)
def test_where_nothing_waits_an_answer_of_any_size_is_admitted(limits):
    load, config = Load(), EngineConfig(**limits)
    assert refusal_of(load, load.answer(num=8)[0], config) is None
    for _ in range(2):
        load.add()
    assert refusal_of(load, load.answer(num=8)[0], config) is not None
    load.step()
    assert len(load.scheduler.running) == 2
    assert refusal_of(load, load.answer(num=8)[0], config) is None


def test_all_of_an_answer_follow_the_first_that_comes_and_count_once():
    load = Load()
    config = EngineConfig(max_waiting=4)  # and two seats
    admission = Admission(config, load.scheduler, load.waits)

    def enter(request):
        admission.check(request)
        load.add_request(request)
        admission.admitted(request)

    enter(load.request("a"))
    enter(load.request("a"))
    first, *others = load.answer("a", num=4)
    admission.check(first)  # its adapter is not there, so it does not wait
    enter(others[0])
    enter(others[1])
    enter(first)  # it comes again
    refused = load.answer("b", num=3)
    for request in reversed(refused):
        with pytest.raises(OverloadedError, match="and this one has 3 sequences") as error:
            admission.check(request)
        assert error.value.retry_after_s is not None
        load.step()  # room for some of them, but their answer is refused already
    enter(load.request("b"))
    enter(others[2])


def test_where_seats_are_free_for_some_of_an_answers_sequences_the_last_one_waits():
    load = Load()
    assert load.waits.wait_s(load.answer(num=2)[0]) == 0 < load.waits.wait_s(load.answer(num=3)[0])


def test_a_sequence_whose_answer_has_begun_is_not_dropped_for_its_deadline():
    load = Load()
    first = load.add(deadline=5.0)
    others = [load.add(deadline=5.0, is_first=False) for _ in range(2)]
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


@pytest.mark.parametrize("num_before", [0, 2, 9])
def test_background_sequences_take_neither_places_nor_time_from_others(num_before):
    load, few, small = Load(), EngineConfig(max_waiting=2), EngineConfig(max_waiting_tokens=30)
    for idx in range(num_before):
        load.add(priority=BACKGROUND_PRIORITY)
        if idx < 2:
            load.step()
    for config in (few, small):
        assert refusal_of(load, load.request(deadline=load.now + STEP_S * 1.5), config) is None
    load.add()
    load.step()
    assert load.waits.typical_wait_s == load.waits.wait_s(load.request()) == 0.0
    load.add()
    load.step()
    assert load.waits.wait_s(load.request()) > 0.0
    for _ in range(4):
        load.add()
    assert "4 requests, 4 of them" in str(refusal_of(load, load.request(), few))
    assert "96 tokens" in str(refusal_of(load, load.request(), small))
    in_batch = load.request(priority=BACKGROUND_PRIORITY)
    assert f"{num_before + 4} requests" in str(refusal_of(load, in_batch, few))


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
