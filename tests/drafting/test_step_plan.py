"""What a step is expected to take: device and host one after the other, or both at once."""

from __future__ import annotations

import pytest

from specserve.drafting.cost_model import MEASURED_ROWS, CostModel, StepShape
from specserve.drafting.drafts import StepPlan
from specserve.drafting.host_cost import HostCost

MODEL = CostModel({rows: 1e-3 + 2e-6 * rows for rows in MEASURED_ROWS})


def plan(host_s: float, is_hidden: bool) -> StepPlan:
    host = HostCost()
    for _ in range(50):
        host.observe(8, 0, host_s)
    return StepPlan(MODEL, StepShape(num_seqs=8), 8, 8, 2048, host, is_hidden)


@pytest.mark.parametrize("host_s", [1e-4, 5e-3])
def test_the_host_s_part_counts_on_top_of_the_device_s_where_the_device_waits_for_it(host_s):
    one = plan(host_s, is_hidden=False)
    assert one.seconds(0) == pytest.approx(MODEL.seconds(8) + host_s, rel=0.05)


@pytest.mark.parametrize("host_s", [1e-4, 5e-3])
def test_where_the_device_runs_the_other_half_meanwhile_the_longer_of_both_counts(host_s):
    one = plan(host_s, is_hidden=True)
    assert one.seconds(0) == pytest.approx(max(MODEL.seconds(8), host_s), rel=0.05)
    draft_s = one.seconds(32) - one.seconds(0)
    assert one.host is not None
    expected = MODEL.seconds(40) - MODEL.seconds(8) if host_s < 1e-3 else 32 * one.host.draft_s
    assert draft_s == pytest.approx(expected, rel=0.05)
