"""Which way whole steps go, on a device that waits for the host where drafts are verified, unless halves take turns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from specserve.drafting.step_ways import (
    BARE,
    FIRST_STEPS,
    HALVES,
    TRIAL_SHARE,
    WHOLE,
    Kind,
    Live,
    Load,
    StepWays,
)
from specserve.drafting.way_trial import TimedStep, Trial, Way

WAYS = (BARE, WHOLE, HALVES)
PROMPT_ROW_S = 3e-6
NUM_DRAFTS = 4


def live(num_drafting: int = 1, num_fixed: int = 0, is_held_up: bool = False) -> Live:
    return Live(num_drafting, num_fixed, int(is_held_up))


@dataclass
class Times:
    """A device that takes `step_s` and `row_s`, and a host that takes 0.2 ms and something for each sequence; they
    overlap where a step is queued ahead and where two halves take turns."""

    step_s: float = 1.3e-3
    row_s: float = 2e-6
    drafting_s: float = 20e-6  # the host's, of a sequence
    is_ahead: bool = True

    def __call__(self, num_seqs: int, way: Way, was: Way, num_prompt_rows: float = 0) -> float:
        """Of a step of so many sequences, behind one that went the way `was`."""
        rows = num_seqs * (1 + NUM_DRAFTS * way.drafts)
        device = self.step_s + self.row_s * rows + PROMPT_ROW_S * num_prompt_rows
        host = 2e-4 + (self.drafting_s if way.drafts else 8e-6) * num_seqs
        overlaps = way == was and (way.halves or (way == BARE and self.is_ahead))
        return max(device, host) if overlaps else device + host


@dataclass
class Machine:
    """A load that stays; a verified draft gives `tokens`."""

    times: Times = field(default_factory=Times)
    tokens: float = 3.0
    noise: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    was: Way = WHOLE
    num_prompt_rows_due: int = 0
    tokens_made: float = 0.0
    seconds: float = 0.0

    def rate(self, num_seqs: int, way: Way) -> float:
        """Tokens a second, for ever."""
        num = -(-num_seqs // 2) if way.halves else num_seqs
        return num * (self.tokens if way.drafts else 1) / self.times(num, way, way)

    def step(self, ways: StepWays | Way, num_seqs: int, prompts: bool = False) -> Way:
        load = ways.plan(num_seqs, live(is_held_up=not self.times.is_ahead)) if isinstance(ways, StepWays) else None
        way = load.way if load is not None else ways
        assert isinstance(way, Way)
        num_prompt_rows = 0
        if prompts and self.rng.random() < 0.6:  # one row for each token that is made
            num_prompt_rows, self.num_prompt_rows_due = min(1024, self.num_prompt_rows_due), 0
        num = -(-num_seqs // 2) if way.halves else num_seqs
        took = self.times(num, way, self.was, num_prompt_rows) * (1 + self.noise * self.rng.random())
        seconds = took + 0.02 * (self.noise > 0 and self.rng.random() < 0.01)  # stalls are nobody's fault
        kept = self.rng.gauss(self.tokens, self.noise / num**0.5) if way.drafts else 1.0
        num_tokens = round(num * max(1.0, kept))
        if load is not None:
            # What is expected of prompts' rows is half too much.
            ways.observe(load, way, TimedStep(num, num_tokens, 1.5 * PROMPT_ROW_S * num_prompt_rows, seconds))
        self.was = way
        self.tokens_made, self.seconds = self.tokens_made + num_tokens, self.seconds + took
        self.num_prompt_rows_due += num_tokens
        return way

    def run(
        self, ways: StepWays | Way, num_seqs: int, num_steps: int, prompts: bool = False
    ) -> tuple[dict[Way, float], float]:
        """Share of the steps by way, and tokens a second."""
        self.tokens_made = self.seconds = 0.0
        went = [self.step(ways, num_seqs, prompts) for _ in range(num_steps)]
        return {way: went.count(way) / num_steps for way in WAYS}, self.tokens_made / self.seconds


@pytest.mark.parametrize(
    ("best", "num_seqs", "times", "tokens"),
    [
        (BARE, 256, Times(drafting_s=40e-6), 3.0),
        (BARE, 8, Times(), 1.05),
        (WHOLE, 1, Times(), 3.0),
        (WHOLE, 8, Times(), 3.0),
        (WHOLE, 32, Times(step_s=2.5e-3), 3.0),
        (HALVES, 128, Times(step_s=0.2e-3, drafting_s=8e-6), 3.0),
        (HALVES, 256, Times(), 3.0),
        (HALVES, 256, Times(is_ahead=False), 3.0),
    ],
)
def test_the_way_that_makes_most_is_found_within_some_tens_of_steps_and_trials_cost_next_to_nothing(
    best, num_seqs, times, tokens
):
    machine, ways = Machine(times, tokens), StepWays()
    rates = {way: machine.rate(num_seqs, way) for way in live().choices(num_seqs)}
    assert all(rates[best] > 1.03 * rates[way] for way in rates if way != best), rates
    machine.run(ways, num_seqs, 80)
    shares, rate = machine.run(ways, num_seqs, 5000)
    assert 0.95 < shares[best] < 1 and rate > (1 - 4 * TRIAL_SHARE) * rates[best]


def test_a_load_that_falls_finds_what_it_was_and_so_does_one_that_rises():
    machine, ways = Machine(Times(drafting_s=40e-6)), StepWays()
    machine.run(ways, 256, 200)
    machine.run(ways, 8, 400)
    for _ in range(3):
        assert machine.run(ways, 256, 100)[0][BARE] > 0.85  # that was learned
        assert machine.run(ways, 8, 100)[0][WHOLE] > 0.85
    assert machine.run(ways, 400, 10)[0][BARE] == 1  # and holds for more


def test_what_pays_for_few_sequences_only_is_not_left_to_them_by_many():
    machine, ways = Machine(Times(drafting_s=40e-6)), StepWays()
    machine.run(ways, 256, 200)
    assert machine.run(ways, 8, 10)[0][WHOLE] == 1
    assert machine.run(ways, 181, 10)[0][BARE] == 1


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("num_seqs", [1, 32, 96, 160])
@pytest.mark.parametrize("seed", range(2))
def test_noise_stalls_and_prompts_leave_nearly_all_of_the_best_way(seed, num_seqs, prompts):
    choices = live().choices(num_seqs)
    best = max(Machine(noise=0.05, rng=random.Random(seed)).run(way, num_seqs, 2500, prompts)[1] for way in choices)
    machine, ways = Machine(noise=0.05, rng=random.Random(seed)), StepWays()
    machine.run(ways, num_seqs, 80, prompts)
    assert machine.run(ways, num_seqs, 2500, prompts)[1] > 0.97 * best


def test_drafts_that_are_worth_more_or_less_than_before_are_noticed():
    machine, ways = Machine(), StepWays()
    machine.run(ways, 128, 500)
    machine.tokens = 1.1
    machine.run(ways, 128, 1000)
    assert machine.run(ways, 128, 100)[0][BARE] > 0.85
    machine.tokens = 5.0
    machine.run(ways, 128, 4000)
    assert machine.run(ways, 128, 100)[0][BARE] < 0.15


def kept_ways(machine, num_steps):
    """The way that is kept after each step at 128 sequences."""
    ways, kept = StepWays(), []
    for _ in range(num_steps):
        machine.step(ways, 128)
        load = ways.plan(128, live())
        assert load is not None
        kept.append(load.kept)
    return kept


def test_ways_that_are_nearly_equal_do_not_flap():
    machine = Machine(Times(step_s=6e-3))
    machine.tokens = 3.0 * 1.004 * machine.rate(128, BARE) / machine.rate(128, WHOLE)
    assert len(set(kept_ways(machine, 3000))) == 1


def test_a_machine_whose_steps_are_uneven_makes_them_flap_seldom():
    num_changes = 0
    for seed in range(6):
        machine = Machine(Times(step_s=6e-3), noise=2.0, rng=random.Random(seed))
        machine.tokens = 3.0 * 0.97 * machine.rate(128, BARE) / machine.rate(128, WHOLE)
        kept = kept_ways(machine, 4000)
        num_changes += sum(one != other for one, other in itertools.pairwise(kept))
    assert num_changes < 40  # 53 if a verdict within its own doubt counts


def test_sources_that_are_all_switched_off_leave_steps_to_be_queued_ahead_and_are_tried_again():
    """Nobody is asked though drafts would be, until a trial says that they are tried."""
    ways, tried = StepWays(), []
    for step in range(400):
        load = ways.plan(2, live())
        if ways.observe(load, BARE, TimedStep(2, 2, 0.0, 1.3e-3)):
            tried.append(step)
    assert ways.plan(2, live()).kept == BARE
    assert 64 < tried[0] < 120 and len(tried) < 5


def test_there_is_no_choice_without_drafts_and_none_of_leaving_them_out_where_they_are_asked_for():
    ways = StepWays()
    assert ways.plan(256, live(num_drafting=0)) is None and ways.plan(1, live(num_fixed=1)) is None
    fixed = ways.plan(256, live(num_fixed=1))
    assert fixed is not None and fixed.kind.choices == (WHOLE, HALVES)
    assert ways.plan(3, live()).kind.choices == (WHOLE, BARE)


@dataclass
class Burst:
    """Requests that come all at once, wait for rows of their prompts, draft, and end one after the other."""

    times: Times
    tokens: float = 4.0
    max_rows: int = 1024
    was: Way = WHOLE

    def seconds(self, way_of: Callable[[int, bool], Way], learn: Callable[..., None] = lambda *step: None) -> float:
        """Of 384 requests, 256 at a time."""
        waiting = [[140, 20 + 37 * idx % 160] for idx in range(384)]  # rows of the prompt, tokens
        running, turn, total = [], 0, 0.0
        while waiting or running:
            while waiting and len(running) < 256:
                running.append(waiting.pop())
            fills = sum(rows for rows, _ in running) >= self.max_rows
            way = way_of(len(running), fills)
            turn += 1
            chosen = [seq for idx, seq in enumerate(running) if not way.halves or idx % 2 == turn % 2]
            decoding, room = [seq for seq in chosen if not seq[0]], self.max_rows
            for seq in chosen:
                seq[0], room = seq[0] - min(seq[0], room), room - min(seq[0], room)
            num_prompt_rows, num_tokens = self.max_rows - room, 0
            seconds = self.times(len(decoding), way, self.was, num_prompt_rows)
            for seq in decoding:
                made = min(seq[1], round(self.tokens) if way.drafts else 1)
                seq[1], num_tokens = seq[1] - made, num_tokens + made
            running = [seq for seq in running if seq[1] > 0]
            if decoding:
                learn(way, TimedStep(len(decoding), num_tokens, PROMPT_ROW_S * num_prompt_rows, seconds))
            self.was, total = way, total + seconds
        return total


@pytest.mark.parametrize(
    "times",
    [Times(2.0e-3, 3.6e-6, 10e-6), Times(2.0e-3, 3.6e-6, 25e-6), Times(2.0e-3, 3.6e-6, 60e-6), Times(6.8e-3, 15e-6)],
)
def test_requests_in_bursts_are_served_as_fast_as_by_the_best_single_way(times):
    """Loads last for some steps only there, and prompts take half of the time."""
    fixed = {way: Burst(times).seconds(lambda num, fills, way=way: way) for way in WAYS}
    ways, burst, load, took = StepWays(), Burst(times), None, []

    def way_of(num_seqs: int, fills: bool) -> Way:
        nonlocal load
        ways.note_prompts(fills)
        load = ways.plan(num_seqs, live())
        return load.way if load.way.halves is False or num_seqs > 1 else WHOLE

    for _ in range(6):
        took.append(burst.seconds(way_of, lambda way, step: ways.observe(load, way, step)))
    assert max(took) < 1.25 * min(fixed.values()), (took, fixed)
    assert sum(took[2:]) / 4 < 1.07 * min(fixed.values()), (took, fixed)


def test_a_way_is_not_better_because_the_load_rose_or_fell_while_it_was_tried():
    for first, change in ((100, 2), (200, -2)):
        steps = [TimedStep(num, num, 0.0, 1e-3) for num in range(first, first + 28 * change, change)]
        trial = Trial(HALVES, steps[:8], steps[11:17], steps[20:26])
        assert trial.gain() == pytest.approx(1.0, abs=0.05)


def test_one_way_is_tried_at_a_time_though_steps_are_learned_two_late():
    for num_before in range(FIRST_STEPS, FIRST_STEPS + 16):  # at some of them a trial begins
        ways, planned, num_tried = StepWays(), [], 0
        for step in range(num_before + 12):
            num_seqs = 64 if step < num_before else 128
            load = ways.plan(num_seqs, live())
            planned.append((load, load.way, TimedStep(num_seqs, num_seqs, 0.0, 1e-3)))
            if len(planned) > 2:
                ways.observe(*planned.pop(0))
            tried = [load for load in ways._loads.values() if load.trial is not None]
            num_tried = max(num_tried, len(tried))
            assert tried == ([ways._trying] if ways._trying is not None else [])
        assert num_tried == 1


def test_steps_of_another_load_are_not_what_a_trial_is_compared_with():
    machine, ways = Machine(), StepWays()
    machine.run(ways, 256, FIRST_STEPS - 1)
    while (trial := ways.plan(8, live()).trial) is None:
        machine.step(ways, 8)
    assert {step.num_seqs for step in trial.before} == {8}


def test_steps_that_prompts_fill_are_another_load_that_begins_as_the_one_without_was_found_to_be():
    machine, ways = Machine(), StepWays()
    machine.run(ways, 256, 100)
    alone = ways.plan(256, live())
    for is_full in (True, True, False, True, True):
        ways.note_prompts(is_full)
        assert ways.plan(256, live()) is alone
    ways.note_prompts(True)
    filled = ways.plan(256, live())
    assert filled is not alone and filled.kept == alone.kept == HALVES


def test_a_load_is_known_when_every_way_but_the_one_that_is_kept_was_tried():
    load = Load(Kind(WAYS, True, False), 8, kept=BARE, next_trials={WHOLE: 1.0})
    load.next_trials[BARE] = 2.0  # it was tried and lost, before it was kept
    assert not load.is_known
    load.next_trials[HALVES] = 3.0
    assert load.is_known


def test_a_trial_ends_where_its_load_does_and_takes_few_steps_while_much_is_to_be_learned():
    machine, ways = Machine(), StepWays()
    while ways.plan(64, live()).trial is None:
        machine.step(ways, 64)
    tried = ways.plan(64, live())
    assert ways.plan(90, live()) is tried  # nearly the same
    assert ways.plan(8, live()) is not tried and tried.trial is None and tried.way == WHOLE
    num_steps, num_tried = 600, 0
    for step in range(num_steps):  # always a load that was not met before
        num_seqs = 1 << (step // 20 % 10)
        num_tried += machine.step(ways, num_seqs) != ways.plan(num_seqs, live()).kept
    assert 0 < num_tried < 0.25 * num_steps
