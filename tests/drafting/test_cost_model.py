"""The cost table: what is measured at start, what steps teach it, and what must not mislead it."""

from __future__ import annotations

import random

import pytest

from specserve.drafting.cost_model import MEASURED_ROWS, NODES, CostModel, MeanSeconds, MeasuredCosts, StepShape


def affine(fixed: float, per_row: float) -> CostModel:
    return CostModel({rows: fixed + per_row * rows for rows in MEASURED_ROWS})


def test_interpolates_extrapolates_and_never_falls() -> None:
    model = CostModel({1: 1.0, 2: 0.5, 4: 3.0})
    assert model.seconds(1) == model.seconds(2) == 1.0
    assert model.seconds(3) == pytest.approx(2.0)
    assert model.seconds(6) == pytest.approx(5.0)
    assert model.seconds(2 * NODES[-1]) == pytest.approx(2 * NODES[-1] - 1.0)


def test_a_busy_moment_at_start_makes_no_shape_look_dear() -> None:
    num_calls = 0

    def timed(rows: int, num_seqs: int = 1, context_len: int = 0) -> float:
        nonlocal num_calls
        num_calls += 1
        return (10.0 if 4 <= num_calls < 30 else 1.0) * rows

    model = CostModel.of(MeasuredCosts.measure(timed))
    assert [model.seconds(rows) for rows in MEASURED_ROWS] == pytest.approx(list(MEASURED_ROWS))


def test_measures_the_fastest_repeat_and_takes_shapes_apart() -> None:
    calls: list[int] = []

    def timed(rows: int, num_seqs: int = 1, context_len: int = 0) -> float:
        calls.append(rows)
        late = 1.0 if len(calls) % 3 else 0.0
        keys = num_seqs * context_len
        return 10.0 + rows + 2.0 * (num_seqs - 1) + 0.01 * keys + 0.001 * context_len * (rows - num_seqs) + late

    model = CostModel.of(MeasuredCosts.measure(timed))
    assert calls[0] == MEASURED_ROWS[0] and set(calls) == set(MEASURED_ROWS)
    assert model.seconds(MEASURED_ROWS[-1]) == 10.0 + MEASURED_ROWS[-1]
    shape = StepShape(num_seqs=4, num_keys=4 * 300)
    assert model.seconds(12, shape) == pytest.approx(10 + 12 + 2 * 3 + 0.01 * 1200 + 0.001 * 300 * 8)


def test_a_cheap_region_behind_a_dear_row_makes_rows_cheap() -> None:
    model = CostModel({1: 10.0, 4: 10.0, 5: 16.0, 16: 16.0})
    curve = model.curve(StepShape())
    assert curve.row_seconds(4, room=1) == pytest.approx(6.0)
    assert curve.row_seconds(4, room=8) == pytest.approx(6.0 / 8)
    assert curve.row_seconds(1, room=8) == 0.0


def relative_shape(model: CostModel, num_adapters: int, rows: list[int]) -> list[float]:
    seconds = [model.seconds(r, StepShape(num_adapters=num_adapters)) for r in rows]
    return [value / seconds[0] for value in seconds]


@pytest.mark.parametrize("seed", range(5))
def test_steps_correct_a_wrong_table_on_a_machine_that_drifts_and_stalls(seed: int) -> None:
    rng = random.Random(seed)
    rows = [1, 2, 4, 8, 16, 32, 64]
    truth = [20.0]
    for _ in rows[1:]:
        truth.append(truth[-1] * rng.uniform(1.0, 1.8))
    model = CostModel({r: 20.0 + 0.2 * r for r in rows})
    drift = 1.0
    for _ in range(3000):
        drift = min(10.0, max(0.1, drift * rng.uniform(0.97, 1.03)))
        idx = rng.randrange(len(rows))
        stall = rng.choice([5.0, 50.0]) if rng.random() < 0.05 else 1.0
        model.observe(rows[idx], StepShape(num_adapters=4), truth[idx] * drift * stall * rng.uniform(0.95, 1.1))
    got, want = relative_shape(model, 4, rows), [value / truth[0] for value in truth]
    assert got == pytest.approx(want, rel=0.2)
    assert got == sorted(got)


def test_a_column_starts_as_its_nearest_and_learns_apart() -> None:
    model = affine(20.0, 0.5)
    for _ in range(400):
        model.observe(1, StepShape(num_adapters=1), 20.5)
        model.observe(32, StepShape(num_adapters=1), 72.0)
    assert relative_shape(model, 8, [1, 32]) == relative_shape(model, 1, [1, 32])
    assert relative_shape(model, 1, [1, 32])[1] == pytest.approx(72 / 20.5, rel=0.1)
    assert relative_shape(model, 0, [1, 32])[1] == pytest.approx(36 / 20.5, rel=0.01)
    for _ in range(400):
        model.observe(1, StepShape(num_adapters=8), 30.0)
        model.observe(32, StepShape(num_adapters=8), 60.0)
    assert relative_shape(model, 8, [1, 32])[1] == pytest.approx(2.0, rel=0.1)
    assert relative_shape(model, 1, [1, 32])[1] == pytest.approx(72 / 20.5, rel=0.1)


def test_one_stalled_step_changes_no_ratio_by_much() -> None:
    model = affine(20.0, 0.5)
    before = model.seconds(16) / model.seconds(1)
    model.observe(16, StepShape(), 1e3 * model.seconds(16))
    assert model.seconds(16) / model.seconds(1) == pytest.approx(before, rel=0.04)


def test_a_machine_that_slowed_tenfold_changes_no_ratio() -> None:
    model = affine(20.0, 0.5)
    for step in range(400):
        rows = (1, 8, 64)[step % 3]
        model.observe(rows, StepShape(), 10 * (20.0 + 0.5 * rows))
    assert model.seconds(1) == pytest.approx(205.0, rel=0.15)
    assert model.seconds(64) / model.seconds(1) == pytest.approx(52 / 20.5, rel=0.1)


def test_a_long_context_is_no_fault_of_its_rows() -> None:
    model = CostModel({rows: 20.0 + 0.5 * rows for rows in MEASURED_ROWS}, key_s=0.01)
    before = model.seconds(8) / model.seconds(1)
    for _ in range(300):
        model.observe(8, StepShape(num_keys=4000), 20.0 + 4.0 + 40.0)
        model.observe(1, StepShape(), 20.5)
    assert model.seconds(8) / model.seconds(1) == pytest.approx(before, rel=0.02)


def test_mean_seconds_forgets_a_slow_start_and_bounds_a_stall() -> None:
    mean = MeanSeconds()
    for seconds in (5.0, 1.0, 1.2):
        mean.observe(seconds)
    assert mean.seconds == 1.0
    mean.observe(1000.0)
    assert mean.seconds == pytest.approx(1.1)
