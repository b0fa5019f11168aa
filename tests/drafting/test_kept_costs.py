"""Step costs that are kept from one start to the next: believed where they hold, measured again where not."""

from __future__ import annotations

import os

import pytest

from specserve.drafting import kept_costs
from specserve.drafting.cost_model import MEASURED_ROWS, MEASURED_SHAPES, CostModel, MeasuredCosts, StepShape
from specserve.drafting.kept_costs import costs_file, measured_costs


class Machine:
    """Steps take `fixed` and `per_row` seconds, and something for sequences and keys."""

    def __init__(self, fixed: float, per_row: float):
        self.fixed, self.per_row, self.rows = fixed, per_row, []

    def __call__(self, num_rows: int, num_seqs: int = 1, context_len: int = 0) -> float:
        self.rows.append(num_rows)
        return self.fixed + self.per_row * num_rows + 0.1 * self.fixed * (num_seqs - 1) + 1e-5 * context_len


@pytest.fixture
def file(tmp_path):
    return tmp_path / "deep" / "costs.json"


def times(model):
    return [model.seconds(rows) for rows in MEASURED_ROWS]


def test_a_later_start_times_few_steps_and_takes_the_rest_at_the_speed_of_now(file):
    first = measured_costs(Machine(1.0, 0.1), file)
    slower = Machine(2.0, 0.2)
    second = measured_costs(slower, file)
    assert times(second) == pytest.approx([2 * seconds for seconds in times(first)])
    assert len(slower.rows) <= 10 and max(slower.rows) < MEASURED_ROWS[-1]


@pytest.mark.parametrize("changed", [(1.0, 0.5), (0.01, 0.001)], ids=["another shape", "another machine"])
def test_what_no_longer_holds_is_measured_again_and_kept(file, changed):
    measured_costs(Machine(1.0, 0.1), file)
    now = Machine(*changed)
    assert times(measured_costs(now, file)) == pytest.approx([now(rows) for rows in MEASURED_ROWS])
    num = len(now.rows)
    measured_costs(now, file)
    assert len(now.rows) - num <= 10, "the new ones are kept"


@pytest.mark.parametrize("shape", [shape for shape in MEASURED_SHAPES if shape not in ((1, 1, 0), (32, 1, 0))], ids=str)
def test_what_a_busy_machine_measured_is_found_within_a_few_starts(file, shape):
    """One shape was twice too dear at the first start, all repeats of it."""
    machine = Machine(1.0, 0.1)
    busy = measured_costs(lambda *args: machine(*args) * (2 if (*args, 1, 0)[:3] == shape else 1), file)
    sound = CostModel.of(MeasuredCosts.measure(machine))
    curve = StepShape(num_seqs=shape[1], num_keys=shape[1] * shape[2])
    assert busy.seconds(shape[0], curve) > 1.5 * sound.seconds(shape[0], curve)
    for _ in range(len(MEASURED_SHAPES) - 2):
        last = measured_costs(machine, file)
    assert last.seconds(shape[0], curve) == pytest.approx(sound.seconds(shape[0], curve))


def test_what_was_measured_beside_another_process_is_not_believed_once_that_is_gone(file):
    """Two cores of an AMD EPYC (Zen 5), SmolLM2-135M: the second start is alone. Few rows kept their proportions."""
    busy = (0.0171, 0.0203, 0.0177, 0.0210, 0.0230, 0.0483, 0.1007)
    alone = (0.0066, 0.0068, 0.0067, 0.0072, 0.0078, 0.0115, 0.0219)
    for seconds in (busy, alone):
        of_rows = dict(zip(MEASURED_ROWS, seconds, strict=True))
        costs = measured_costs(lambda num_rows, *_, of_rows=of_rows: of_rows[num_rows], file)
    assert costs.seconds(64) == pytest.approx(0.0219)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"costs":{"by_rows":{"1":1.0},"sequence_s":0.0,"key_s":0.0,"row_key_s":0.0},"num_starts":1}',
        b'{"by_rows":{"1":1.0},"sequence_s":0.0,"key_s":0.0,"row_key_s":0.0}',
        b'{"costs":{"by_rows":{"1":0,"2":1,"4":1,"8":1,"16":1,"32":1,"64":1},"sequence_s":0,"key_s":0,"row_key_s":0}}',
        b'{"costs":{"by_rows":{"1":1,"2":1,"4":1,"8":1,"16":1,"32":1,"64":1},"sequence_s":-1,"key_s":0,"row_key_s":0}}',
        b'{"costs":{"by_rows":{"1":1,"2":1,"4":1,"8":1,"16":1,"32":1,"64":1},"sequence_s":1e308,"key_s":0,"row_key_s":0},'
        b'"num_starts":5}',
    ],
)
def test_a_file_of_nonsense_is_replaced(file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    machine = Machine(1.0, 0.1)
    assert times(measured_costs(machine, file)) == pytest.approx([machine(rows) for rows in MEASURED_ROWS])
    assert len(file.read_bytes()) > len(content) and os.listdir(file.parent) == [file.name]


def test_where_nothing_can_be_kept_steps_are_measured(tmp_path):
    (tmp_path / "file").touch()
    machine = Machine(1.0, 0.1)
    for file in (tmp_path / "file" / "costs.json", None):
        assert times(measured_costs(machine, file)) == pytest.approx([machine(rows) for rows in MEASURED_ROWS])


def test_each_way_to_compute_has_a_file_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = {costs_file("native", threads, "bf16") for threads in (1, 2)}
    assert len(files) == 2 and all(file.is_relative_to(tmp_path) for file in files)
    assert costs_file("native", 1, "bf16") in files
    monkeypatch.setattr(kept_costs, "cpu_name", lambda: "another CPU")
    assert costs_file("native", 1, "bf16") not in files
