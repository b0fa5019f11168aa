"""Which drafts a step verifies: against brute force, and what growth, switches and the clock make of it."""

from __future__ import annotations

import itertools
import random

import pytest

from specserve.drafters.acceptance import SharedAcceptance
from specserve.drafters.head_source import HeadRunner
from specserve.drafters.native import NativeDrafts
from specserve.drafters.protocol import Guess
from specserve.drafting.budget import best_prefix
from specserve.drafting.cost_model import CostModel, StepShape
from specserve.drafting.drafts import GrowingDraft, Growth, StepPlan
from specserve.drafting.growth import DraftGrowth
from specserve.drafting.host_cost import HostCost
from specserve.drafting.native_growth import NativeGrowth
from specserve.drafting.switch import DraftSwitch
from specserve.messages import GenerateRequest, SamplingParams
from specserve.schedule.scheduler import ScheduledSequence
from specserve.schedule.sequence import Sequence


def staircase(rng: random.Random, num_rows: int) -> dict[int, float]:
    seconds, table = rng.uniform(1.0, 20.0), {}
    for rows in range(1, num_rows + 1):
        seconds += rng.choice([0.0, 0.0, rng.uniform(0.0, 1.0), rng.uniform(0.0, 6.0)])
        table[rows] = seconds
    return table


def chains(rng: random.Random, num_seqs: int, length: int) -> list[list[float]]:
    """Rates of being right, by position, of each sequence."""
    return [[rng.choice([rng.random(), rng.uniform(0.7, 1.0)]) for _ in range(length)] for _ in range(num_seqs)]


def best_by_force(rates: list[list[float]], table: dict[int, float], draft_s: float = 0.0) -> float:
    """The most tokens a second over all draft lengths of all sequences."""
    best = 0.0
    for lens in itertools.product(*(range(len(chain) + 1) for chain in rates)):
        tokens = float(len(rates))
        for chain, num in zip(rates, lens, strict=True):
            tokens += sum(itertools.accumulate(chain[:num], lambda a, b: a * b))
        best = max(best, tokens / (table[len(rates) + sum(lens)] + draft_s))
    return best


@pytest.mark.parametrize("seed", range(200))
def test_the_best_prefix_is_the_best_of_all_sets(seed: int) -> None:
    rng = random.Random(seed)
    rates = chains(rng, rng.randint(1, 3), 4)
    table = staircase(rng, 20)
    survivals = sorted((s for chain in rates for s in itertools.accumulate(chain, lambda a, b: a * b)), reverse=True)
    n, draft_s = len(rates), rng.uniform(0.0, 2.0)
    num = best_prefix(survivals, float(n), lambda m: table[n + m] + draft_s)
    rate = (n + sum(survivals[:num])) / (table[n + num] + draft_s)
    assert rate == pytest.approx(best_by_force(rates, table, draft_s))


def test_the_fewest_drafts_that_reach_the_best_rate_and_none_that_gain_too_little() -> None:
    assert best_prefix([0.0, 0.0], 1.0, lambda m: 1.0) == 0
    assert best_prefix([0.5, 0.5], 1.0, lambda m: 1.0 + 0.5 * m) == 0
    assert best_prefix([0.02], 4.0, lambda m: 1.0, enter_gain=0.01) == 0
    assert best_prefix([0.02], 4.0, lambda m: 1.0) == 1
    assert best_prefix([], 4.0, lambda m: 1.0) == 0


class Chain:
    """A source whose guesses are right at the given rates, and says so."""

    source = "chain"

    def __init__(self, rates: list[float]):
        self.prior, self.at, self.num_asked = rates, 0, 0

    def begin(self, tokens):
        self.at = 0

    def peek(self):
        self.num_asked += 1
        return Guess(7, self.at) if self.at < len(self.prior) else None

    def follow(self, token):
        self.at += 1


@pytest.fixture(params=["python", "native"])
def growth(request) -> Growth:
    return DraftGrowth(HeadRunner()) if request.param == "python" else NativeGrowth(NativeDrafts(), HeadRunner())


def draft_of(growth: Growth, rates: list[float], *, limit: int = 16, is_fixed: bool = False) -> GrowingDraft:
    seq = Sequence(0, GenerateRequest("a", [1, 2], SamplingParams(max_tokens=50)))
    chooser = growth.chooser([Chain(rates)], SharedAcceptance(), None)
    item = ScheduledSequence(seq, 1)
    return GrowingDraft(chooser, limit, is_fixed, DraftSwitch(), item=item, limit=limit)


def grown(growth: Growth, drafts: list[GrowingDraft], table: dict[int, float], *, num_rows=None, max_rows=500):
    """Admitted lengths; seconds in the table are long beside what drafting takes here."""
    rows = len(drafts) if num_rows is None else num_rows
    growth.grow(drafts, StepPlan(CostModel(table), StepShape(), len(drafts), rows, max_rows))
    return [draft.num_admitted for draft in drafts]


def nodes(rng: random.Random, num_rows: int) -> dict[int, float]:
    """Dear and cheap regions between powers of two."""
    seconds, table = rng.uniform(5.0, 20.0), {}
    for rows in range(1, num_rows + 1):
        if rows.bit_count() == 1:
            per_row = rng.choice([0.0, rng.uniform(0.0, 1.0), rng.uniform(0.0, 4.0)])
        seconds += per_row
        table[rows] = seconds
    return table


def affine(rng: random.Random, num_rows: int) -> dict[int, float]:
    fixed, per_row = rng.uniform(5.0, 50.0), rng.uniform(0.1, 3.0)
    return {rows: fixed + per_row * rows for rows in range(1, num_rows + 1)}


@pytest.mark.parametrize(
    ("tables", "worst", "mean"), [(affine, 0.999, 0.9999), (staircase, 0.85, 0.997), (nodes, 0.85, 0.995)]
)
@pytest.mark.parametrize("growth", ["native"], indirect=True)
def test_growth_reaches_the_best_of_all_sets_or_nearly(growth, tables, worst, mean) -> None:
    shares = []
    for seed in range(300):
        rng = random.Random(seed)
        rates = chains(rng, rng.randint(1, 4), 4)
        table = tables(rng, 24)
        growth = NativeGrowth(growth.library, None)  # knows nothing yet of what guesses cost
        lens = grown(growth, [draft_of(growth, chain) for chain in rates], table)
        tokens = len(rates) + sum(
            sum(itertools.accumulate(chain[:num], lambda a, b: a * b)) for chain, num in zip(rates, lens, strict=True)
        )
        shares.append(tokens / table[len(rates) + sum(lens)] / best_by_force(rates, table))
    assert min(shares) > worst
    assert sum(shares) / len(shares) > mean


def test_prompts_in_the_step_do_not_make_drafts_cheap(growth) -> None:
    table = {1: 21.0, 8: 28.0, 64: 84.0}
    rates = [[0.9, 0.5, 0.3, 0.1] for _ in range(8)]
    alone = grown(growth, [draft_of(growth, chain) for chain in rates], table)
    assert grown(growth, [draft_of(growth, chain) for chain in rates], table, num_rows=408) == alone
    assert 0 < sum(alone) < 32


def test_what_the_host_takes_for_every_step_makes_rows_cheap_and_what_it_takes_for_a_draft_makes_them_dear(
    growth,
) -> None:
    table = {1: 1.0, 64: 3.5}
    rates = [[0.9, 0.8, 0.7, 0.6, 0.5] for _ in range(8)]

    def num_drafts(*weights: float) -> int:
        host = HostCost()
        host._weights = list(weights)
        drafts = [draft_of(growth, chain) for chain in rates]
        growth.grow(drafts, StepPlan(CostModel(table), StepShape(), 8, 8, 500, host))
        return sum(draft.num_admitted for draft in drafts)

    free = num_drafts(0.0, 0.0, 0.0)
    assert num_drafts(0.0, 0.0, 0.2) < free < num_drafts(1.0, 0.3, 0.0)


def test_the_host_s_parts_are_learned_from_steps_that_differ_and_stalls_are_not() -> None:
    rng, host = random.Random(0), HostCost()
    for step in range(600):
        num_seqs, num_drafts = rng.choice((1, 8, 64)), rng.choice((0, 10, 200))
        seconds = 5e-4 + 2e-5 * num_seqs + 3e-6 * num_drafts
        host.observe(num_seqs, num_drafts, seconds * (100 if step % 50 == 0 else rng.uniform(0.95, 1.05)))
    assert host.draft_s == pytest.approx(3e-6, rel=0.25)
    for num_seqs, num_drafts in ((1, 0), (8, 100), (64, 200)):
        seconds = 5e-4 + 2e-5 * num_seqs + 3e-6 * num_drafts
        assert host.seconds(num_seqs, num_drafts) == pytest.approx(seconds, rel=0.2)


def test_fixed_drafts_ignore_the_price_and_leave_the_others_theirs(growth) -> None:
    table = {1: 1.0, 64: 64.0}
    assert grown(growth, [draft_of(growth, [0.1] * 9, limit=4, is_fixed=True)], table) == [4]
    fixed, auto = draft_of(growth, [0.1] * 3, is_fixed=True), draft_of(growth, [0.1] * 3)
    assert grown(growth, [fixed, auto], table) == [3, 0]


def test_no_draft_passes_the_row_limit(growth) -> None:
    table = {1: 1.0, 64: 1.0}
    for is_fixed in (False, True):
        drafts = [draft_of(growth, [0.9] * 9, is_fixed=is_fixed) for _ in range(3)]
        assert sum(grown(growth, drafts, table, max_rows=8)) == 5


def test_without_gain_a_single_position_is_asked_for(growth) -> None:
    draft = draft_of(growth, [0.2] * 9)
    assert grown(growth, [draft], {1: 1.0, 64: 64.0}) == [0]
    assert draft.chooser.sources[0].num_asked == 1


def test_guesses_that_cost_more_than_they_bring_are_not_asked_for(growth) -> None:
    draft = draft_of(growth, [0.9] * 9)
    grown(growth, [draft], {1: 1e-6, 64: 1e-6})  # a step that is quicker than any guess
    assert draft.chooser.sources[0].num_asked == 1


def run_switch(switch: DraftSwitch, gain: float, num_steps: int, num_seqs: int = 8) -> int:
    """Steps of `num_steps` that asked."""
    asked = 0
    for _ in range(num_steps):
        if switch.asks(num_seqs):
            asked += 1
            switch.observe(gain, num_seqs)
    return asked


def test_sources_that_bring_nothing_are_asked_ever_more_seldom() -> None:
    switch = DraftSwitch()
    assert run_switch(switch, -0.03, 100) < 40
    assert run_switch(switch, -0.03, 5000) < 100
    assert run_switch(switch, -0.03, 5000) < 60
    assert not switch.is_on


def test_sources_that_became_useful_are_found_again_and_kept() -> None:
    switch = DraftSwitch()
    run_switch(switch, -0.05, 2000)
    run_switch(switch, 0.5, 600)
    assert switch.is_on
    assert run_switch(switch, 0.5, 100) == 100


def test_a_switch_does_not_flap_between_its_thresholds() -> None:
    for is_on in (True, False):
        switch = DraftSwitch()
        if not is_on:
            run_switch(switch, -0.05, 100)
        changes = 0
        for step in range(2000):
            before = switch.is_on
            if switch.asks(8):
                switch.observe(0.008 if step % 2 else -0.008, 8)
            changes += switch.is_on != before
        assert changes == 0


def test_a_fallen_load_is_a_reason_to_try_at_once() -> None:
    switch = DraftSwitch()
    run_switch(switch, -0.05, 3000, num_seqs=64)
    assert not switch.asks(64)
    assert switch.asks(4)
