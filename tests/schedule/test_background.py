"""Background sequences: whole steps while nobody else is there, and a small share of the time beside others."""

import random

import pytest

from specserve.messages import AWAY_S, BACKGROUND_PRIORITY, GenerateRequest, SamplingParams
from specserve.schedule.background import SHARE
from specserve.schedule.block_manager import BlockManager
from specserve.schedule.scheduler import Scheduler
from specserve.schedule.sequence import Sequence

STEP_S, ROW_S = 0.02, 0.002  # of a step, and more for each of its rows


class Run:
    """A scheduler on a clock that steps move."""

    def __init__(self, **limits):
        self.now, self.num_added = 100.0, 0
        limits = {"max_num_seqs": 8, "max_batched_tokens": 64, "max_prefill_rows": 16, **limits}
        blocks = BlockManager(limits.pop("num_blocks", 400), 4)
        self.scheduler = Scheduler(blocks, clock=lambda: self.now, **limits)
        self.steps: list[tuple[float, dict[bool, int]]] = []  # seconds, and rows of background and of others

    def add(self, *, background=False, prompt_len=4, max_tokens=8):
        self.num_added += 1
        prompt = [1000 * self.num_added + idx for idx in range(prompt_len)]
        priority = BACKGROUND_PRIORITY if background else 0
        request = GenerateRequest(str(self.num_added), prompt, SamplingParams(max_tokens=max_tokens), priority=priority)
        self.scheduler.add(seq := Sequence(self.num_added, request))
        return seq

    def step(self):
        scheduler, rows = self.scheduler, {True: 0, False: 0}
        for item in scheduler.schedule():
            seq = item.seq
            rows[seq.is_background] += item.num_rows
            seq.num_computed += item.num_rows
            scheduler.blocks.commit(seq.block_table, seq.block_keys, seq.root_key, seq.tokens, seq.num_computed)
            if item.reaches_end:
                seq.tokens.append(7)
                if seq.output_len == seq.sampling.max_tokens:
                    scheduler.remove(seq)
        error = scheduler.blocks.check_integrity(seq.block_table for seq in scheduler.sequences())
        assert error is None, error
        seconds = STEP_S + ROW_S * sum(rows.values())
        self.now += seconds
        self.steps.append((seconds, rows))
        return rows


def test_alone_they_are_like_any_others():
    alone, plain = Run(), Run()
    for _ in range(6):
        alone.add(background=True, prompt_len=30)
        plain.add(prompt_len=30)
    while plain.scheduler.has_work():
        assert sum(alone.step().values()) == sum(plain.step().values())
    assert not alone.scheduler.has_work()


def test_beside_others_their_steps_take_a_small_share_of_the_time_and_they_get_on():
    run = Run()
    long = [run.add(background=True, prompt_len=60, max_tokens=400) for _ in range(4)]
    for _ in range(10):
        run.step()
    run.steps.clear()
    before = sum(seq.output_len + seq.num_computed for seq in long)
    for _ in range(30):
        other = run.add(prompt_len=20, max_tokens=40)
        while other.output_len < 40:
            run.step()
    total = sum(seconds for seconds, _ in run.steps)
    along = [(seconds, rows) for seconds, rows in run.steps if rows[True]]
    assert 0.5 * SHARE < sum(seconds for seconds, _ in along) / total < 1.2 * SHARE
    assert all(rows[True] <= 2 + 4 for _, rows in along)  # a quarter of the seats, and of a step's rows of prompts
    assert sum(seq.output_len + seq.num_computed for seq in long) > before


def test_for_a_while_after_others_their_steps_stay_small():
    run = Run()
    other = run.add(max_tokens=2)
    for _ in range(6):
        run.add(background=True, prompt_len=40, max_tokens=1000)
    while other.output_len < 2:
        run.step()
    left = run.now
    while run.now < left + AWAY_S - 1.0:
        assert 0 < run.step()[True] <= 2 + 4
    while run.now < left + AWAY_S + 1.0:
        run.step()
    assert run.step()[True] >= 6


def test_halves_are_of_those_that_take_part():
    """Background sequences that are left out would make the first half the larger, and the second the less."""
    run = Run()
    for _ in range(2):
        run.add(background=True, max_tokens=1000)
    run.step()
    for _ in range(4):
        run.add(max_tokens=1000)
    for _ in range(4):
        run.step()
    first = [item.seq for item in run.scheduler.schedule(half=True)]
    second = [item.seq for item in run.scheduler.schedule(first, half=True)]
    assert [len(first), len(second)] == [2, 2] and not {*first} & {*second}


@pytest.mark.parametrize("limit", [{"max_num_seqs": 2}, {"num_blocks": 24}])
def test_they_give_up_seats_and_blocks_for_whoever_waits(limit):
    run = Run(**limit)
    long = [run.add(background=True, prompt_len=40, max_tokens=12) for _ in range(2)]
    for _ in range(12):
        run.step()
    others = [run.add(prompt_len=20, max_tokens=10) for _ in range(2)]
    run.step()
    assert all(seq in run.scheduler.running for seq in others)
    assert run.scheduler.num_preemptions
    while run.scheduler.has_work():
        run.step()
    assert [seq.output_len for seq in long] == [12, 12]
    assert run.scheduler.blocks.num_free == run.scheduler.blocks.num_blocks


def test_they_wait_for_as_long_as_seats_are_wanted_by_others():
    run = Run(max_num_seqs=1)
    run.add(background=True)
    run.add(max_tokens=2)
    while run.now < 200.0:
        if len(run.scheduler.sequences()) < 3:
            run.add(max_tokens=2)
        assert not run.step()[True]


def test_any_mix_ends_with_all_blocks_free():
    rng, run = random.Random(3), Run(num_blocks=40)
    everything = []
    for _ in range(2000):
        if rng.random() < 0.2 and len(everything) < 60:
            length, tokens = rng.randrange(1, 40), rng.randrange(1, 12)
            everything.append(run.add(background=rng.random() < 0.6, prompt_len=length, max_tokens=tokens))
        run.step()
    assert not run.scheduler.has_work() and run.scheduler.blocks.num_free == 40
    assert all(seq.output_len == seq.sampling.max_tokens for seq in everything)
