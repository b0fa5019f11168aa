"""What is told of the latest steps: every token once, drafts where there are any, and what they would be without."""

from __future__ import annotations

import pytest
from engine_fixture import make_engine, request, run
from tiny_models import make_tiny_model

from specserve.drafting.counts import DraftLengths
from specserve.engine import recent_steps as recent_steps_module
from specserve.engine.recent_steps import RecentSteps

LOOP = [5, 6, 7, 8] * 6


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_steps_hold_every_token_and_draft_once(model_dir):
    engine = make_engine(model_dir)
    prediction = [9, 10, 11, 12]
    asked = [request(idx, LOOP, mode="fixed", prediction=prediction, max_tokens=6) for idx in range(3)]
    results = run(engine, [*asked, request("plain", LOOP, mode="off", max_tokens=6)])
    stats = engine.stats()
    steps = stats.recent_steps
    assert sum(step.tokens for step in steps) == stats.generated_tokens == sum(len(r.tokens) for r in results.values())
    assert sum(step.num_drafts for step in steps) >= stats.draft_tokens > 0  # those behind an end are no drafts
    assert steps[0].num_rows == 64 and steps[0].tokens in (0, 1, 2)  # --max-batched-tokens of four prompts of 24
    assert all(step.num_rows >= step.num_drafts and step.seconds > 0 for step in steps)
    assert stats.step_seconds == pytest.approx(sum(step.seconds for step in steps))
    assert stats.finished == {"length": 4}
    assert stats.cost_table.rows == sorted(stats.cost_table.rows)
    assert sum(stats.drafted_per_pos) == stats.draft_tokens
    assert sum(stats.accepted_per_pos) == stats.accepted_draft_tokens
    assert stats.drafted_per_pos == sorted(stats.drafted_per_pos, reverse=True)
    (of_base,) = stats.drafts_by_adapter
    assert of_base.drafted_per_pos == stats.drafted_per_pos and of_base.accepted_per_pos == stats.accepted_per_pos


def test_positions_follow_from_lengths():
    lengths = DraftLengths()
    for drafted, accepted in ((3, 0), (3, 2), (1, 1), (4, 2)):
        lengths.add(drafted, accepted)
    assert lengths.drafted_per_pos() == [4, 3, 3, 1]
    assert lengths.accepted_per_pos() == [3, 2, 0, 0]
    assert DraftLengths().drafted_per_pos() == DraftLengths().accepted_per_pos() == []


def test_without_drafts_is_by_the_cost_table_where_drafts_were_asked_for_and_else_as_it_was(model_dir):
    engine = make_engine(model_dir)
    run(engine, [request("plain", LOOP, mode="off")])
    for step in engine.stats().recent_steps:
        assert step.no_draft_tokens_per_s == pytest.approx(step.tokens / step.seconds)
    run(engine, [request("drafting", LOOP, mode="fixed", prediction=[9, 10, 11, 12], max_tokens=6)])
    drafting = [step for step in engine.stats().recent_steps if step.num_drafts]
    assert drafting
    for step in drafting:
        assert step.num_sequences == 1
        one_row_s = 1 / step.no_draft_tokens_per_s
        assert 0 < one_row_s < 10 * engine.proposer.cost_model.seconds(1)


def test_the_ring_forgets_and_the_sums_do_not(model_dir, monkeypatch):
    monkeypatch.setattr(recent_steps_module, "MAX_STEPS", 3)
    engine = make_engine(model_dir)
    engine.recent_steps = RecentSteps(engine.proposer.cost_model)
    run(engine, [request("plain", LOOP, mode="off", max_tokens=8)])
    stats = engine.stats()
    assert len(stats.recent_steps) == 3 < stats.num_steps
    assert stats.step_seconds > sum(step.seconds for step in stats.recent_steps)
    assert stats.no_draft_tokens == pytest.approx(8)
    ages = [step.ago_s for step in stats.recent_steps]
    assert ages == sorted(ages, reverse=True) and ages[-1] >= 0


def test_requests_are_counted_by_adapter_and_by_how_they_end(model_dir):
    engine = make_engine(model_dir, max_num_seqs=1)
    for name in ("first", "second", "third"):
        engine.add_request(request(name, LOOP))
    engine.step()
    (of_base,) = engine.stats().requests_by_adapter
    assert (of_base.name, of_base.num_running, of_base.num_waiting) == (None, 1, 2)
    engine.abort("first")
    engine.abort("second")
    engine.abort("unknown")
    run(engine, [])
    stats = engine.stats()
    assert stats.finished == {"abort": 2, "length": 1} and stats.requests_by_adapter == []


def test_what_drafts_brought_is_told_anew_only_of_those_that_were_served(model_dir):
    engine = make_engine(model_dir)
    run(engine, [request("one", LOOP)])
    (first,) = engine.stats().drafts_by_adapter
    (again,) = engine.stats().drafts_by_adapter
    assert again is first
    run(engine, [request("two", LOOP)])
    (later,) = engine.stats().drafts_by_adapter
    assert later.generated_tokens == 2 * first.generated_tokens
