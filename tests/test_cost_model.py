"""The price of a draft row: what it must be expected to add so that the step makes more tokens a second."""

from __future__ import annotations

import itertools
import random

import pytest

from specserve.cost_model import MEASURED_ROWS, CostModel


def affine(fixed: float, per_row: float) -> CostModel:
    return CostModel({rows: fixed + per_row * rows for rows in MEASURED_ROWS})


def test_interpolates_extrapolates_and_never_falls() -> None:
    model = CostModel({1: 1.0, 2: 0.5, 4: 3.0})
    assert model.seconds(1) == model.seconds(2) == 1.0
    assert model.seconds(3) == pytest.approx(2.0)
    assert model.seconds(6) == pytest.approx(5.0)


def test_measures_the_fastest_repeat() -> None:
    calls: list[int] = []

    def timed(rows: int) -> float:
        calls.append(rows)
        return rows + len(calls) % 3

    model = CostModel.measure(timed)
    assert calls[0] == MEASURED_ROWS[0] and set(calls) == set(MEASURED_ROWS)
    assert model.seconds(MEASURED_ROWS[-1]) == MEASURED_ROWS[-1]


@pytest.mark.parametrize("seed", range(20))
def test_taking_what_beats_its_price_makes_the_most_tokens_a_second(seed: int) -> None:
    rng = random.Random(seed)
    model = affine(rng.uniform(5, 50), rng.uniform(0.5, 3))
    num_decoding = rng.randint(1, 8)
    survivals = sorted((rng.random() for _ in range(8)), reverse=True)

    def rate(chosen: tuple[float, ...]) -> float:
        return (num_decoding + sum(chosen)) / model.seconds(num_decoding + len(chosen))

    taken: list[float] = []
    for survival in survivals:
        rows = num_decoding + len(taken)
        if survival < model.row_price(num_decoding + sum(taken), rows, rows):
            break
        taken.append(survival)
    subsets = itertools.chain.from_iterable(itertools.combinations(survivals, n) for n in range(9))
    assert rate(tuple(taken)) == pytest.approx(max(rate(subset) for subset in subsets))


def test_prompts_in_the_step_do_not_make_drafts_cheap() -> None:
    model = affine(20.0, 1.0)
    assert model.row_price(8.0, 8, 500) == pytest.approx(model.row_price(8.0, 8, 8))
