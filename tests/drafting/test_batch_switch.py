"""Whether whole steps draft: on a device that waits for the host where they do, and never where they do not."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from specserve.drafting.batch_switch import TRIAL_SHARE, BatchSwitch, TimedStep

PROMPT_ROW_S = 3e-6


@dataclass
class Machine:
    """Steps that are queued ahead take the longer of device and host, others the gap and the device one after the
    other; a drafted step gives `tokens` a sequence."""

    row_s: float = 2e-6
    gap_of_sequence_s: float = 20e-6
    tokens: float = 3.0
    noise: float = 0.0
    is_ahead: bool = True
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    was_asked: bool = True
    num_prompt_rows_due: int = 0
    tokens_made: float = 0.0
    seconds: float = 0.0

    def rates(self, num_seqs: int) -> tuple[float, float]:
        """Tokens a second without and with drafts, from then on."""
        seconds = [self._seconds(num_seqs, is_asked, is_asked, 0) for is_asked in (False, True)]
        return num_seqs / seconds[0], num_seqs * self.tokens / seconds[1]

    def _seconds(self, num_seqs: int, is_asked: bool, was_asked: bool, num_prompt_rows: int) -> float:
        rows = num_seqs * (5 if is_asked else 1)
        device = 1.3e-3 + self.row_s * rows + PROMPT_ROW_S * num_prompt_rows
        if not is_asked and not was_asked and self.is_ahead:
            return max(device, 8e-6 * num_seqs)
        return device + 2e-4 + (self.gap_of_sequence_s if is_asked else 8e-6) * num_seqs

    def step(self, switch: BatchSwitch, num_seqs: int, prompts: bool = False) -> bool:
        """Whether it drafted."""
        load = switch.load(num_seqs, self.is_ahead)
        is_asked = load.asks
        num_prompt_rows = 0
        if prompts and self.rng.random() < 0.6:  # one row for each token that is made
            num_prompt_rows, self.num_prompt_rows_due = min(1024, int(self.num_prompt_rows_due)), 0
        took = self._seconds(num_seqs, is_asked, self.was_asked, num_prompt_rows)
        took *= 1 + self.noise * self.rng.random()
        seconds = took + 0.02 * (self.noise > 0 and self.rng.random() < 0.01)  # stalls are nobody's fault
        kept = self.rng.gauss(self.tokens, self.noise / num_seqs**0.5) if is_asked else 1.0
        num_tokens = round(num_seqs * max(1.0, kept))
        # What is expected of prompts' rows is half too much.
        prompt_s = 1.5 * PROMPT_ROW_S * num_prompt_rows
        switch.observe(load, is_asked, TimedStep(num_seqs, num_tokens, num_prompt_rows, prompt_s, seconds))
        self.was_asked = is_asked
        self.tokens_made, self.seconds = self.tokens_made + num_tokens, self.seconds + took
        self.num_prompt_rows_due += num_tokens
        return is_asked

    def run(self, switch: BatchSwitch, num_seqs: int, num_steps: int, prompts: bool = False) -> tuple[float, float]:
        """Share of steps that drafted, and tokens a second."""
        self.tokens_made = self.seconds = 0.0
        drafted = sum(self.step(switch, num_seqs, prompts) for _ in range(num_steps))
        return drafted / num_steps, self.tokens_made / self.seconds


def test_where_the_host_takes_longer_than_drafts_bring_they_are_left_out_within_some_tens_of_steps():
    machine, switch = Machine(), BatchSwitch()
    off, on = machine.rates(256)
    assert on < 0.85 * off
    machine.run(switch, 256, 30)
    drafted, rate = machine.run(switch, 256, 5000)
    assert 0 < drafted < 0.02 and rate > 0.99 * off


@pytest.mark.parametrize("num_seqs", [1, 8, 32])
def test_where_drafts_pay_they_stay_and_trials_without_them_cost_next_to_nothing(num_seqs):
    machine, switch = Machine(), BatchSwitch()
    off, on = machine.rates(num_seqs)
    assert on > 1.5 * off
    drafted, rate = machine.run(switch, num_seqs, 5000)
    assert 0.97 < drafted < 1 and rate > (1 - 2 * TRIAL_SHARE) * on


def test_a_load_that_falls_brings_drafts_back_and_one_that_rises_leaves_them_out_again():
    machine, switch = Machine(), BatchSwitch()
    machine.run(switch, 256, 100)
    for _ in range(3):
        assert machine.run(switch, 8, 100)[0] > 0.9
        assert machine.run(switch, 256, 100)[0] < 0.1  # that was learned
    assert machine.run(switch, 400, 10)[0] == 0  # and holds for more


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("num_seqs", [1, 32, 96, 160])
@pytest.mark.parametrize("seed", range(2))
def test_noise_stalls_and_prompts_leave_nearly_all_of_the_better_way(seed, num_seqs, prompts):
    machine = Machine(noise=0.05, rng=random.Random(seed))
    best = 0.0
    for tokens in (machine.tokens, 1.0):  # all steps draft or none
        fixed = Machine(noise=0.05, rng=random.Random(seed), tokens=tokens)
        always = _Always(tokens > 1)
        best = max(best, fixed.run(always, num_seqs, 2500, prompts)[1])
    switch = BatchSwitch()
    machine.run(switch, num_seqs, 50, prompts)
    assert machine.run(switch, num_seqs, 2500, prompts)[1] > 0.975 * best


class _Always(BatchSwitch):
    def __init__(self, is_on: bool):
        super().__init__()
        self._is_on = is_on

    def load(self, num_seqs, can_run_ahead):
        load = super().load(num_seqs, can_run_ahead)
        load.is_drafting, load.trial = self._is_on, None
        return load


def test_drafts_that_are_worth_more_or_less_than_before_are_noticed():
    machine, switch = Machine(), BatchSwitch()
    machine.run(switch, 128, 500)
    machine.tokens = 1.2
    machine.run(switch, 128, 1000)
    assert machine.run(switch, 128, 100)[0] < 0.1
    machine.tokens = 5.0
    machine.run(switch, 128, 4000)
    assert machine.run(switch, 128, 100)[0] > 0.9


def test_where_no_step_can_be_queued_ahead_drafts_are_compared_with_steps_that_wait_as_well():
    machine, switch = Machine(gap_of_sequence_s=10e-6, tokens=2.2), BatchSwitch()
    machine.is_ahead = False
    machine.run(switch, 256, 50)
    assert machine.run(switch, 256, 200)[0] > 0.9
    machine.is_ahead, machine.tokens = True, 1.5
    machine.run(switch, 256, 50)
    assert machine.run(switch, 256, 200)[0] < 0.1


def test_ways_that_are_nearly_equal_do_not_flap():
    machine = Machine(tokens=1.0)
    off, on = machine.rates(128)
    machine.tokens = 1.004 * off / on
    switch = BatchSwitch()
    kept = []
    for _ in range(3000):
        machine.step(switch, 128)
        kept.append(switch.load(128, True).is_drafting)
    assert len(set(kept)) == 1


def test_sources_that_are_all_switched_off_leave_steps_to_be_queued_ahead_and_are_tried_again():
    """Nobody is asked though drafts would be, until a trial says that they are tried."""
    switch, tried = BatchSwitch(), []
    for step in range(400):
        load = switch.load(8, True)
        if switch.observe(load, False, TimedStep(8, 8, 0, 0.0, 1.3e-3)):
            tried.append(step)
    assert not switch.load(8, True).is_drafting
    assert 64 < tried[0] < 120 and len(tried) < 5


def test_no_trial_begins_while_another_switch_measures_what_drafts_are_worth():
    """Unless that takes for ever."""
    switch = BatchSwitch()
    load = switch.load(256, True)
    started = []
    for step in range(200):
        switch.observe(load, True, TimedStep(256, 256, 0, 0.0, 8e-3), may_try=load.was_tried)
        if load.trial is not None:
            started.append(step)
    assert 60 < started[0] < 70
