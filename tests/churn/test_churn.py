"""What `make churn` takes for right and for wrong, and, slow, that it runs and finds what is broken on purpose."""

import json
import os
import random
import subprocess
import sys

import pytest
from places import FIXTURES, ROOT, TESTS

from churn.callers import dechunk, take_event
from churn.grammars import forced, judge_forced
from churn.history import BASE, Ask, Disturbances, Reply, Timeline, judge
from churn.verdict import failures

ROUTE, GRACE = "/v1/completions", 5.0
GOLDEN = {(name, ROUTE, 0): f"text of {name or 'base'}" for name in (BASE, "old", "new", "other")}


@pytest.fixture
def timeline():
    """`old` up to 100 s, on its way to `new` for two seconds, then `new`."""
    timeline = Timeline()
    timeline.set(0, "old")
    timeline.set(100, "new", is_moving=True)
    timeline.set(102, "new")
    return timeline


def verdict(timeline, start, end, disturbances=None, **fields):
    reply = Reply(start, end, **{"status": 200, "is_whole": True, **fields})
    return judge(Ask("name", ROUTE, 0), reply, timeline, GOLDEN, disturbances or Disturbances(), GRACE)


def error(status, code=None, message="no"):
    return {"status": status, "code": code, "error": message, "is_json_error": True}


@pytest.mark.parametrize(
    ("start", "end", "text", "want"),
    [
        (50, 51, "text of old", "right"),
        (50, 51, "text of new", "wrong text"),  # it was not there yet
        (99, 101, "text of old", "right"),
        (99, 101, "text of new", "right"),
        (101, 101.5, "text of old", "late"),  # what is on its way may be neither, and old only by grace
        (104, 105, "text of old", "late"),
        (104, 105, "text of new", "right"),
        (108, 109, "text of old", "wrong text"),
        (108, 109, "text of other", "wrong text"),
        (108, 109, "text of base", "wrong text"),
        (108, 109, "text of ne", "wrong text"),  # whole answers are compared whole
        (108, 109, "", "wrong text"),
    ],
)
def test_a_text_is_right_if_its_name_held_it_at_that_time(timeline, start, end, text, want):
    assert verdict(timeline, start, end, text=text)[0] == want


def test_what_a_route_gives_or_takes_is_held_as_before_until_that_is_done(timeline):
    timeline.set(200, "other", is_moving=True, keeps_old=True)
    assert verdict(timeline, 230, 231, text="text of new")[0] == "right"
    assert verdict(timeline, 230, 231, text="text of other")[0] == "right"
    assert verdict(timeline, 230, 231, text="text of old")[0] == "wrong text"
    timeline.set(240, "other")
    assert verdict(timeline, 250, 251, text="text of new")[0] == "wrong text"


def test_a_wrong_text_says_whose_it_is(timeline):
    assert verdict(timeline, 200, 201, text="text of old")[1] == "the text of old"
    assert verdict(timeline, 200, 201, text="text of base")[1] == "the base model's text"
    assert verdict(timeline, 200, 201, text="garbage")[1] == "the text of no content"


def test_beginnings_count_where_the_answer_broke_off_or_went_on(timeline):
    assert verdict(timeline, 200, 201, text="text of n", we_left=True, is_whole=False)[0] == "left"
    assert verdict(timeline, 200, 201, text="text of o", we_left=True, is_whole=False)[0] == "wrong text"
    assert verdict(timeline, 200, 201, text="text of new and more", is_longer=True)[0] == "right"
    assert verdict(timeline, 200, 201, text="text of new and more")[0] == "wrong text"


def test_errors_are_right_where_something_moved_and_wrong_where_all_stood_still(timeline):
    away = Disturbances()
    away.begin(300)[1] = 310
    bad = error(400, "invalid_adapter")
    assert verdict(timeline, 101, 103, **bad)[0] == "refused"
    assert verdict(timeline, 200, 201, **bad)[0] == "unexpected error"
    assert verdict(timeline, 305, 306, away, **bad)[0] == "unexpected error"  # a dead engine spoils no adapter
    changing = error(409, "adapter_changing", "adapter 'name' changes while it is read; ask again")
    assert verdict(timeline, 305, 306, away, **changing)[0] == "refused"  # but may interrupt its reading
    assert verdict(timeline, 200, 201, away, **changing)[0] == "unexpected error"
    gone = error(503, "engine_unavailable")
    assert verdict(timeline, 305, 306, away, **gone)[0] == "refused"
    assert verdict(timeline, 101, 103, away, **gone)[0] == "unexpected error"
    assert verdict(timeline, 101, 103, **error(500))[0] == "unclean error"
    crashed = error(500, "engine_crashed")
    away.kills = [302.5, 304.0]
    assert verdict(timeline, 300, 306, away, **crashed)[0] == "refused"
    assert verdict(timeline, 304, 306, away, **crashed)[0] == "refused"  # a kill is noticed late
    assert verdict(timeline, 305, 307, away, **crashed)[0] == "unclean error"
    assert verdict(timeline, 101, 103, status=404, error="plain text")[0] == "unclean error"
    timeline.set(400, None)
    assert verdict(timeline, 500, 501, **error(404, "model_not_found"))[0] == "refused"
    assert verdict(timeline, 500, 501, text="text of new")[0] == "wrong text"


def test_a_stream_must_end_as_its_protocol_says(timeline):
    assert verdict(timeline, 200, 201, text="text of", is_whole=False)[0] == "broken stream"
    assert verdict(timeline, 200, 201, text="text of", is_whole=False, is_cut=True)[0] == "broken stream"
    assert verdict(timeline, 200, 201, text="text of", is_whole=False, is_cut=True, may_be_cut=True)[0] == "left"
    assert verdict(timeline, 200, 201, text="text of", is_whole=False, may_be_cut=True)[0] == "broken stream"
    reply = Reply(0)
    take_event(b'{"choices": [{"index": 0, "text": "a"}]}', reply)
    assert not reply.is_whole
    take_event(b"[DONE]", reply)
    assert reply.is_whole and reply.text == "a"
    assert dechunk(b"3\r\nabc\r\n0\r\n\r\n") == (b"abc", True)
    assert dechunk(b"3\r\nabc\r\n5\r\nde") == (b"abcde", False)


def test_a_text_under_a_grammar_is_that_text_whatever_the_name_holds(timeline):
    rng, seen = random.Random(0), set()
    for _ in range(60):
        asked = forced("name", rng)
        seen.add(asked.text is None or asked.is_json)
        refusal = {"status": 400, "error": "the keyword 'not' is not enforced", "is_json_error": True}

        def judged(asked=asked, **fields):
            reply = Reply(200, 201, **{"status": 200, "is_whole": True, **fields})
            return judge_forced(asked, "name", reply, timeline, Disturbances(), GRACE)[0]

        if asked.text is None:
            assert judged(**refusal) == "refused" and judged(text="{}") == "wrong text"
        else:
            assert judged(text=asked.text) == "right" and judged(text=asked.text + "x") == "wrong text"
            assert judged(**refusal) == "unexpected error" and judged(is_whole=False) == "broken stream"
    assert seen == {True, False}


def test_every_kind_of_fault_fails_the_run():
    passed = {
        "verdicts": {"right": 90, "refused": 10}, "requests": 100, "server_gone": None, "refused_changes": 0,
        "harness_errors": 0, "unasked_deaths": [], "not_given_back": {}, "more_handles": {"server": 3},
        "memory": {"engine": None}, "exit_status": 0,
    }  # fmt: skip
    growth = {"measured_min": 10.0, "mib_per_min": 12.0, "last_less_first_quarter_mib": 90.0}
    assert failures(passed) == []
    for change in (
        {"verdicts": {"right": 99, "wrong text": 1}},
        {"verdicts": {"right": 9, "refused": 91}},
        {"server_gone": "it did not come back"},
        {"refused_changes": 1},
        {"harness_errors": 1},
        {"unasked_deaths": [{"at_s": 3}]},
        {"not_given_back": {"blocks": 2}},
        {"more_handles": {"server": 40}},
        {"memory": {"engine": growth}},
        {"exit_status": 1},
    ):
        assert len(failures(passed | change)) == 1, change


@pytest.mark.slow
def test_a_short_run_on_a_tiny_model_passes():
    command = [sys.executable, "-m", "churn", "--model", "tiny", "--minutes", "1.5", "--no-save"]
    path = os.pathsep.join([str(FIXTURES), str(TESTS), str(ROOT)])
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    line = json.loads(next(line for line in result.stdout.splitlines() if line.startswith('{"bench"')))
    assert line["failed"] == [] and line["disturbances"]["engine killed"] > 0
