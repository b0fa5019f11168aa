"""Step costs: looked at ever more seldom, measured again where they have tilted, and that takes little of the time."""

from __future__ import annotations

import pytest

from specserve.drafting.cost_checks import FIRST_S, MOST_S, CostChecks
from specserve.drafting.cost_model import MEASURED_ROWS, CostModel, MeasuredCosts, StepShape

ALONE = dict(zip(MEASURED_ROWS, (0.0066, 0.0068, 0.0069, 0.0072, 0.0078, 0.0115, 0.0219), strict=True))
BUSY = dict(zip(MEASURED_ROWS, (0.0171, 0.0203, 0.0177, 0.0210, 0.0230, 0.0483, 0.1007), strict=True))


class Place:
    """A table that was measured by `before`, on a machine whose steps take what `now` says; a turn is half a second."""

    def __init__(self, before, now):
        self.now, self.time, self.timed_at, self.kept, self.is_wanted = now, 0.0, [], [], False
        self.table = CostModel.of(MeasuredCosts.measure(lambda rows, *_: before[rows]))
        self.checks = CostChecks(self.table, self.step, self.kept.append, lambda: self.time)

    def step(self, num_rows, num_seqs=1, context_len=0):
        self.timed_at.append(self.time)
        return None if self.is_wanted else self.now[num_rows]

    def idle(self, seconds, is_busy=False):
        for _ in range(int(2 * seconds)):
            self.checks.take_turn(is_busy)
            self.time += 0.5


@pytest.mark.parametrize("is_busy", [False, True])
def test_what_was_measured_beside_another_process_is_measured_again_once_that_is_gone(is_busy):
    place = Place(BUSY, ALONE)
    place.idle(FIRST_S - 1)
    assert not place.timed_at
    place.idle(60, is_busy)
    assert [place.table.seconds(rows) for rows in MEASURED_ROWS] == pytest.approx(list(ALONE.values()))
    assert [costs.by_rows for costs in place.kept] == [ALONE]
    assert max(map(place.timed_at.count, place.timed_at)) == 2 - is_busy, "whoever comes waits for no more"


def test_what_holds_is_looked_at_ever_more_seldom_and_left_alone():
    place = Place(ALONE, {rows: 2.5 * seconds for rows, seconds in ALONE.items()})
    place.table.observe(16, StepShape(), 0.009)
    before = [place.table.seconds(rows) for rows in MEASURED_ROWS]
    place.idle(3600)
    assert [place.table.seconds(rows) for rows in MEASURED_ROWS] == before and not place.kept
    pauses = [later - earlier for earlier, later in zip(place.timed_at, place.timed_at[1:], strict=False)]
    assert max(pauses) == pytest.approx(MOST_S, abs=1) and len(place.timed_at) <= 12 * 20


def test_a_look_that_a_request_ends_teaches_nothing_and_comes_again():
    place = Place(BUSY, ALONE)
    place.is_wanted = True
    place.idle(20)
    assert place.timed_at and not place.kept
    place.is_wanted = False
    place.idle(60)
    assert len(place.kept) == 1


def test_looks_take_one_part_in_a_hundred_of_a_slow_machine():
    place = Place({rows: 100 * seconds for rows, seconds in ALONE.items()}, ALONE)
    place.now = {rows: 100 * seconds for rows, seconds in ALONE.items()}
    place.idle(7200, is_busy=True)
    spent = sum(place.now[1] if idx % 2 == 0 else place.now[32] for idx in range(len(place.timed_at)))
    assert len(place.timed_at) >= 12 and spent < 7200 * 0.011
