"""How long the chains of a launch are, by the drafts that were taken lately."""

from __future__ import annotations

import numpy as np

from specserve.compute.cuda.chain_lens import ChainLens


def launches(lens: ChainLens, num_drafts: list[int], num: int) -> list[int]:
    """The lengths of `num` launches behind drafts of so many tokens."""
    seats = np.arange(len(num_drafts))
    return [lens.plan(seats, np.array(num_drafts))[0] for _ in range(num)]


def test_the_first_launches_are_as_long_as_any_draft_may_be():
    assert launches(ChainLens((4, 8, 16), 2), [0, 0], 1) == [16]


def test_a_length_serves_drafts_that_end_before_it_does():
    assert launches(ChainLens((4, 8), 2), [3, 0], 40)[-30:] == [4] * 30


def test_drafts_that_need_a_longer_chain_have_it_in_the_next_launch():
    lens = ChainLens((4, 8), 2)
    launches(lens, [3, 1], 40)
    assert launches(lens, [1, 5], 5) == [8] * 5


def test_a_budget_of_a_whole_length_is_served_by_it_and_seldom_tried_further():
    lens = ChainLens((4, 8), 1)
    launches(lens, [3], 20)
    made = launches(lens, [4], 400)
    assert made[0] == 8, "whether more is wanted, only a longer chain can tell"
    assert 5 <= made.count(8) <= 14 and set(made[-64:]) == {4, 8}


def test_a_trial_that_is_taken_up_lasts_and_the_next_one_comes_at_once():
    lens = ChainLens((4, 8), 1)
    launches(lens, [4], 200)
    assert launches(lens, [6], 3) == [8] * 3
    launches(lens, [3], 10)
    assert launches(lens, [4], 2) == [8, 4]


def test_a_sequence_wants_what_its_own_drafts_take():
    lens = ChainLens((4, 8), 3)
    seats = np.array([2, 0])
    for _ in range(20):
        num, wanted = lens.plan(seats, np.array([6, 1]))
    assert num == 8 and wanted.tolist() == [8, 4]
    lens.start([1])
    assert lens.plan(np.array([1]), np.array([0]))[1].tolist() == [8], "a new one is like the rest"


def test_one_length_is_all_there_is():
    assert launches(ChainLens((3,), 1), [3], 5) == [3] * 5
